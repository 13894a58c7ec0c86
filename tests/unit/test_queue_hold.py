"""A held queue in the core: requests wait, the backend finishes what it has and confirms a FLUSH of the queue's own."""

import errno

import pytest

from support.fakes.driver import SECTOR_BYTES
from support.fakes.queue_desk import OWN, Desk, data
from ublkpool.bufpool.wire import Descriptor, Kind, Op
from ublkpool.ublk.queue import Attention, LinkState
from ublkpool.workers.tag_state import State

HOUR_MS = 3_600_000


def is_quiet(desk: Desk) -> bool:
    return bool(desk.queue.attention() & Attention.QUIET)


def flush_of(desk: Desk) -> Descriptor:
    """The FLUSH of a held and quiet queue, as its backend gets it."""
    desk.queue.hold(True)
    assert is_quiet(desk) and desk.queue.flush()
    (sent,) = desk.send()
    assert (sent.kind, sent.op, sent.length, sent.flags) == (Kind.REQUEST, Op.FLUSH, 0, 0)
    return sent


def result_of(desk: Desk) -> int:
    assert desk.queue.attention() & Attention.FLUSHED
    desk.queue.clear(Attention.FLUSHED)
    return desk.queue.flush_result()


@pytest.mark.parametrize("plan", [{}, OWN, {"need_get_data": False}], ids=["pool", "own", "off"])
def test_what_arrives_while_a_queue_is_held_waits_and_then_goes_on(plan: dict[str, bool]) -> None:
    desk = Desk(**plan)
    desk.queue.hold(True)
    requests = [desk.write(2, 0, data(1)), desk.read(0, 8), desk.other(1, Op.FLUSH)]
    if not desk.rig.plan.place_in_backend and desk.rig.plan.need_get_data:
        desk.copy(2)
    desk.driver.consume()
    assert desk.send() == [] and is_quiet(desk)
    desk.queue.hold(False)
    desk.rig.settle(0)
    sent = desk.send()
    assert sorted(each.tag for each in sent) == [0, 1, 2] and not is_quiet(desk)
    if desk.rig.plan.place_in_backend:
        desk.place(2)
        desk.copy(2)
    for tag in (2, 0, 1):
        desk.serve(tag)
    assert [each.result for each in requests] == [SECTOR_BYTES, SECTOR_BYTES, 0]


def test_a_read_that_waits_holds_no_buffer() -> None:
    desk = Desk()
    desk.queue.hold(True)
    desk.read(0, 0)
    assert desk.side.statistics.buffers_lent == 0


def test_a_queue_is_quiet_once_its_backend_has_answered() -> None:
    desk = Desk()
    request = desk.read(0, 0)
    desk.queue.hold(True)
    assert not is_quiet(desk) and not desk.queue.flush()
    desk.serve(0)
    assert is_quiet(desk) and request.result == SECTOR_BYTES


def test_a_write_that_asked_for_a_place_is_finished_before_the_queue_is_quiet() -> None:
    """Its data would lie in the memory of the backend that leaves."""
    desk = Desk(**OWN)
    request = desk.write(0, 0, data(1))
    desk.send()
    desk.queue.hold(True)
    desk.place(0)
    assert not is_quiet(desk)
    desk.copy(0)
    assert not is_quiet(desk)
    desk.serve(0)
    desk.queue.attention()
    assert request.result == SECTOR_BYTES and is_quiet(desk)


def test_a_queue_without_a_backend_is_quiet_at_once_and_has_none_to_flush() -> None:
    desk = Desk(connected=False)
    desk.read(0, 0)
    desk.queue.hold(True)
    assert is_quiet(desk) and not desk.queue.flush()


def test_a_backend_that_dies_leaves_a_quiet_queue_and_its_requests_wait_for_the_next() -> None:
    desk = Desk()
    request = desk.read(0, 0)
    desk.send()
    desk.queue.hold(True)
    desk.kill()
    assert is_quiet(desk)
    desk.connect()
    assert desk.state(0) is State.WAIT_LINK and request.result is None
    desk.queue.hold(False)
    desk.serve(0)
    assert request.result == SECTOR_BYTES


