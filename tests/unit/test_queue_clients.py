"""Requests with data in the client area: nothing is copied, and the address from the driver is checked."""

import errno

import pytest

from support.fakes.driver import IOD_SHMEM_ZC, SECTOR_BYTES, Holder, Request
from support.fakes.liar import Lie, Scene
from support.fakes.queue_desk import Desk, data
from support.fakes.queue_rig import SEGMENT_SLICE, SLICE
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op
from ublkpool.ublk.queue import LinkState
from ublkpool.workers.tag_state import State

AREA_BYTES = 64 * 1024
AT = 12 * 1024
PLANS = [
    {},
    {"need_get_data": False},
    {"place_in_backend": True},
    {"place_in_backend": True, "posts": True, "reads_own": True},
]


def desk_of(plan: dict[str, int] | None = None, connected: bool = True) -> Desk:
    return Desk(0, connected, slice_bytes=AREA_BYTES, **(plan or {}))


def in_place(desk: Desk, op: Op, sector: int, payload: bytes, at: int = AT) -> Request:
    """A client's request with its buffer in the area."""
    request = Request(op, sector, len(payload) // SECTOR_BYTES, payload if op == Op.WRITE else b"")
    request.client_buffer = at
    if op == Op.WRITE:
        desk.rig.areas[SEGMENT_SLICE].view[at : at + len(payload)] = payload
    return request


def write(desk: Desk, tag: int, sector: int, payload: bytes, at: int = AT) -> Request:
    request = in_place(desk, Op.WRITE, sector, payload, at)
    desk.driver.deliver(tag, request)
    if desk.rig.plan.need_get_data:
        desk.copy(tag)
    return request


def read(desk: Desk, tag: int, sector: int, sectors: int, at: int = AT) -> Request:
    request = in_place(desk, Op.READ, sector, bytes(sectors * SECTOR_BYTES), at)
    desk.driver.deliver(tag, request)
    return request


@pytest.mark.parametrize("plan", PLANS)
def test_a_write_is_stored_from_the_clients_buffer(plan: dict[str, int]) -> None:
    desk = desk_of(plan)
    request = write(desk, 0, 8, data(1, 4))
    (asked,) = desk.send()
    assert (asked.kind, asked.segment, asked.buffer) == (Kind.REQUEST, SEGMENT_SLICE, AT)
    desk.serve(0)
    assert request.result == len(request.data)
    assert desk.store.read(8 * SECTOR_BYTES, 4 * SECTOR_BYTES) == request.data
    statistics = desk.side.statistics
    assert (statistics.zero_copies, statistics.zero_copy_bytes) == (1, len(request.data))
    assert (statistics.kernel_write_bytes, statistics.own_copy_bytes) == (0, 0)
    assert statistics.bytes[Op.WRITE] == len(request.data)
    assert desk.state(0) is State.KERNEL and desk.driver.copied_bytes == 0


@pytest.mark.parametrize("plan", PLANS)
def test_a_read_is_filled_into_the_clients_buffer(plan: dict[str, int]) -> None:
    desk = desk_of(plan)
    desk.store.write(0, data(7, 4))
    request = read(desk, 0, 0, 4)
    (asked,) = desk.send()
    assert (asked.kind, asked.segment, asked.buffer) == (Kind.REQUEST, SEGMENT_SLICE, AT)
    desk.serve(0)
    assert bytes(request.received) == data(7, 4)
    assert (desk.side.statistics.zero_copies, desk.side.statistics.kernel_read_bytes) == (1, 0)


def test_the_tag_s_next_request_is_copied_again() -> None:
    desk = desk_of()
    write(desk, 0, 0, data(1, 4))
    desk.serve(0)
    desk.write(0, 0, data(2, 4))
    desk.copy(0)
    desk.serve(0)
    assert desk.store.read(0, 4 * SECTOR_BYTES) == data(2, 4)
    assert (desk.side.statistics.zero_copies, desk.side.statistics.kernel_write_bytes) == (
        1,
        4 * SECTOR_BYTES,
    )


@pytest.mark.parametrize("plan", PLANS)
def test_a_dead_backend_s_requests_go_to_the_next_one_from_the_same_place(plan: dict[str, int]) -> None:
    desk = desk_of(plan)
    written, wanted = write(desk, 0, 8, data(1, 4)), read(desk, 1, 0, 4, 0)
    desk.send()
    desk.kill()
    successor = desk.connect()
    assert {each.buffer for each in successor.given.values()} == {AT, 0}
    assert all(each.flags & Flag.REPLAY for each in successor.given.values())
    desk.serve(0)
    desk.serve(1)
    assert written.result == len(written.data) and wanted.result == 4 * SECTOR_BYTES
    assert (desk.side.statistics.rescues, desk.side.statistics.own_copy_bytes) == (0, 0)


def test_without_a_backend_it_waits_and_takes_no_buffer() -> None:
    desk = desk_of(connected=False)
    write(desk, 0, 8, data(1))
    read(desk, 1, 0, 4, 0)
    assert [desk.state(0), desk.state(1)] == [State.WAIT_LINK, State.WAIT_LINK]
    assert desk.side.statistics.buffers_lent == 0
    desk.connect()
    desk.serve(0)
    desk.serve(1)
    assert desk.side.statistics.zero_copies == 2


def test_a_request_in_the_client_area_fails_at_give_up_like_any_other() -> None:
    desk = desk_of(connected=False)
    desk.queue.give_up()
    request = in_place(desk, Op.WRITE, 0, data(1))
    desk.driver.deliver(0, request)
    desk.copy(0)
    desk.driver.consume()
    assert request.result == -errno.EIO


@pytest.mark.parametrize(
    ("index", "at", "length"),
    [
        (SLICE + 1, 0, 4096),
        (SLICE | 1 << 16, 0, 4096),
        (16, 0, 4096),
        (SLICE, AREA_BYTES, 4096),
        (SLICE, AREA_BYTES - 512, 1024),
        (SLICE, 0xFFFFF000, 16384),
        (SLICE, 511, 512),
    ],
)
@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_an_address_outside_the_client_area_is_never_passed_on(
    op: Op, index: int, at: int, length: int
) -> None:
    desk = desk_of()
    request = Request(op, 0, length // SECTOR_BYTES, bytes(length) if op == Op.WRITE else b"")
    desk.driver.requests[0] = request
    desk.side.describe(0, op, IOD_SHMEM_ZC, 0, length // SECTOR_BYTES, index << 32 | at)
    desk.driver.holders[0] = Holder.ASKED if op == Op.WRITE else Holder.SERVER
    desk.queue.complete(0, 1 if op == Op.WRITE else 0)
    if op == Op.WRITE:
        desk.driver.consume()
        desk.queue.complete(0, 0)
        desk.driver.holders[0] = Holder.SERVER
    desk.driver.consume()
    assert request.result == -errno.EINVAL
    assert desk.send() == []
    assert (desk.side.statistics.unsupported, desk.side.statistics.zero_copies) == (1, 0)


def test_without_a_client_area_every_address_is_refused() -> None:
    desk = Desk()
    desk.side.describe(0, Op.READ, IOD_SHMEM_ZC, 0, 8, SLICE << 32)
    desk.driver.requests[0] = request = Request(Op.READ, 0, 8)
    desk.driver.holders[0] = Holder.SERVER
    desk.queue.complete(0, 0)
    desk.driver.consume()
    assert request.result == -errno.EINVAL


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_a_request_in_place_that_is_done_in_part_fails(op: Op) -> None:
    desk = desk_of()
    request = write(desk, 0, 0, data(1, 4)) if op == Op.WRITE else read(desk, 0, 0, 4)
    desk.send()
    assert desk.backend is not None and desk.backend.execute((0, 0), 2)
    desk.queue.input(desk.backend.answer((0, 0)))
    desk.driver.consume()
    assert request.result == -errno.EIO


def test_a_read_in_place_is_not_answered_with_a_region() -> None:
    desk = desk_of({"place_in_backend": True, "reads_own": True})
    read(desk, 0, 0, 4)
    desk.send()
    desk.lie(0, _in_a_region)
    assert desk.queue.link is LinkState.CUT
    assert desk.queue.violation().startswith("a read answered without a buffer, or with a region")


def _in_a_region(scene: Scene) -> bytes:
    asked: Descriptor = scene.request
    return asked.answer(Kind.DONE, asked.length)._replace(flags=Flag.REGION, segment=2, buffer=0).pack()


_: Lie = _in_a_region
