"""Packets with descriptors: what is received is close-on-exec, and flags reach the system call."""

import os
import socket
from collections.abc import Iterator

import pytest

from support.fakes.descriptors import open_descriptors
from ublkpool.bufpool.packets import receive_descriptors, receive_packet, send_packet


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_a_received_descriptor_is_close_on_exec(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    send_packet(theirs, b"one", theirs.fileno())
    socket.send_fds(theirs, [b"two"], [theirs.fileno()] * 2)
    packet, fd = receive_packet(ours, 16)
    assert packet == b"one" and fd is not None
    packet, fds, flags = receive_descriptors(ours, 16, 4)
    assert (packet, len(fds), flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)) == (b"two", 2, 0)
    assert not any(os.get_inheritable(each) for each in (fd, *fds))
    for each in (fd, *fds):
        os.close(each)


def test_too_much_is_flagged_and_the_descriptors_beyond_the_limit_are_closed(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    before = open_descriptors()
    socket.send_fds(theirs, [b"x" * 17], [theirs.fileno()] * 5)
    packet, fds, flags = receive_descriptors(ours, 16, 1)
    assert packet == b"x" * 16 and flags & socket.MSG_TRUNC and flags & socket.MSG_CTRUNC
    for each in fds:
        os.close(each)
    assert open_descriptors() == before


def test_a_blocking_socket_does_not_wait_with_msg_dontwait(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(BlockingIOError):
        receive_descriptors(pair[0], 16, 1, socket.MSG_DONTWAIT)


def test_a_packet_without_a_descriptor_has_none_and_the_end_is_empty(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    send_packet(theirs, b"one")
    theirs.close()
    assert (receive_packet(ours, 16), receive_packet(ours, 16)) == ((b"one", None), (b"", None))
