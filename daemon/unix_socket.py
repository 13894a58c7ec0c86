"""Unix sockets that the daemon listens on: who may connect, and what they may replace.

Owns the rule that a socket takes the place of a socket that a killed daemon left, and of nothing else.  Must not know
what is said over a socket.
"""

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import DaemonError


def remove_socket(path: Path) -> None:
    """Remove the socket at this path, if there is one.  Raises `DaemonError` if something else is there, `OSError`."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise DaemonError(
                f"{path}: in the way, and not a socket: move it away, or choose another --run-dir"
            )
        path.unlink()


def listen(path: Path, kind: socket.SocketKind, group: int | None = None, backlog: int = 64) -> socket.socket:
    """A socket that listens at `path`, for our user and, if there is one, this group; it replaces a socket there.

    Raises `DaemonError` if something that is not a socket is in the way, or the socket cannot be made.
    """
    remove_socket(path)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(0o660)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise DaemonError(f"{path}: cannot listen: {explain(error)}") from error
    finally:
        os.umask(umask)
    return listener
