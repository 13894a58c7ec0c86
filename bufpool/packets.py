"""Packets over a SOCK_SEQPACKET unix socket, with the descriptors that travel with them.

Every received descriptor is close-on-exec.  `socket.recv_fds` would not do: CPython (3.11) ignores its `flags`,
MSG_CMSG_CLOEXEC and MSG_DONTWAIT among them.
"""

import array
import socket


def send_packet(sock: socket.socket, packet: bytes, fd: int | None = None) -> None:
    """Send one packet, with a duplicate of `fd`.  Raises `OSError`."""
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    sock.sendmsg([packet], rights)


def receive_packet(sock: socket.socket, bytes_max: int) -> tuple[bytes, int | None]:
    """The next packet and its descriptor; an empty packet is the end of the connection.

    The descriptor is missing if this process has as many as it may.  Raises `BlockingIOError`, `ConnectionError`.
    """
    packet, fds, _ = receive_descriptors(sock, bytes_max, 1)
    return packet, fds[0] if fds else None


def receive_descriptors(
    sock: socket.socket, bytes_max: int, count_max: int, flags: int = 0
) -> tuple[bytes, list[int], int]:
    """The next packet, up to `count_max` descriptors, and the message's flags (MSG_TRUNC, MSG_CTRUNC).

    `flags` are those of recvmsg(2).  Raises `OSError`.
    """
    fds = array.array("i")
    room = socket.CMSG_LEN(count_max * fds.itemsize)
    packet, ancillary, found, _ = sock.recvmsg(bytes_max, room, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return packet, list(fds), found
