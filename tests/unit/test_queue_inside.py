"""A native engine in the worker's own process, behind the queue core: no socket, no ring, no second process."""

from collections.abc import Iterator

import pytest

from support.fakes.driver import SECTOR_BYTES, FakeDriver, Holder, Request
from support.fakes.queue_rig import DEVICE, Plan, Rig, new_area
from ublkpool.bufpool.engine import _engine
from ublkpool.bufpool.wire import Descriptor, Kind, Op
from ublkpool.ublk import _native
from ublkpool.ublk.queue import LinkState

SECTORS = 256
SIZE_BYTES = SECTORS * SECTOR_BYTES
OWN_SEGMENT = 9
QUEUE = 1
"""Not 0, the only queue that an engine inside knows."""


class Inside:
    """One queue of a device, with the engine `memory` behind it."""

    def __init__(self, engine_depth: int = Plan().depth) -> None:
        self.rig = Rig(Plan(queues=2, place_in_backend=True, reads_own=True))
        self.side = self.rig.sides[QUEUE]
        self.queue, self.driver = self.side.queue, FakeDriver(self.side)
        self.own = new_area(OWN_SEGMENT, SIZE_BYTES)
        self.rig.areas[OWN_SEGMENT] = self.own
        plan = self.rig.plan
        self.engine = self._open(engine_depth)
        calls = int(_engine.ffi.cast("uintptr_t", _engine.lib.engine_calls()))
        self._calls = _native.ffi.cast("struct engine_calls *", calls)
        self.queue.start()
        self.driver.consume()
        assert self.queue.expect(OWN_SEGMENT, self.own.base, SIZE_BYTES, True, False)
        self.queue.input(Descriptor(Kind.HELLO, device=DEVICE, queue=QUEUE, epoch=plan.epoch).pack())

    def _open(self, depth: int) -> int:
        ffi, lib, plan = _engine.ffi, _engine.lib, self.rig.plan
        setup = ffi.new("struct engine_setup *")
        setup.device, setup.epoch, setup.queues, setup.depth = DEVICE, plan.epoch, 1, depth
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
        engine = _native.ffi.cast("struct engine *", self.engine)
        _native.lib.uq_inside_turn(self.queue.raw, self._calls, engine)
        self.driver.consume()

    def close(self) -> None:
        _engine.lib.engine_close(_engine.ffi.cast("struct engine *", self.engine))


@pytest.fixture
def inside() -> Iterator[Inside]:
    made = Inside()
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
    inside = Inside(engine_depth=1)
    inside.turn()
    read = Request(Op.READ, 0, 1)
    inside.driver.deliver(1, read)
    inside.turn()
    assert inside.queue.link is LinkState.CUT
    assert inside.queue.violation().startswith("the engine in the worker")
    assert read.result is None
    inside.close()