def test_no_deadline_passes_for_what_waits_in_a_held_queue() -> None:
    desk = Desk(timeout_ms=1000, fail_on_timeout=True, absent_ms=1000)
    desk.queue.hold(True)
    waiting = [desk.read(0, 0), desk.write(1, 8, data(1))]
    desk.copy(1)
    desk.kill()
    for now_ms in (0, 5000, HOUR_MS):
        desk.queue.tick(now_ms)
    desk.driver.consume()
    assert not desk.queue.attention() & (Attention.SILENT | Attention.ABSENT)
    desk.queue.hold(False)
    desk.queue.tick(HOUR_MS + 900)
    desk.driver.consume()
    assert [each.result for each in waiting] == [None, None]
    desk.connect()
    desk.rig.settle(0)
    desk.serve(0)
    desk.serve(1)
    assert [each.result for each in waiting] == [SECTOR_BYTES] * 2


def test_deadlines_begin_anew_when_a_queue_is_held_no_more() -> None:
    desk = Desk(timeout_ms=1000, fail_on_timeout=True)
    desk.queue.hold(True)
    request = desk.read(0, 0)
    desk.kill()
    desk.queue.tick(HOUR_MS)
    desk.queue.hold(False)
    desk.queue.tick(HOUR_MS + 1000)
    desk.driver.consume()
    assert request.result == -errno.ETIMEDOUT


@pytest.mark.parametrize("fails", [False, True], ids=["wait", "fail"])
def test_a_write_that_gets_its_buffer_late_in_a_held_queue_is_not_late(fails: bool) -> None:
    desk = Desk(timeout_ms=1000, fail_on_timeout=fails)
    desk.queue.hold(True)
    writes = [desk.write(tag, 8 * tag, data(tag)) for tag in (0, 1)]
    assert desk.state(1) is State.WAIT_BUFFER
    desk.queue.tick(HOUR_MS)
    desk.rig.settle(0)
    assert desk.state(1) is State.COPYING
    desk.queue.tick(HOUR_MS + 500)
    desk.queue.hold(False)
    desk.queue.tick(HOUR_MS + 1400)
    assert not desk.queue.attention() & Attention.SILENT and desk.side.statistics.timeouts == 0
    for tag in (0, 1):
        desk.copy(tag)
        desk.serve(tag)
    assert [each.result for each in writes] == [SECTOR_BYTES] * 2


def test_a_copy_that_was_late_is_reported_anew_after_a_hold() -> None:
    desk = Desk(timeout_ms=1000)
    desk.write(0, 0, data(1))
    for now_ms, timeouts in ((1000, 1), (2900, 1), (3000, 2)):
        desk.queue.tick(now_ms)
        assert desk.state(0) is State.COPYING and desk.side.statistics.timeouts == timeouts
        if now_ms == 1000:
            desk.queue.hold(True)
            desk.queue.tick(2000)
            desk.queue.hold(False)


def test_a_copy_that_was_too_late_for_a_queue_fails_for_that_reason_after_a_hold() -> None:
    desk = Desk(timeout_ms=1000, fail_on_timeout=True)
    request = desk.write(0, 0, data(1))
    desk.queue.tick(1000)
    desk.queue.hold(True)
    desk.queue.hold(False)
    desk.copy(0)
    desk.driver.consume()
    assert request.result == -errno.ETIMEDOUT


def test_what_the_backend_has_keeps_its_deadline_in_a_held_queue() -> None:
    desk = Desk(timeout_ms=1000)
    desk.read(0, 0)
    desk.send()
    desk.queue.hold(True)
    desk.queue.tick(1200)
    assert desk.queue.attention() & Attention.SILENT


def test_requests_that_fail_for_an_absent_backend_wait_in_a_held_queue() -> None:
    desk = Desk(connected=False, absent_ms=1000)
    desk.queue.tick(0)
    desk.queue.tick(1000)
    desk.queue.hold(True)
    request = desk.read(0, 0)
    desk.queue.tick(HOUR_MS)
    desk.driver.consume()
    assert request.result is None
    desk.queue.hold(False)
    desk.queue.tick(HOUR_MS + 500)
    desk.driver.consume()
    assert request.result is None, "the absence begins anew"


