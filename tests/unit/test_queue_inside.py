"""A native engine in the worker's own process, behind the queue core: no socket, no ring, no second process."""

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from support.fakes.driver import SECTOR_BYTES, FakeDriver, Holder, Request
from support.fakes.queue_rig import DEVICE, Plan, Rig, new_area
from ublkpool.bufpool.engine import _engine
from ublkpool.bufpool.wire import Descriptor, Kind, Op
from ublkpool.ublk import _native
from ublkpool.ublk.queue import Attention, LinkState
from ublkpool.ublk.statistics import read_statistics

SECTORS = 256
SIZE_BYTES = SECTORS * SECTOR_BYTES
OWN_SEGMENT = 9
QUEUE = 1
"""Not 0, the only queue that an engine inside knows."""


class Inside:
    """One queue of a device, with the engine `memory` behind it."""

    def __init__(
        self,
        engine_depth: int = Plan().depth,
        *,
        runs: bool = True,
        read_only: bool = False,
        need_get_data: bool = True,
    ) -> None:
        """`runs`: requests are run within a call, as in a worker; without it they travel as descriptors."""
        asks = need_get_data
        self.rig = Rig(Plan(queues=2, need_get_data=asks, place_in_backend=asks, reads_own=asks))
        self.side = self.rig.sides[QUEUE]
        self.queue, self.driver = self.side.queue, FakeDriver(self.side)
        self.own = new_area(OWN_SEGMENT, SIZE_BYTES)
        self.rig.areas[OWN_SEGMENT] = self.own
        plan = self.rig.plan
        self.engine = self._open(engine_depth, read_only)
        calls = int(_engine.ffi.cast("uintptr_t", _engine.lib.engine_calls()))
        self._calls = _native.ffi.cast("struct engine_calls *", calls)
        if runs:
            _native.lib.uq_inside_begin(self.queue.raw, self._calls, self._raw)
        self.queue.start()
        self.driver.consume()
        assert self.queue.expect(OWN_SEGMENT, self.own.base, SIZE_BYTES, need_get_data, False)
        self.queue.input(Descriptor(Kind.HELLO, device=DEVICE, queue=QUEUE, epoch=plan.epoch).pack())

    @property
    def _raw(self) -> Any:
        return _native.ffi.cast("struct engine *", self.engine)

    def _open(self, depth: int, read_only: bool) -> int:
        ffi, lib, plan = _engine.ffi, _engine.lib, self.rig.plan
        setup = ffi.new("struct engine_setup *")
        setup.device, setup.epoch, setup.queues, setup.depth = DEVICE, plan.epoch, 1, depth
        setup.read_only = read_only
        setup.size_bytes = setup.own_bytes = SIZE_BYTES
        setup.pool = ffi.cast("uint8_t *", self.rig.pool.address)
        setup.pool_bytes = self.rig.geometry.total_bytes
        setup.own, setup.own_segment = ffi.cast("uint8_t *", self.own.address), OWN_SEGMENT
        error = ffi.new("int *")
        opened = lib.engine_open(setup, lib.storage_memory_new(True), error)
        assert opened != ffi.NULL, error[0]
        return int(ffi.cast("uintptr_t", opened))

    def turn(self) -> None:
        """What the worker's loop does once."""
        if not _native.lib.uq_inside_is_idle(self.queue.raw):
            _native.lib.uq_inside_turn(self.queue.raw, self._calls, self._raw)
        self.driver.consume()

    def close(self) -> None:
        _engine.lib.engine_close(_engine.ffi.cast("struct engine *", self.engine))

    def is_quiet(self) -> bool:
        return bool(self.queue.attention() & Attention.QUIET)

    def write(self, tag: int, request: Request) -> None:
        """Deliver a write and take the command that names its memory."""
        self.driver.named[tag] = (OWN_SEGMENT, request.sector * SECTOR_BYTES)
        self.driver.deliver(tag, request)
        self.turn()
        assert self.driver.holders[tag] is Holder.COPYING


@pytest.fixture(params=[True, False], ids=["within a call", "by descriptors"])
def inside(request: pytest.FixtureRequest) -> Iterator[Inside]:
    made = Inside(runs=request.param)
    yield made
    made.close()


@pytest.fixture
def running() -> Iterator[Inside]:
    made = Inside()
    made.turn()
    yield made
    made.close()


def test_a_write_lands_where_the_block_stays_and_is_read_from_there(inside: Inside) -> None:
    inside.turn()
    assert inside.queue.link is LinkState.UP
    write = Request(Op.WRITE, 5, 2, b"\x17" * (2 * SECTOR_BYTES))
    inside.driver.named[0] = (OWN_SEGMENT, 5 * SECTOR_BYTES)
    inside.driver.deliver(0, write)
    inside.turn()
    assert inside.driver.holders[0] is Holder.COPYING
    assert inside.driver.addresses[0] == inside.own.address + 5 * SECTOR_BYTES, "the block's own place"
    inside.driver.copy(0)
    inside.turn()
    assert write.result == 2 * SECTOR_BYTES
    read = Request(Op.READ, 5, 2)
    inside.driver.deliver(1, read)
    inside.turn()
    assert (read.result, bytes(read.received)) == (2 * SECTOR_BYTES, write.data)
    inside.side.check()


