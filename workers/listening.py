"""The unix sockets on which a worker listens for its backend: mode, group, and what a peer may send.

Owns that no peer can send descriptors where the kernel can refuse them (Linux 6.16): the last close of one may wait,
for a socket that lingers or for a FUSE server, and the worker or its ZeroMQ thread would wait there.
"""

import os
import socket
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.way_out import naming

_SO_PASSRIGHTS = 83
"""Since Linux 6.16, for the connections of a listening socket as well; include/uapi/asm-generic/socket.h."""


def socket_mode(group: int | None) -> int:
    """The mode of a unix socket for this process's user and, unless that is None, for `group`."""
    return 0o600 if group is None else 0o660


def listen(path: Path, kind: socket.SocketKind, mode: int, group: int | None, backlog: int) -> socket.socket:
    """A socket that listens at `path`, with `mode` and, unless that is None, `group`; it replaces an earlier worker's.

    Never waits.  Raises `OSError`.
    """
    listener = bind_at(path, kind, mode, group)
    try:
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def bind_at(path: Path, kind: socket.SocketKind, mode: int, group: int | None) -> socket.socket:
    """As `listen`, but who connects is refused until the socket listens.  Raises `OSError`."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with naming(path):
            listener.bind(str(path))
        with suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        path.chmod(mode)
        if group is not None:
            os.chown(path, -1, group)
    except OSError:
        listener.close()
        raise
    return listener


class Place:
    """A path at which a worker listens once it is told to; it takes the path while it may make a socket there."""

    def __init__(
        self, path: Path, kind: socket.SocketKind, mode: int, group: int | None, backlog: int
    ) -> None:
        self.path = path
        self._kind, self._mode, self._group, self._backlog = kind, mode, group, backlog
        self._bound: socket.socket | None = None
        self._failure: OSError | None = None

    def take(self) -> None:
        """Make the socket unless it is made, since this process is about to give up the right to; `listen` raises a
        failure.
        """
        if self._bound is None:
            try:
                self._bound = bind_at(self.path, self._kind, self._mode, self._group)
            except OSError as error:
                self._failure = error

    def listen(self) -> socket.socket:
        """The listening socket, which is the caller's.  Raises `OSError`."""
        if self._failure is not None:
            raise _TooLate(self._failure)
        if self._bound is None:
            return listen(self.path, self._kind, self._mode, self._group, self._backlog)
        self._bound.listen(self._backlog)
        bound, self._bound = self._bound, None
        return bound

    def close(self) -> None:
        """Close a socket that does not listen yet."""
        if self._bound is not None:
            self._bound.close()
            self._bound = None


class _TooLate(OSError):
    """The socket could not be made at the worker's start, and now it has no right to make one."""

    def __init__(self, failure: OSError) -> None:
        way_out = f"when that is mended: kill {os.getpid()}, this worker, whose successor makes it"
        super().__init__(failure.errno, f"{failure.strerror}, at the worker's start; {way_out}")