@pytest.mark.parametrize("connected", [True, False])
def test_a_device_that_is_going_holds_nothing(connected: bool) -> None:
    desk = Desk()
    desk.queue.hold(True)
    request = desk.read(0, 0)
    if not connected:
        desk.kill()
    desk.queue.give_up()
    if connected:
        desk.serve(0)
    desk.driver.consume()
    assert request.result == (SECTOR_BYTES if connected else -errno.EIO)


@pytest.mark.parametrize("result", [0, -errno.EIO])
def test_a_flush_ends_with_the_backend_s_result(result: int) -> None:
    desk = Desk()
    flush = flush_of(desk)
    assert not desk.queue.flush(), "one at a time"
    desk.queue.input(flush._replace(kind=Kind.DONE, result=result).pack())
    assert result_of(desk) == result and desk.queue.link is LinkState.UP
    assert desk.side.statistics.commits == 0 and desk.queue.in_flight == 0


@pytest.mark.parametrize("result", [1, 512, -4096])
def test_a_result_that_a_flush_cannot_have_cuts_the_backend_off(result: int) -> None:
    desk = Desk()
    desk.queue.input(flush_of(desk)._replace(kind=Kind.DONE, result=result).pack())
    assert result_of(desk) == -errno.ENOTCONN and desk.queue.link is LinkState.CUT


def test_a_second_answer_to_a_flush_cuts_the_backend_off() -> None:
    desk = Desk()
    answer = flush_of(desk)._replace(kind=Kind.DONE, result=0).pack()
    desk.queue.input(answer)
    desk.queue.input(answer)
    assert desk.queue.link is LinkState.CUT


def test_a_flush_ends_when_its_backend_is_lost_and_the_next_backend_knows_nothing_of_it() -> None:
    desk = Desk()
    flush = flush_of(desk)
    desk.kill()
    assert result_of(desk) == -errno.ENOTCONN
    desk.connect()
    desk.queue.hold(False)
    request = desk.read(0, 0)
    desk.send()
    desk.queue.input(flush._replace(kind=Kind.DONE, result=0).pack())
    assert desk.queue.link is LinkState.UP and request.result is None, "a late answer is dropped"
    desk.serve(0)
    assert request.result == SECTOR_BYTES


@pytest.mark.parametrize("plan", [{}, OWN], ids=["pool", "own"])
def test_the_flush_s_tag_gets_its_request_only_after_the_flush(plan: dict[str, bool]) -> None:
    """A tag has one request at the backend; others pass."""
    desk = Desk(**plan)
    flush_of(desk)
    desk.queue.hold(False)
    first, other = desk.write(0, 0, data(1)), desk.read(1, 8)
    if not plan:
        desk.copy(0)
    desk.rig.settle(0)
    assert [each.tag for each in desk.send()] == [1]
    desk.serve(0)
    assert result_of(desk) == 0
    if plan:
        desk.place(0)
        desk.copy(0)
    desk.serve(0)
    desk.serve(1)
    assert (first.result, other.result) == (SECTOR_BYTES, SECTOR_BYTES)


@pytest.mark.parametrize("fails", [False, True])
def test_a_backend_that_does_not_answer_a_flush_is_late_like_with_any_request(fails: bool) -> None:
    desk = Desk(timeout_ms=1000, fail_on_timeout=fails)
    flush_of(desk)
    desk.queue.tick(999)
    assert not desk.queue.attention() & Attention.SILENT
    desk.queue.tick(1000)
    assert desk.queue.attention() & Attention.SILENT and desk.side.statistics.timeouts == 1
    assert desk.queue.link is (LinkState.CUT if fails else LinkState.UP)
    desk.queue.tick(9000)
    assert desk.side.statistics.timeouts == 1


def test_a_queue_that_is_held_again_is_quiet_again() -> None:
    desk = Desk()
    desk.queue.hold(True)
    assert is_quiet(desk)
    desk.queue.clear(Attention.QUIET)
    assert not is_quiet(desk), "said once"
    desk.queue.hold(True)
    assert is_quiet(desk), "a successor of the one who asked hears it, too"
    desk.queue.clear(Attention.QUIET)
    desk.queue.hold(False)
    desk.queue.hold(True)
    assert is_quiet(desk)