def test_one_turn_serves_every_tag(inside: Inside) -> None:
    inside.turn()
    reads = [Request(Op.READ, tag, 1) for tag in range(inside.rig.plan.depth)]
    for tag, each in enumerate(reads):
        inside.driver.deliver(tag, each)
    inside.turn()
    assert [each.result for each in reads] == [SECTOR_BYTES] * len(reads)


def test_an_engine_that_refuses_cuts_the_link_and_the_request_waits() -> None:
    inside = Inside(engine_depth=1, runs=False)
    inside.turn()
    read = Request(Op.READ, 0, 1)
    inside.driver.deliver(1, read)
    inside.turn()
    assert inside.queue.link is LinkState.CUT
    assert inside.queue.violation().startswith("the engine in the worker")
    assert read.result is None
    inside.close()


def test_what_is_run_within_a_call_needs_neither_descriptor_nor_buffer_and_is_counted_as_any(
    running: Inside,
) -> None:
    before = read_statistics(running.side.block_bytes())
    write = Request(Op.WRITE, 4, 2, b"\x21" * (2 * SECTOR_BYTES))
    running.write(0, write)
    running.driver.copy(0)
    running.turn()
    read, zeroes, flush = Request(Op.READ, 4, 2), Request(Op.WRITE_ZEROES, 5, 1), Request(Op.FLUSH, 0, 0)
    for each in (read, zeroes, flush):
        running.driver.deliver(1, each)
        running.turn()
    assert [each.result for each in (write, read, zeroes, flush)] == [1024, 1024, 0, 0]
    assert bytes(running.own.view[4 * SECTOR_BYTES : 6 * SECTOR_BYTES]) == b"\x21" * SECTOR_BYTES + bytes(512)
    found = read_statistics(running.side.block_bytes())
    assert found.counters["descriptors_out"] == before.counters["descriptors_out"]
    assert found.counters["lent_total"] == 0
    assert [found.requests[op] for op in (Op.READ, Op.WRITE, Op.FLUSH, Op.WRITE_ZEROES)] == [1, 1, 1, 1]
    assert sum(found.latencies["backend"].counts) == 4
    running.side.check()


def test_a_write_that_overlaps_one_that_is_being_copied_waits_for_nothing(running: Inside) -> None:
    writes = [Request(Op.WRITE, 3, 1, bytes([tag]) * SECTOR_BYTES) for tag in (1, 2)]
    for tag, each in enumerate(writes):
        running.write(tag, each)
    running.driver.copy(1)
    running.driver.copy(0)
    running.turn()
    assert [each.result for each in writes] == [SECTOR_BYTES] * 2
    assert bytes(running.own.view[3 * SECTOR_BYTES : 4 * SECTOR_BYTES]) == writes[0].data


def test_a_write_that_was_copied_in_part_fails_and_one_that_was_sent_back_comes_again(
    running: Inside,
) -> None:
    short, back = (Request(Op.WRITE, at, 2, b"\x07" * (2 * SECTOR_BYTES)) for at in (0, 8))
    running.write(0, short)
    running.write(1, back)
    running.driver.copy(0, 1)
    running.driver.copy(1, 0)
    assert running.driver.again.popleft() is back
    running.write(1, back)
    running.driver.copy(1)
    running.turn()
    assert (short.result, back.result) == (-errno.EIO, 2 * SECTOR_BYTES)
    running.side.check()


def test_what_the_engine_refuses_fails_with_its_errno() -> None:
    inside = Inside(read_only=True)
    inside.turn()
    write, discard = Request(Op.WRITE, 0, 1, b"\x33" * SECTOR_BYTES), Request(Op.DISCARD, 0, 1)
    beyond = Request(Op.READ, SECTORS, 1)
    for tag, each in enumerate((write, discard, beyond)):
        inside.driver.deliver(tag, each)
    inside.turn()
    inside.driver.copy(0)
    inside.turn()
    assert (write.result, discard.result, beyond.result) == (-errno.EPERM, -errno.EPERM, -errno.EINVAL)
    assert bytes(inside.own.view) == bytes(SIZE_BYTES), "a refused write is copied to no block"
    inside.side.check()
    inside.close()


def test_a_held_queue_is_quiet_only_after_the_last_copy_into_the_engine_s_memory(running: Inside) -> None:
    write, late = (Request(Op.WRITE, at, 1, b"\x44" * SECTOR_BYTES) for at in (1, 2))
    running.write(0, write)
    running.queue.hold(True)
    assert not running.is_quiet()
    running.driver.named[1] = (OWN_SEGMENT, 2 * SECTOR_BYTES)
    running.driver.deliver(1, late)
    running.driver.copy(0)
    assert not running.is_quiet(), "its commit is not taken"
    running.turn()
    assert running.is_quiet()
    assert (write.result, running.driver.holders[1]) == (SECTOR_BYTES, Holder.ASKED)
    running.queue.hold(False)
    running.turn()
    running.driver.copy(1)
    running.turn()
    assert late.result == SECTOR_BYTES
    running.side.check()


def test_without_need_get_data_a_write_comes_with_its_data_in_a_buffer_of_the_pool() -> None:
    inside = Inside(need_get_data=False)
    inside.turn()
    write = Request(Op.WRITE, 6, 1, b"\x66" * SECTOR_BYTES)
    inside.driver.deliver(0, write)
    inside.turn()
    assert write.result == SECTOR_BYTES
    assert bytes(inside.own.view[6 * SECTOR_BYTES : 7 * SECTOR_BYTES]) == write.data
    inside.side.check()
    inside.close()
