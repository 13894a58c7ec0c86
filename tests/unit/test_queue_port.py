"""The worker's end of a queue's rings, against an end in Python that may publish wrong indexes."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from support.fakes.descriptors import open_descriptors
from support.fakes.queue_desk import Desk
from support.fakes.queue_rig import DEVICE
from support.fakes.ring_peer import CONTROL_BYTES, HEAD, SLEEPING, TAIL, TO_BACKEND, TO_WORKER, RingMemory
from ublkpool.bufpool.wire import Descriptor, Kind, Op, iter_frame
from ublkpool.ublk import calls
from ublkpool.ublk import queue as queue_module
from ublkpool.ublk.queue import LinkState, Port

DEPTH = 4


class Ends:
    """A queue core with its port, and the backend's end."""

    def __init__(self, places: bool = False) -> None:
        self.desk = Desk(need_get_data=places, place_in_backend=places, depth=DEPTH)
        self.port = Port(DEPTH)
        self.peer = RingMemory(self.port.memory_fd, self.port.entries)

    def turn(self) -> bool:
        return self.port.turn(self.desk.queue)

    def close(self) -> None:
        self.peer.memory.close()
        self.port.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def test_descriptors_pass_whole_and_in_order_over_many_wraps(ends: Ends) -> None:
    rng, desk, peer = random.Random(4), ends.desk, ends.peer
    free, served, given = list(range(DEPTH)), 0, 0
    assert desk.backend is not None
    while served < 40 * peer.entries:
        if free and rng.random() < 0.6:
            tag = free.pop(rng.randrange(len(free)))
            desk.read(tag, rng.randrange(64))
            given += 1
        ends.turn()
        if rng.random() < 0.5:
            frame = peer.take()
            for each in iter_frame(frame) if frame else ():
                assert (each.kind, each.op, each.length) == (Kind.REQUEST, Op.READ, 512)
                desk.backend.receive(0, each.pack())
                assert desk.backend.execute((0, each.tag))
                peer.put(desk.backend.answer((0, each.tag)))
                free.append(each.tag)
                served += 1
            ends.turn()
            desk.driver.consume()
            desk.side.check()
    # Between a commit and the worker's next turn a tag may be delivered again: none is lost, none comes twice.
    assert given - served == DEPTH - len(free)
    assert desk.queue.link is LinkState.UP and desk.side.statistics.violations == 0


def test_tests_start_just_below_the_32_bit_wrap(ends: Ends) -> None:
    assert ends.peer.index(TO_BACKEND, TAIL) == ends.peer.index(TO_WORKER, HEAD) == 2**32 - ends.peer.entries


def test_the_doorbell_is_due_once_for_each_sleep(ends: Ends) -> None:
    assert not ends.turn()
    ends.desk.read(0, 0)
    assert not ends.turn()
    ends.peer.set_index(TO_BACKEND, SLEEPING, 1)
    assert not ends.turn()
    ends.desk.read(1, 0)
    assert ends.turn()
    ends.desk.read(2, 0)
    assert not ends.turn()


@pytest.fixture
def placing() -> Iterator[Ends]:
    made = Ends(places=True)
    yield made
    made.close()


def _write_in_the_backend(ends: Ends) -> None:
    """Run a write up to, but not including, the turn that releases its region."""
    desk, peer = ends.desk, ends.peer
    assert desk.backend is not None
    desk.write(0, 0, b"1" * 512)
    ends.turn()
    desk.backend.receive(0, peer.take())
    peer.put(desk.backend.place((0, 0)) or b"")
    ends.turn()
    desk.copy(0)
    ends.turn()
    desk.backend.receive(0, peer.take())
    assert desk.backend.execute((0, 0))
    peer.put(desk.backend.answer((0, 0)))


def test_a_release_alone_wakes_only_a_backend_that_asked_for_it(placing: Ends) -> None:
    desk, peer = placing.desk, placing.peer
    for sleeping in (1, 2):
        _write_in_the_backend(placing)
        peer.set_index(TO_BACKEND, SLEEPING, sleeping)
        assert placing.turn() is (sleeping == 1)
        assert peer.kinds(TO_BACKEND) == [Kind.RELEASE]
        desk.driver.consume()
        assert peer.index(TO_BACKEND, SLEEPING) == (0 if sleeping == 1 else 2)
    # The next request wakes the backend, which finds both entries.
    desk.other(1, Op.FLUSH)
    assert placing.turn() and peer.index(TO_BACKEND, SLEEPING) == 0
    assert peer.kinds(TO_BACKEND)[-2:] == [Kind.RELEASE, Kind.REQUEST]


def test_a_release_with_other_entries_wakes(placing: Ends) -> None:
    _write_in_the_backend(placing)
    placing.peer.set_index(TO_BACKEND, SLEEPING, 2)
    placing.desk.other(1, Op.FLUSH)
    assert placing.turn() and placing.peer.kinds(TO_BACKEND) == [Kind.REQUEST, Kind.RELEASE]


def _fill(ends: Ends, leave: int) -> None:
    """Use all entries except `leave`, without telling the worker that they were read."""
    desk, peer = ends.desk, ends.peer
    assert desk.backend is not None
    for _ in range(peer.entries - leave):
        desk.read(0, 0)
        ends.turn()
        given = peer.take(tell=False)
        desk.backend.receive(0, given)
        assert desk.backend.execute((0, 0))
        peer.put(desk.backend.answer((0, 0)))
        ends.turn()
        desk.driver.consume()


