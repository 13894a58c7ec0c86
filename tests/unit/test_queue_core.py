"""The life of a request in the queue core, one scenario each, with a fake driver and a fake backend."""

import errno

import pytest

from support.fakes.driver import IOD_FUA, IOD_NOUNMAP, SECTOR_BYTES, Holder, Request
from support.fakes.queue_desk import OWN, Desk, data, kinds
from ublkpool.bufpool.wire import Flag, Kind, Op
from ublkpool.ublk import _native
from ublkpool.ublk.queue import Attention
from ublkpool.workers.tag_state import State

FAR_SECTOR = (7 << 60) >> 9


def test_a_write_is_placed_copied_stored_and_committed_once() -> None:
    desk = Desk(**OWN)
    request = desk.write(0, 8, data(1, 4))
    assert desk.state(0) is State.PLACING and not desk.driver.consume()
    desk.place(0)
    assert desk.state(0) is State.COPYING
    desk.copy(0)
    assert desk.state(0) is State.SERVING
    desk.serve(0)
    assert request.result == len(request.data)
    assert desk.store.read(8 * SECTOR_BYTES, 4 * SECTOR_BYTES) == request.data
    assert (desk.side.statistics.own_copy_bytes, desk.side.statistics.commits) == (0, 1)


def test_without_placement_a_write_lands_in_a_pool_buffer_of_its_size() -> None:
    desk = Desk()
    desk.write(0, 0, data(1, 1))
    desk.write(1, 8, data(2, 16))
    desk.copy(0)
    desk.copy(1)
    small, large = desk.send()
    assert small.segment == large.segment == 1
    classes = desk.rig.geometry.classes
    assert small.buffer < classes[1].base_offset <= large.buffer


def test_without_need_get_data_the_data_is_there_at_once() -> None:
    desk = Desk(need_get_data=False)
    request = desk.write(2, 0, data(5))
    assert desk.state(2) is State.SERVING
    desk.serve(2)
    assert request.result == SECTOR_BYTES and desk.store.read(0, SECTOR_BYTES) == data(5)


@pytest.mark.parametrize("own", [False, True])
def test_a_read_is_copied_out_of_the_buffer_that_the_commit_names(own: bool) -> None:
    desk = Desk(reads_own=own)
    desk.store.write(3 * SECTOR_BYTES, data(9, 2))
    request = desk.read(1, 3, 2)
    desk.serve(1)
    assert request.received == data(9, 2)


def test_a_read_buffer_is_free_only_when_its_commit_was_consumed() -> None:
    desk = Desk(spare=0)
    first, second = desk.read(0, 0), desk.read(1, 1)
    desk.send()
    assert desk.backend is not None and desk.state(1) is State.WAIT_BUFFER
    desk.backend.execute((0, 0))
    desk.queue.input(desk.backend.answer((0, 0)))
    assert (desk.state(0), desk.state(1)) == (State.COMMITTING, State.WAIT_BUFFER)
    assert desk.queue.stock_take(0, 9) == []
    desk.driver.consume()
    assert first.result == SECTOR_BYTES
    desk.serve(1)
    assert second.result == SECTOR_BYTES


def test_a_region_that_a_read_named_is_released_only_when_the_commit_was_consumed() -> None:
    desk = Desk(**OWN)
    desk.read(0, 0)
    desk.send()
    assert desk.backend is not None
    desk.backend.execute((0, 0))
    desk.queue.input(desk.backend.answer((0, 0)))
    assert desk.send() == []
    desk.driver.consume()
    assert kinds(desk.send()) == [Kind.RELEASE]


def test_a_placed_writes_region_is_released_when_its_done_was_read() -> None:
    desk = Desk(**OWN)
    desk.write(0, 0, data(1))
    desk.place(0)
    region = desk.driver.named[0]
    desk.copy(0)
    desk.serve(0)
    (release,) = desk.send()
    assert (release.kind, release.segment, release.buffer) == (Kind.RELEASE, *region)
    desk.write(0, 0, data(2))
    assert kinds(desk.send()) == [Kind.PLACE], "and only once"


def test_a_write_that_was_copied_in_part_fails() -> None:
    desk = Desk()
    request = desk.write(0, 0, data(1, 4))
    desk.copy(0, 1)
    assert desk.send() == [], "no backend sees half a write"
    desk.driver.consume()
    assert request.result == -errno.EIO
    assert desk.side.statistics.short_copies == 1


