"""Unix sockets that the daemon listens on: who may connect, and what they may replace.

Owns the rule that a socket takes the place of a socket that a killed daemon left, and of nothing else.  Must not know
what is said over a socket.
"""

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.reserve import Reserve


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


class ReservedListener(socket.socket):
    """A listening socket that accepts a connection even when no descriptor is left: it keeps one for that.

    A daemon that has as many as it may can still be asked to delete a device, and can say what is wrong.
    """

    def __init__(self, listener: socket.socket) -> None:
        """Takes the listener over."""
        super().__init__(fileno=listener.detach())
        self._reserve = Reserve(1)
        self.was_short = False
        """Whether the connection accepted last took the descriptor that was kept."""

    def accept(self) -> "tuple[socket.socket, object]":
        """As of `socket.socket`; raises `OSError` if that descriptor is in use."""
        self._reserve.refill()
        try:
            self.was_short = False
            return super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self.was_short = True
        with self._reserve.released():
            return super().accept()

    def close(self) -> None:
        """And let go of the descriptor that was kept."""
        self._reserve.close()
        super().close()
