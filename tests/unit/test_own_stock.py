"""A worker whose queue has buffers of its own: without a broker, without ZeroMQ, and for good."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakes.worker_spec import queue_config, worker_spec
from ublkpool.bufpool.engine.native import NullStorage
from ublkpool.bufpool.pool.arena import Arena, arena_prefix
from ublkpool.bufpool.pool.lease import Owner
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.ublk import _native
from ublkpool.ublk.queue import Attention, BufferClass
from ublkpool.workers import messages
from ublkpool.workers.engine_inside import EngineSpec
from ublkpool.workers.own_stock import OwnStock
from ublkpool.workers.process import fork_child
from ublkpool.workers.queue_loop import QueueLoop, own_classes

DEVICE, DEPTH, QUEUES, EPOCH = 7, 8, 3, 2
COUNTS = (16, 4)
SIZES = (4096, 65536)


@pytest.fixture
def arena() -> Iterator[Arena]:
    geometry = Geometry.build(list(zip(SIZES, COUNTS, strict=True)))
    prefix = arena_prefix(f"test-own-{os.getpid()}", DEVICE)
    with Arena.create(prefix, geometry, queues=QUEUES, device_number=DEVICE, reserve=(1, 1)) as made:
        yield made
        made.unlink()


@pytest.fixture
def supervisor() -> Iterator[socket.socket]:
    """The worker's end of its socket to the supervisor."""
    ours, theirs = messages.pair()
    with ours, theirs:
        yield theirs


def _loop(arena: Arena, queue: int, directory: Path, supervisor: socket.socket) -> QueueLoop:
    config = queue_config(
        own_classes(arena, queue),
        queue=queue,
        depth=DEPTH,
        queues=QUEUES,
        epoch=EPOCH,
        max_io_bytes=SIZES[-1],
        place_in_backend=True,
    )
    engine = EngineSpec(NullStorage(), 1 << 20, read_only=False)
    spec = worker_spec(config, directory / f"q{queue}", engine=engine)
    descriptors = _native.ffi.new("struct uq_iod[]", DEPTH)
    # A file that takes no commands: none is sent in these tests.
    char_fd = os.open(os.devnull, os.O_RDWR)
    try:
        return QueueLoop(spec, char_fd, descriptors, arena, supervisor)
    finally:
        os.close(char_fd)


def _slots(classes: tuple[BufferClass, ...]) -> list[set[int]]:
    return [set(range(each.first_slot, each.first_slot + each.slot_count)) for each in classes]


def test_the_queues_share_every_buffer_among_themselves_and_none_twice(arena: Arena) -> None:
    parts = [_slots(own_classes(arena, queue)) for queue in range(QUEUES)]
    for size_class, each in enumerate(arena.geometry.classes):
        of_each = [part[size_class] for part in parts]
        assert sum(map(len, of_each)) == each.count
        assert set.union(*of_each) == set(each.slots)
        assert all(of_each), "no queue is without a buffer of a size"


def test_a_buffer_of_a_part_lies_where_it_lies_in_the_pool(arena: Arena) -> None:
    for queue in range(QUEUES):
        for each in own_classes(arena, queue):
            assert each.base_offset == arena.geometry.slot_offset(each.first_slot)


def test_a_queue_has_its_part_from_the_start_and_the_headers_name_it(
    arena: Arena, tmp_path: Path, supervisor: socket.socket
) -> None:
    before = [arena.control.slot_header(slot).sequence for slot in range(arena.geometry.slot_count)]
    loop = _loop(arena, 1, tmp_path, supervisor)
    mine = set.union(*_slots(own_classes(arena, 1)))
    held = [slot for size_class in range(len(SIZES)) for slot in loop._queue.stock_held(size_class)]
    assert sorted(held) == sorted(mine)
    for slot, owner in enumerate(arena.control.slot_owners()):
        assert owner == (Owner(1, EPOCH) if slot in mine else None)
        assert arena.control.slot_header(slot).sequence == before[slot] + (slot in mine)
    loop.close()


def test_the_stock_asks_for_nothing_and_returns_nothing_however_long_it_is_idle(
    arena: Arena, tmp_path: Path, supervisor: socket.socket
) -> None:
    loop = _loop(arena, 0, tmp_path, supervisor)
    for now_ms in range(1_000, 10_000, 500):
        loop._queue.tick(now_ms)
        assert not loop._queue.attention() & Attention.STOCK
        assert not list(loop._queue.stock_wants())
    loop.close()


def test_such_a_worker_makes_no_zeromq_context_and_has_one_thread(
    arena: Arena, tmp_path: Path, supervisor: socket.socket
) -> None:
    reader, writer = os.pipe()

    def count_threads() -> int:
        loop = _loop(arena, 0, tmp_path, supervisor)
        os.write(writer, b"%d" % len(list(Path("/proc/self/task").iterdir())))
        return 0 if loop._context is None and isinstance(loop._pool, OwnStock) else 1

    pid = fork_child(
        count_threads, [writer, arena.data_fd, arena.control_fd, supervisor.fileno()], "own-stock"
    )
    os.close(writer)
    assert os.read(reader, 16) == b"1"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(reader)
