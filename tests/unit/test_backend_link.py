"""The worker's ZeroMQ transport: bounded output to a backend that does not read, admission, and hang-ups."""

import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from zmq.utils.monitor import parse_monitor_message

from support.fakes.descriptors import is_readable, open_descriptors
from support.fakes.link_wire import HELLO, TOKEN, WAIT_MS, Wire
from support.fakes.queue_rig import DEVICE
from ublkpool.bufpool.wire import Descriptor, Kind
from ublkpool.ublk.queue import LinkState
from ublkpool.workers import backend_link
from ublkpool.workers.backend_link import FRAME_BYTES_MAX
from ublkpool.workers.queue_gate import user_of

REQUESTS_MAX = 20_000
_SO_PASSRIGHTS = 83


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    wire = Wire(context, tmp_path / "q0")
    yield wire
    wire.close()
    context.term()


def test_a_backend_that_answers_what_it_does_not_read_is_cut_off(wire: Wire) -> None:
    wire.serve()
    for sequence in range(1, REQUESTS_MAX):
        wire.guess(sequence)
        if wire.desk.queue.link is not LinkState.UP:
            break
    assert wire.desk.queue.link is LinkState.CUT, "a pipe without bounds"
    assert wire.desk.side.statistics.violations == 1


def test_a_peer_cannot_send_a_descriptor_that_zeromq_would_close(wire: Wire) -> None:
    """Its close may wait for as long as the peer likes: a socket that lingers, a file of a FUSE server."""
    wire.serve()
    with socket.socket(socket.AF_UNIX) as peer, socket.socket() as lingering:
        try:
            peer.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 1)
        except OSError:
            pytest.skip("this kernel lacks SO_PASSRIGHTS (Linux 6.16)")
        peer.connect(str(wire.path))
        with pytest.raises(PermissionError):
            socket.send_fds(peer, [b"\xff"], [lingering.fileno()])
        assert peer.send(b"\xff") == 1
    assert wire.desk.queue.link is LinkState.UP


def test_the_socket_has_its_mode_and_its_descriptor_ends_with_the_link(tmp_path: Path) -> None:
    before = open_descriptors()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    wire = Wire(context, tmp_path / "q0")
    (tmp_path / "q0").write_text("of an earlier worker")
    wire.serve()
    assert stat.S_IMODE(wire.path.stat().st_mode) == 0o600
    wire.close()
    context.term()
    assert open_descriptors() == before


def test_a_full_pipe_delays_and_loses_nothing(wire: Wire) -> None:
    wire.serve()
    sequence = 0
    while not wire.is_full():
        sequence += 1
        assert sequence < REQUESTS_MAX
        wire.guess(sequence)
        wire.link.turn()
    seen: list[int] = []
    while len(seen) < sequence:
        assert wire.backend.poll(WAIT_MS), f"{len(seen)} of {sequence} came"
        frame = wire.backend.recv()
        if frame[0] == Kind.WELCOME:
            frame = frame[64:]
        seen += [int.from_bytes(frame[at + 16 : at + 24], "little") for at in range(0, len(frame), 64)]
        wire.link.turn()
    assert seen == list(range(1, sequence + 1))
    assert wire.desk.queue.link is LinkState.UP and not wire.is_full()


def test_a_frame_that_is_too_large_ends_the_connection_and_with_it_the_backend(wire: Wire) -> None:
    wire.serve()
    request = wire.desk.read(0, 0)
    wire.backend.send(b"x" * (FRAME_BYTES_MAX + 1))
    wire.until(lambda: wire.desk.queue.link is LinkState.CUT, "the end is noticed")
    assert (wire.statistics.hangups, wire.statistics.violations) == (1, 0)
    assert request.result is None and not wire.desk.queue.has_violation


def test_an_end_is_noticed_although_the_next_connection_has_its_number(wire: Wire) -> None:
    wire.serve()
    monitor = wire.backend.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    wire.backend.send(b"x" * (FRAME_BYTES_MAX + 1))
    # The worker sleeps while its thread of ZeroMQ's is answered by a client that comes again by itself.
    assert wire.gate_until(lambda: bool(monitor.poll(1))), "it is there again"
    wire.backend.disable_monitor()
    monitor.close()
    wire.until(lambda: wire.desk.queue.link is LinkState.CUT, "the end is noticed")
    assert (wire.statistics.hangups, wire.statistics.violations) == (1, 0)


