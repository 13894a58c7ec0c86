"""The process at the other end of a unix socket, as the kernel recorded it (`sk_getsockopt`)."""

import errno
import socket
import struct
from typing import NamedTuple

_SO_PEERPIDFD = 77
"""include/uapi/asm-generic/socket.h; Python does not name it."""
_UCRED = struct.Struct("3i")


class Credentials(NamedTuple):
    """The process that connected, or that began to listen, and its user and group at that moment."""

    pid: int
    uid: int
    gid: int


def credentials_of(sock: socket.socket) -> Credentials:
    """The credentials of the process that connected; of the listener, if this end connected.  Raises `OSError`."""
    return Credentials(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def peer_pidfd(sock: socket.socket) -> int:
    """A pidfd of the process that connected; of the one that began to listen, if this end connected.

    Raises `ProcessLookupError` if that process has been reaped, `OSError` if no pidfd can be opened.  `pidfd_open`
    would not do: the process number may be a later process's by now.
    Since Linux 6.5 (`sk_getsockopt`, net/core/sock.c).
    """
    try:
        packed = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ESRCH):
            raise ProcessLookupError(errno.ESRCH, "the process that connected has ended") from error
        if error.errno == errno.ENOPROTOOPT:
            raise OSError(errno.ENOPROTOOPT, "this kernel lacks SO_PEERPIDFD (Linux 6.5)") from error
        raise
    return int(struct.unpack("i", packed)[0])
