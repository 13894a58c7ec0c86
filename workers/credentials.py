"""The process at the other end of a unix socket, as the kernel recorded it (SO_PEERCRED, `sk_getsockopt`)."""

import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("3i")


class Credentials(NamedTuple):
    """The process that connected, or that began to listen, and its user and group at that moment."""

    pid: int
    uid: int
    gid: int


def credentials_of(sock: socket.socket) -> Credentials:
    """The credentials of the process that connected; of the listener, if this end connected.  Raises `OSError`."""
    return Credentials(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