def test_a_write_without_copied_data_begins_again() -> None:
    desk = Desk(**OWN)
    request = desk.write(0, 0, data(1))
    desk.place(0)
    desk.copy(0, 0)
    desk.driver.deliver(0, desk.driver.again.popleft())
    assert kinds(desk.send()) == [Kind.RELEASE, Kind.PLACE]
    desk.place(0)
    desk.copy(0)
    desk.serve(0)
    assert request.result == SECTOR_BYTES


@pytest.mark.parametrize("op", [Op.READ, Op.FLUSH])
def test_a_requeued_tag_may_carry_another_request(op: Op) -> None:
    desk = Desk()
    desk.write(0, 0, data(1))
    desk.copy(0, 0)
    other = desk.other(0, op, sectors=1 if op is Op.READ else 0)
    desk.serve(0)
    assert other.result == len(other.received)
    assert desk.store.read(0, SECTOR_BYTES) == bytes(SECTOR_BYTES)


def test_the_error_of_a_requeued_write_does_not_reach_the_tags_next_request() -> None:
    desk = Desk(**OWN)
    desk.write(0, 0, data(1))
    desk.send()
    assert desk.backend is not None
    desk.queue.input(desk.backend.reject((0, 0), -errno.ENOSPC))
    desk.copy(0, 0)
    other = desk.write(0, 1, data(2))
    desk.place(0)
    desk.copy(0)
    desk.serve(0)
    assert other.result == SECTOR_BYTES


def test_a_failed_write_that_waits_for_its_data_is_copied_into_scratch_first() -> None:
    desk = Desk(**OWN)
    request = desk.write(0, 0, data(7))
    desk.send()
    assert desk.backend is not None
    desk.queue.input(desk.backend.reject((0, 0), -errno.ENOSPC))
    assert desk.state(0) is State.FAILING and request.result is None
    desk.copy(0)
    desk.driver.consume()
    assert request.result == -errno.ENOSPC
    assert desk.side.scratch.view[:SECTOR_BYTES] == data(7)


@pytest.mark.parametrize("need_get_data", [False, True])
def test_an_unsupported_operation_is_answered_eopnotsupp(need_get_data: bool) -> None:
    desk = Desk(need_get_data=need_get_data)
    request = desk.other(0, 15)
    desk.driver.consume()
    assert request.result == -errno.EOPNOTSUPP
    assert desk.side.statistics.unsupported == 1


def test_fua_and_nounmap_pass_through() -> None:
    desk = Desk()
    desk.write(0, 0, data(1), IOD_FUA)
    desk.copy(0)
    desk.other(1, Op.WRITE_ZEROES, flags=IOD_NOUNMAP)
    desk.other(2, Op.WRITE_ZEROES)
    assert [each.flags for each in desk.send()] == [Flag.FUA, Flag.NOUNMAP, 0]


def test_an_offset_of_seven_exbibytes_arrives_whole() -> None:
    desk = Desk(first_sector=FAR_SECTOR)
    request = desk.write(0, FAR_SECTOR + 5, data(3))
    desk.copy(0)
    (given,) = desk.send()
    assert given.offset == (7 << 60) + 5 * SECTOR_BYTES
    desk.serve(0)
    assert request.result == SECTOR_BYTES


def test_a_discard_may_exceed_four_gibibytes() -> None:
    desk = Desk()
    desk.driver.deliver(0, Request(Op.DISCARD, 0, (1 << 32) - 1))
    (given,) = desk.send()
    assert given.length == ((1 << 32) - 1) * SECTOR_BYTES


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_a_result_of_zero_bytes_is_an_error_and_no_endless_loop(op: Op) -> None:
    desk = Desk(need_get_data=False)
    request = desk.read(0, 0) if op is Op.READ else desk.write(0, 0, data(1))
    desk.send()
    desk.lie(0, lambda scene: scene.done(0).pack())
    desk.driver.consume()
    assert request.result == -errno.EIO


def test_at_a_stop_every_tag_is_gone_and_every_buffer_returned() -> None:
    desk = Desk()
    copying, serving = desk.write(0, 0, data(1)), desk.read(1, 0)
    desk.driver.consume()
    assert desk.side.statistics.tags_gone == 0
    desk.driver.stop()
    assert copying.result == -errno.EIO and desk.driver.holders[1] is Holder.SERVER
    assert desk.side.statistics.tags_gone == len(desk.driver.holders) - 1
    desk.serve(1)
    assert serving.result == SECTOR_BYTES
    assert desk.queue.attention() & Attention.GONE and desk.queue.in_flight == 0
    assert desk.side.statistics.tags_gone == len(desk.driver.holders)
    desk.rig.give_all_back()
    assert [each.free for each in desk.rig.table.statistics().classes] == [3, 3]


