"""A worker's loop on a real io_uring: backends that ask for rings, talk through them, lie in them, and go."""

import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakes.descriptors import is_readable
from support.fakes.loop_rig import DEVICE, HELLO, TOKEN, WAIT_S, LoopRig, eventually, loop_rig_in
from support.fakes.queue_desk import Desk
from support.fakes.ring_peer import SLEEPING, TAIL, TO_BACKEND, TO_WORKER, RingMemory, RingPeer
from ublkpool.bufpool.wire import Descriptor, Kind
from ublkpool.ublk.queue import IoUring, LinkState, Port
from ublkpool.workers import messages
from ublkpool.workers.ring_link import ASKING_MAX, RingLink


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopRig]:
    monkeypatch.setattr("ublkpool.ublk.process_calls.lock_memory", lambda: None)
    with loop_rig_in(tmp_path) as made:
        yield made


def test_a_backend_says_hello_through_the_rings_and_its_death_is_a_hang_up(rig: LoopRig) -> None:
    rig.serve_on_rings().close()
    assert rig.news() == messages.HungUp()
    rig.lose()
    rig.serve_on_rings().close()
    assert rig.news() == messages.HungUp()
    assert rig.count("hangups") == 2 and rig.count("violations") == 0


def test_a_doorbell_rings_for_a_backend_that_sleeps_and_for_no_other(rig: LoopRig) -> None:
    rig.expect()
    with rig.ask() as peer:
        peer.open()
        peer.rings.set_index(TO_BACKEND, SLEEPING, 1)
        peer.send(HELLO)
        assert rig.news() == messages.Linked()
        assert is_readable(peer.bell, WAIT_S) and rig.count("bells") == 1
        assert not peer.rings.index(TO_BACKEND, SLEEPING) and peer.rings.take()[0] == Kind.WELCOME
    assert rig.news() == messages.HungUp()
    rig.lose()
    rig.expect()
    with rig.ask() as awake:
        awake.open()
        awake.send(HELLO)
        assert rig.news() == messages.Linked()
        eventually(lambda: awake.rings.take()[:1] == bytes([Kind.WELCOME]), "WELCOME")
    assert rig.count("bells") == 1


def test_memory_that_a_backend_gets_cannot_change_its_size(rig: LoopRig) -> None:
    with rig.serve_on_rings() as peer:
        for size_bytes in (0, 2 * peer.rings.size_bytes):
            with pytest.raises(PermissionError):
                os.ftruncate(peer.memory_fd, size_bytes)


def test_descriptors_in_the_ring_before_the_end_count(rig: LoopRig) -> None:
    rig.expect()
    with rig.ask() as peer:
        peer.open()
        peer.rings.put(HELLO)
        # No doorbell: only the end of the connection makes the worker look.
    assert {rig.news(), rig.news()} == {messages.HungUp(), messages.Linked()}


def test_rings_are_opened_again_until_there_was_a_hello(rig: LoopRig) -> None:
    rig.expect()
    for _ in range(3):
        with rig.ask() as peer:
            peer.open()
    with rig.ask() as peer:
        peer.open()
        peer.send(HELLO)
        assert rig.news() == messages.Linked()
    assert rig.news() == messages.HungUp()


def test_a_ring_index_out_of_range_cuts_the_backend_off(rig: LoopRig) -> None:
    with rig.serve_on_rings() as peer:
        peer.rings.set_index(TO_WORKER, TAIL, peer.rings.index(TO_WORKER, TAIL) + peer.rings.entries + 1)
        peer.ring()
        said = rig.news()
        assert isinstance(said, messages.Cut) and "index in its ring" in said.reason
        assert peer.hears_the_end()
    assert rig.count("violations") == 1
    rig.lose()
    rig.serve_on_rings().close()
    assert rig.news() == messages.HungUp()


def test_a_malformed_descriptor_in_a_ring_cuts_the_backend_off(rig: LoopRig) -> None:
    with rig.serve_on_rings() as peer:
        peer.send(b"\xff" * 64)
        said = rig.news()
        assert isinstance(said, messages.Cut) and "not this queue's" in said.reason


def test_a_stranger_gets_no_rings(rig: LoopRig) -> None:
    rig.expect()
    with rig.ask(b"S" * 16) as stranger:
        assert stranger.ask() == b""
    with rig.ask() as other_version:
        assert other_version.ask(v=2) == b""
    with rig.ask() as vague:
        vague.connection.send(b"{}")
        assert vague.hears_the_end()
    assert rig.count("strangers") == 2


def test_another_user_gets_no_rings(rig: LoopRig) -> None:
    rig.expect(os.getuid() + 1)
    with rig.ask() as peer:
        assert peer.hears_the_end()
    assert rig.count("strangers") == 1