def test_descriptors_that_find_the_ring_full_follow_in_order(ends: Ends) -> None:
    desk, peer = ends.desk, ends.peer
    _fill(ends, leave=2)
    for tag in range(DEPTH):
        desk.read(tag, tag)
    ends.turn()
    assert [each.tag for each in iter_frame(peer.take(tell=False))] == [0, 1]
    ends.turn()
    assert not peer.take()
    ends.turn()
    assert [each.tag for each in iter_frame(peer.take())] == [2, 3]
    assert desk.side.statistics.violations == 0


@pytest.mark.parametrize("ahead", [1, 2**31, -65])
def test_an_invalid_head_cuts_the_link(ends: Ends, ahead: int) -> None:
    desk, peer = ends.desk, ends.peer
    _fill(ends, leave=0)
    tail = peer.index(TO_BACKEND, TAIL)
    peer.set_index(TO_BACKEND, HEAD, tail + ahead)
    desk.read(0, 0)
    ends.turn()
    assert desk.queue.link is LinkState.CUT and "index in its ring" in desk.queue.violation()
    assert peer.index(TO_BACKEND, TAIL) == tail


@pytest.mark.parametrize("ahead", [-1, 2**31, 65])
def test_an_invalid_tail_cuts_the_link_and_nothing_is_read(ends: Ends, ahead: int) -> None:
    desk, peer = ends.desk, ends.peer
    desk.read(0, 0)
    ends.turn()
    read = desk.side.statistics.descriptors_in
    peer.set_index(TO_WORKER, TAIL, peer.index(TO_WORKER, HEAD) + ahead)
    ends.turn()
    assert desk.queue.link is LinkState.CUT and desk.side.statistics.descriptors_in == read
    desk.kill()
    desk.connect(fence=False)
    assert desk.queue.link.name == "UP"


LIES = 300


def _lie(ends: Ends, rng: random.Random) -> None:
    """Every change that a process with the memory can make: any word of the control page, any entry, at any time."""
    peer = ends.peer
    ring, name = rng.choice((TO_BACKEND, TO_WORKER)), rng.choice((TAIL, HEAD, SLEEPING))
    way = rng.randrange(6)
    if way == 0:
        by = rng.choice((-1, 1, -peer.entries, peer.entries, peer.entries + 1, 2**31))
        peer.set_index(ring, name, peer.index(ring, name) + by)
    elif way == 1:
        peer.set_index(ring, name, rng.getrandbits(32))
    elif way == 2:
        peer.set_index(ring, SLEEPING, rng.choice((0, 1, 2**32 - 1)))
    elif way == 3:
        at = rng.randrange(CONTROL_BYTES, peer.size_bytes - 64)
        peer.memory[at : at + 64] = rng.randbytes(64)
    elif way == 4:
        # Published, then overwritten before it was read.
        answer = rng.choice((Kind.DONE, Kind.PLACED, Kind.POST))
        peer.put(Descriptor(answer, device=DEVICE, epoch=1).pack())
        peer.set_index(TO_WORKER, TAIL, peer.index(TO_WORKER, TAIL) - 1)
    else:
        peer.put(rng.randbytes(64))


@pytest.mark.parametrize("seed", range(40))
def test_no_change_of_the_shared_memory_moves_the_workers_own_index(ends: Ends, seed: int) -> None:
    rng, desk, peer = random.Random(seed), ends.desk, ends.peer
    counted = desk.side.statistics
    free, written = list(range(DEPTH)), peer.index(TO_BACKEND, TAIL)
    for _ in range(LIES):
        if free:
            desk.read(free.pop(), rng.randrange(64))
        came, went = counted.descriptors_in, counted.descriptors_out
        _lie(ends, rng)
        was_cut = desk.queue.link is LinkState.CUT
        tail = peer.index(TO_BACKEND, TAIL)
        ends.turn()
        taken, sent = counted.descriptors_in - came, counted.descriptors_out - went
        assert taken <= peer.entries, "more than a ring holds in one turn"
        # The worker keeps its write index in its own memory and does not read the shared one.
        written = (written + sent) % 2**32
        assert peer.index(TO_BACKEND, TAIL) in (tail, written)
        if was_cut:
            assert (taken, sent) == (0, 0)
        desk.side.check()
    assert desk.queue.link is LinkState.CUT, "all of this was believed"
    assert counted.violations == 1
    desk.kill()
    desk.connect(fence=False)
    assert desk.queue.link.name == "UP"


def test_a_cut_link_is_neither_read_nor_written(ends: Ends) -> None:
    desk, peer = ends.desk, ends.peer
    peer.put(b"\xff" * 64)
    ends.turn()
    assert desk.queue.link is LinkState.CUT
    head = peer.index(TO_WORKER, HEAD)
    peer.put(b"\xff" * 64)
    desk.read(0, 0)
    assert not ends.turn()
    assert peer.index(TO_WORKER, HEAD) == head and not peer.take()


class WithoutMemory:
    """The C core with an allocator that fails for the end of a ring."""

    def __init__(self, lib: Any, null: Any) -> None:
        self._lib, self._null = lib, null

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: self._null) if name == "uq_port_new" else getattr(self._lib, name)


def test_an_allocation_failure_of_a_port_is_reported_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = open_descriptors()
    monkeypatch.setattr(queue_module, "lib", WithoutMemory(calls.lib, calls.ffi.NULL))
    with pytest.raises(MemoryError, match="no memory for a queue's rings of 64 entries"):
        Port(DEPTH)
    assert open_descriptors() == before
