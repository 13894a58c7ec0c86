"""An end that reads an impossible ring index stops using the ring for good, in both directions, at both ends."""

from collections.abc import Iterator

import pytest

from support.fakes.links import sealed_memory
from support.fakes.queue_desk import Desk
from support.fakes.ring_peer import CONTROL_BYTES, ENTRY_BYTES, HEAD, TAIL, TO_BACKEND, TO_WORKER, RingMemory
from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.ublk.queue import LinkState, Port

ENTRIES = 64
EPROTO = -71
DEPTH = 4
BEYOND = (1, 65, 200, 2**31, -65, -200)
"""Heads that no consumer may store after 64 entries were written, relative to their end."""
TAILS = (-1, 65, 200, 2**31, -200)
"""Tails that no producer may store while no entry waits, relative to the head."""


class BackendEnd:
    """The backend's C end of a queue's rings, and the worker's end in Python over the same memory."""

    def __init__(self) -> None:
        file = sealed_memory(int(lib.ports_memory_bytes(ENTRIES)))
        self.worker = RingMemory(file, ENTRIES)
        for ring in (TO_BACKEND, TO_WORKER):
            for name in (TAIL, HEAD):
                self.worker.set_index(ring, name, -ENTRIES)
        self._memory = ffi.from_buffer("uint8_t[]", self.worker.memory)
        self.ports = ffi.gc(lib.ports_new(1, 1, 4096), lib.ports_free)
        lib.ports_open(self.ports, 0, self._memory, ENTRIES, -1, -1)

    def write(self, count: int) -> int:
        bell = ffi.new("int *")
        return int(lib.ports_write(self.ports, 0, bytes(count * ENTRY_BYTES), count, bell))

    def take(self) -> int:
        return int(lib.ports_take(self.ports, 0, ffi.new("uint8_t[]", 4096 * ENTRY_BYTES), 4096))


@pytest.fixture
def backend() -> BackendEnd:
    return BackendEnd()


@pytest.mark.parametrize("ahead", BEYOND)
def test_a_backend_that_has_read_an_impossible_head_never_writes_again(
    backend: BackendEnd, ahead: int
) -> None:
    assert backend.write(ENTRIES) == ENTRIES
    end = backend.worker.index(TO_WORKER, TAIL)
    before = bytes(backend.worker.memory[CONTROL_BYTES:])
    backend.worker.set_index(TO_WORKER, HEAD, end + ahead)
    for count in (200, 1, ENTRIES, 4096):
        assert backend.write(count) == EPROTO
    backend.worker.set_index(TO_WORKER, HEAD, end)
    assert backend.write(1) == EPROTO, "the head is possible again, and the ring is over all the same"
    assert backend.worker.index(TO_WORKER, TAIL) == end
    assert bytes(backend.worker.memory[CONTROL_BYTES:]) == before


def test_a_head_that_goes_back_is_impossible_too(backend: BackendEnd) -> None:
    begin = backend.worker.index(TO_WORKER, HEAD)
    assert backend.write(ENTRIES) == ENTRIES
    backend.worker.set_index(TO_WORKER, HEAD, begin + 8)
    assert backend.write(ENTRIES) == 8
    backend.worker.set_index(TO_WORKER, HEAD, begin + 7)
    assert backend.write(1) == EPROTO


@pytest.mark.parametrize("ahead", TAILS)
def test_a_backend_that_has_read_an_impossible_tail_never_reads_again(
    backend: BackendEnd, ahead: int
) -> None:
    head = backend.worker.index(TO_BACKEND, HEAD)
    backend.worker.set_index(TO_BACKEND, TAIL, head + ahead)
    queues, waiting, at = ffi.new("uint32_t[1]"), ffi.new("uint32_t *"), ffi.new("void **")
    for _ in range(2):
        assert backend.take() == EPROTO
        assert lib.ports_peek(backend.ports, 0, at) == EPROTO
        assert lib.ports_have_news(backend.ports), "it does not sleep over what it has to tell"
        assert not lib.ports_doze(backend.ports, True)
    backend.worker.set_index(TO_BACKEND, TAIL, head + 1)
    assert backend.take() == EPROTO, "the tail is possible again, and the ring is over all the same"
    assert lib.ports_poll(backend.ports, -1, 0, ffi.new("int32_t[1]"), 1, queues, waiting) < 0
    assert backend.worker.index(TO_BACKEND, HEAD) == head


class WorkerEnd:
    """The worker's C end, with a queue core, and the backend's end in Python."""

    def __init__(self) -> None:
        self.desk = Desk(need_get_data=False, place_in_backend=False, depth=DEPTH)
        self.port = Port(DEPTH)
        self.peer = RingMemory(self.port.memory_fd, self.port.entries)

    def turn(self) -> None:
        self.port.turn(self.desk.queue)

    def connect_again(self) -> None:
        """Attach the next backend, which wrongly keeps the rings of the one before."""
        self.desk.kill()
        self.desk.connect(fence=False)
        assert self.desk.queue.link is LinkState.UP


@pytest.fixture
def worker() -> Iterator[WorkerEnd]:
    made = WorkerEnd()
    yield made
    made.peer.memory.close()
    made.port.close()


@pytest.mark.parametrize("ahead", TAILS)
def test_a_worker_that_has_read_an_impossible_tail_never_reads_again(worker: WorkerEnd, ahead: int) -> None:
    head = worker.peer.index(TO_WORKER, HEAD)
    for tail in (head + ahead, head + 1):
        worker.peer.set_index(TO_WORKER, TAIL, tail)
        read = worker.desk.side.statistics.descriptors_in
        worker.turn()
        assert (
            worker.desk.queue.link is LinkState.CUT and "index in its ring" in worker.desk.queue.violation()
        )
        assert worker.desk.side.statistics.descriptors_in == read
        assert worker.peer.index(TO_WORKER, HEAD) == head
        worker.connect_again()


@pytest.mark.parametrize("ahead", BEYOND)
def test_a_worker_that_has_read_an_impossible_head_never_writes_again(worker: WorkerEnd, ahead: int) -> None:
    desk, peer = worker.desk, worker.peer
    assert desk.backend is not None
    for _ in range(peer.entries):
        desk.read(0, 0)
        worker.turn()
        desk.backend.receive(0, peer.take(tell=False))
        assert desk.backend.execute((0, 0))
        peer.put(desk.backend.answer((0, 0)))
        worker.turn()
        desk.driver.consume()
    tail = peer.index(TO_BACKEND, TAIL)
    before = bytes(peer.memory[CONTROL_BYTES : CONTROL_BYTES + peer.entries * ENTRY_BYTES])
    for tag, head in enumerate((tail + ahead, tail)):
        peer.set_index(TO_BACKEND, HEAD, head)
        desk.read(tag, 0)
        worker.turn()
        assert desk.queue.link is LinkState.CUT and "index in its ring" in desk.queue.violation()
        assert peer.index(TO_BACKEND, TAIL) == tail
        assert bytes(peer.memory[CONTROL_BYTES : CONTROL_BYTES + peer.entries * ENTRY_BYTES]) == before
        worker.connect_again()
