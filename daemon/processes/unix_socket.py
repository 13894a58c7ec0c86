"""Unix sockets that the daemon listens on: the users that may connect, and the files that they may replace.

Owns the rule that a new socket replaces a socket that a killed daemon left, and no other file.  Must not know the
protocols of the sockets.
"""

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.guarded_socket import GuardedSocket
from ublkpool.daemon.processes.reserve import Reserve
from ublkpool.workers.listening import socket_mode


def remove_socket(path: Path) -> None:
    """Remove the socket at this path, if it exists.  Raises `DaemonError` if the path is no socket, `OSError`."""
    with suppress(FileNotFoundError):
        check_replaceable(path)
        path.unlink()


def check_replaceable(path: Path) -> None:
    """Raise `DaemonError` if a file that is no socket is at this path, `OSError` if that cannot be told."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise DaemonError(
                f"{path}: in the way, and not a socket: move it away, or choose another --run-dir"
            )


def listen(path: Path, kind: socket.SocketKind, group: int | None = None, backlog: int = 64) -> socket.socket:
    """A socket that listens at `path` for the daemon's user and for `group`; it replaces a socket there.

    Raises `DaemonError` if a file that is no socket is in the way, or the socket cannot be made.
    """
    remove_socket(path)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _bind(listener, path, socket_mode(group))
        if group is not None:
            # The owner of the directory may have put a link in the socket's place.
            os.chown(path, -1, group, follow_symlinks=False)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise DaemonError(f"{path}: cannot listen: {explain(error)}") from error
    return listener


def _bind(listener: socket.socket, path: Path, mode: int) -> None:
    """Make the socket at `path` with this mode, which chmod(2) would give to the file that a link there leads to."""
    before = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)


class ReservedListener(socket.socket):
    """A listening socket that keeps one descriptor in reserve, for a connection when no other descriptor is left.

    So a daemon that has reached its limit can still be told to delete a device, and can report the limit.
    """

    def __init__(self, listener: socket.socket) -> None:
        """Takes the listener over."""
        super().__init__(fileno=listener.detach())
        self._reserve = Reserve(1)
        self.was_short = False
        """Whether the connection accepted last took the reserved descriptor."""

    def accept(self) -> "tuple[GuardedSocket, object]":
        """As `socket.socket.accept`; raises `OSError` if the reserved descriptor is in use, too."""
        self._reserve.refill()
        try:
            self.was_short = False
            return self._guarded()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self.was_short = True
        with self._reserve.released():
            return self._guarded()

    def _guarded(self) -> "tuple[GuardedSocket, object]":
        sock, address = super().accept()
        return GuardedSocket(sock), address

    def close(self) -> None:
        """Close the socket and the reserved descriptor."""
        self._reserve.close()
        super().close()