def test_a_recall_is_served_before_waiting_requests_but_never_from_the_reserve() -> None:
    desk = Desk(spare=1)
    reads = [desk.read(0, 0)]
    desk.rig.settle(0)
    reads += [desk.read(tag, tag) for tag in (1, 2)]
    assert desk.state(2) is State.WAIT_BUFFER
    desk.queue.stock_recall(0, 9)
    desk.serve(0)
    assert desk.state(2) is State.WAIT_BUFFER and dict(desk.queue.stock_wants())[0] == -1
    assert len(desk.queue.stock_take(0, 1)) == 1
    for tag in (1, 2):
        desk.serve(tag)
    assert [each.result for each in reads] == [SECTOR_BYTES] * 3


def _is_awaited_at_the_answer(desk: Desk, tag: int) -> bool:
    """Whether the tag's commit is awaited before the kernel has taken it; checks that none is awaited afterwards."""
    desk.send()
    assert desk.backend is not None and desk.backend.execute((0, tag))
    desk.queue.input(desk.backend.answer((0, tag)))
    awaited = _native.lib.uq_commit_is_awaited(desk.queue.raw)
    desk.driver.consume()
    assert not _native.lib.uq_commit_is_awaited(desk.queue.raw)
    return bool(awaited)


def test_a_commit_is_awaited_while_a_buffer_is_wanted_here_or_elsewhere() -> None:
    """So the ring does not sleep in the call that returns the buffer."""
    desk = Desk(spare=1)
    for tag in range(3):
        desk.read(tag, tag)
    desk.rig.settle(0)
    assert desk.state(2) is State.WAIT_BUFFER
    assert _is_awaited_at_the_answer(desk, 0) and desk.state(2) is not State.WAIT_BUFFER
    assert not _is_awaited_at_the_answer(desk, 1)
    desk.queue.stock_recall(0, 1)
    assert _is_awaited_at_the_answer(desk, 2)


def test_a_commit_is_awaited_while_the_backend_may_wait_for_a_region() -> None:
    desk = Desk(reads_own=True)
    for tag in range(2):
        desk.read(tag, tag)
    assert _is_awaited_at_the_answer(desk, 0)
    assert kinds(desk.send()) == [Kind.RELEASE]
    assert not _is_awaited_at_the_answer(desk, 1), "no other request waits for a region"


def test_a_second_burst_has_every_buffer_that_is_free() -> None:
    """Two queues, six large buffers: one queue can hold five, and must not wait for a lease beyond that."""
    desk = Desk(queues=2, depth=16, spare=4)
    for burst in range(3):
        reads = [desk.read(tag, 16 * tag, 16) for tag in range(8)]
        desk.rig.settle(0)
        serving = [tag for tag in range(8) if desk.state(tag) is State.SERVING]
        assert len(serving) == 5, f"burst {burst}: {len(serving)} at once"
        waiting = set(range(8))
        while waiting:
            now = [tag for tag in waiting if desk.state(tag) is State.SERVING]
            assert now, "no request is served"
            for tag in now:
                desk.serve(tag)
            waiting.difference_update(now)
            desk.rig.settle(0)
        assert [each.result for each in reads] == [16 * SECTOR_BYTES] * 8
        assert len(desk.queue.stock_held(1)) == 5, "what one burst gives back the next one takes"
        for looks in (2, 3):
            desk.queue.tick((burst * 2 + looks) * 1000)
            desk.side.check()
            desk.rig.settle(0)
        assert len(desk.queue.stock_held(1)) < 5, "buffers that stay idle return to the broker"


def test_each_change_of_the_stock_is_noticed_at_once() -> None:
    """Attention covers only changed classes: a missed change would never be requested, or requested repeatedly."""
    desk = Desk(spare=3)
    queue, wants = desk.queue, []
    desk.rig.settle(0)
    slots = queue.stock_held(0)

    def looked() -> None:
        desk.side.check()
        wants.append(0 in dict(queue.stock_wants()))

    looked()
    queue.stock_take(0, len(slots))
    looked()
    queue.stock_asked(0, 1)
    looked()
    queue.stock_on_order(0, 0)
    looked()
    queue.stock_add(0, slots)
    looked()
    assert wants == [False, True, False, True, False]