def test_a_second_connection_gets_no_rings_whichever_transport_the_first_uses(rig: LoopRig) -> None:
    with rig.serve_on_rings(), rig.ask() as second:
        assert second.ask() == b""
    assert rig.news() == messages.HungUp()
    rig.lose()
    rig.serve()
    with rig.ask() as late:
        assert late.ask() == b""


def test_frames_of_a_backend_with_rings_are_not_read(rig: LoopRig) -> None:
    with rig.serve_on_rings() as peer:
        rig.connect()
        # Were the second HELLO heard, it would be a violation; what comes next is this one's answer.
        peer.send(Descriptor(Kind.FENCED, device=DEVICE, epoch=0).pack())
        eventually(lambda: rig.count("stale_answers") == 1, "the worker reads the ring")
        assert rig.count("violations") == 0


def test_of_too_many_silent_connections_the_oldest_is_closed(rig: LoopRig) -> None:
    rig.expect()
    silent = [rig.ask() for _ in range(ASKING_MAX + 1)]
    assert silent[0].hears_the_end()
    silent[-1].open()
    for each in silent:
        each.close()


def test_a_backend_that_comes_before_it_is_expected_waits(rig: LoopRig) -> None:
    rig.serve_on_rings().close()
    assert rig.news() == messages.HungUp()
    with rig.ask() as early:
        early.connection.settimeout(0)
        with pytest.raises(BlockingIOError):
            early.ask()
        early.connection.settimeout(WAIT_S)
        rig.lose()
        rig.expect()
        packet, fds, _, _ = socket.recv_fds(early.connection, 4096, 4)
        assert b"ring_open" in packet and len(fds) == 3
        for each in fds:
            os.close(each)


def test_a_request_on_a_connection_that_the_same_turn_closes_does_no_harm(tmp_path: Path) -> None:
    link = RingLink(tmp_path / "ring", Desk(depth=1, connected=False).queue, 0o600, None)
    link.expect(TOKEN, os.getuid())
    asking = [RingPeer(tmp_path / "ring", TOKEN) for _ in range(ASKING_MAX)]
    link.turn()
    # One turn sees both: the new connection makes the link close the oldest one, and the oldest one has asked.
    with RingPeer(tmp_path / "ring", TOKEN):
        asking[0].connection.send(b"{}")
        link.turn()
        link.turn()
        assert asking[0].hears_the_end()
    for each in asking:
        each.close()
    link.close()


RUNGS = 700


def _ring_often(blocked: bool) -> tuple[Desk, int]:
    """A backend that says it sleeps before each of many requests; how many were rung for until it was cut off."""
    desk, port = Desk(need_get_data=False, depth=RUNGS), Port(RUNGS)
    ring = IoUring(desk.queue, -1)
    peer = RingMemory(port.memory_fd, port.entries)
    bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    if blocked:
        os.set_blocking(bells[1], True)
        os.eventfd_write(bells[1], 2**64 - 2)
    ring.use_port(port, *bells)
    rung = 0
    while rung < RUNGS and desk.queue.link is LinkState.UP:
        peer.set_index(TO_BACKEND, SLEEPING, 1)
        desk.read(rung, 0)
        ring.run(0)
        rung += 1
    ring.use_port(None)
    ring.close()
    peer.memory.close()
    port.close()
    if not blocked:
        assert os.eventfd_read(bells[1]) == rung
    for each in bells:
        os.close(each)
    return desk, rung


def test_a_backend_that_makes_its_doorbell_block_does_not_block_the_worker_and_is_cut_off() -> None:
    desk, rung = _ring_often(blocked=True)
    assert rung < RUNGS and "doorbell" in desk.queue.violation()


def test_each_doorbell_is_heard() -> None:
    desk, rung = _ring_often(blocked=False)
    assert rung == RUNGS and desk.queue.link is LinkState.UP


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def test_a_worker_with_rings_sleeps(rig: LoopRig) -> None:
    with rig.serve_on_rings() as peer:
        eventually(lambda: bool(peer.rings.index(TO_WORKER, SLEEPING)), "it says that it sleeps")
        begun_s, turns, cpu_s = time.monotonic(), rig.count("turns"), _cpu_s()
        time.sleep(0.5)
        turns, cpu_s = rig.count("turns") - turns, _cpu_s() - cpu_s
        # The sleep may last longer, and the worker looks around twice a second.
        halves = (time.monotonic() - begun_s) / 0.5
        assert turns < 20 * halves and cpu_s < 0.4 * halves


def test_a_flood_of_stale_descriptors_cuts_the_backend_off(rig: LoopRig) -> None:
    with rig.serve_on_rings() as peer:
        stale = Descriptor(Kind.HELLO, device=DEVICE, epoch=0).pack()
        for _ in range(3 * peer.rings.entries):
            eventually(
                lambda: peer.rings.unread() < peer.rings.entries or bool(rig.count("violations")), "room"
            )
            peer.send(stale)
        said = rig.news()
        assert isinstance(said, messages.Cut) and "too many answers" in said.reason
