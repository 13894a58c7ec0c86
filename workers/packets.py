"""Packets over a SOCK_SEQPACKET unix socket, each with one descriptor at most.

The transport of `workers/messages.py` and of the daemon's channels (`daemon/processes/channel.py`).
"""

import array
import socket


def send_packet(sock: socket.socket, packet: bytes, fd: int | None = None) -> None:
    """Send one packet, with a duplicate of `fd`.  Raises `OSError`."""
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    sock.sendmsg([packet], rights)


def receive_packet(sock: socket.socket, bytes_max: int) -> tuple[bytes, int | None]:
    """The next packet and its descriptor, close-on-exec; an empty packet is the end of the connection.

    The descriptor is missing if this process has as many as it may.  Raises `BlockingIOError`, `ConnectionError`.
    """
    packet, fds, _flags, _address = socket.recv_fds(sock, bytes_max, 1, socket.MSG_CMSG_CLOEXEC)
    return packet, fds[0] if fds else None