def test_frames_of_a_backend_that_hung_up_and_reconnected_are_dropped(wire: Wire) -> None:
    wire.serve()
    second = wire.connect()
    second.send(HELLO)
    wire.until(lambda: wire.desk.queue.link is LinkState.CUT, "the second connection is noticed")
    assert (wire.statistics.hangups, wire.statistics.violations) == (1, 0)


def test_frames_sent_before_a_hang_up_are_received(wire: Wire) -> None:
    wire.serve()
    request = wire.desk.read(0, 0)
    wire.link.turn()
    wire.backend.send(Descriptor(Kind.DONE, device=DEVICE, epoch=3, sequence=1, result=512).pack())
    wire.backend.close(linger=WAIT_MS)
    wire.until(lambda: wire.desk.queue.link is LinkState.CUT, "the end is noticed")
    wire.desk.driver.consume()
    assert request.result == 512


def test_a_strangers_frames_are_dropped_and_its_hang_up_changes_nothing(wire: Wire) -> None:
    wire.serve()
    stranger = wire.connect(b"S" * 16)
    stranger.send(HELLO)
    wire.until(lambda: wire.statistics.strangers == 1, "the frame is counted")
    stranger.close()
    ended = wire.connect(b"R" * 16)
    ended.send(HELLO)
    wire.until(lambda: wire.statistics.strangers == 2, "the worker has seen the end of the first")
    assert wire.desk.queue.link is LinkState.UP and not wire.statistics.hangups


def test_another_users_connection_is_refused_before_its_first_frame(wire: Wire) -> None:
    wire.expect(user=os.getuid() + 1)
    wire.connect().send(HELLO)
    wire.until(lambda: wire.statistics.strangers == 1, "it is refused")
    assert wire.desk.queue.link is LinkState.EXPECTED
    wire.link.expect(TOKEN, os.getuid())
    wire.connect().send(HELLO)
    wire.until(lambda: wire.desk.queue.link is LinkState.UP, "the right one gets in")


def test_no_frame_is_read_while_no_backend_is_expected(wire: Wire) -> None:
    wire.serve()
    wire.desk.queue.cut()
    wire.link.expect(b"")
    wire.backend.send(HELLO)
    assert wire.link.socket.poll(WAIT_MS)
    assert not wire.link.turn()
    assert not wire.statistics.strangers
    wire.link.expect(b"N" * 16, os.getuid())
    assert not wire.link.turn()
    assert wire.statistics.strangers == 1


@pytest.mark.parametrize(
    ("address", "user"),
    [
        (b"localhost:0:5:77", 0),
        (b"a:b:1000:1:2", 1000),
        (b"localhost", None),
        (b"", None),
        (b"h:x:1:2", None),
    ],
)
def test_the_user_is_read_from_the_end_of_the_address(address: bytes, user: int | None) -> None:
    assert user_of(address) == user


def test_a_dead_backends_frames_do_not_keep_the_worker_awake(wire: Wire) -> None:
    wire.serve()
    (link, *_) = wire.link.filenos()
    wire.link.expect(b"")
    wire.backend.send(HELLO)
    assert is_readable(link, WAIT_MS / 1000), "it has come"
    wire.backend.close()
    wire.until(lambda: not is_readable(link, 0.2), "nothing is to be done")


def test_a_turn_reads_a_bounded_number_of_connections_ends(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a process that connects and hangs up without end would stop the queue."""
    monkeypatch.setattr(backend_link, "ENDS_PER_TURN_MAX", 4)
    wire.serve()
    read: list[int] = []

    def parse(message: list[bytes]) -> object:
        read.append(1)
        return parse_monitor_message(message)

    monkeypatch.setattr(backend_link, "parse_monitor_message", parse)
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as each:
            each.connect(str(wire.path))
    total = 0
    deadline_s = time.monotonic() + WAIT_MS / 1000
    while total < 2 * 20:
        assert time.monotonic() < deadline_s
        wire.link.turn()
        # Before the frames and after them.
        assert len(read) <= 2 * 4
        total += len(read)
        read.clear()
    assert wire.desk.queue.link is LinkState.UP
