"""Deadlines in the queue core, one scenario each: silent or absent backends, and the requests that then fail."""

import errno

import pytest

from support.fakes.driver import SECTOR_BYTES
from support.fakes.queue_desk import Desk, data
from ublkpool.bufpool.wire import Op
from ublkpool.ublk.queue import Attention, LinkState
from ublkpool.workers.tag_state import State


@pytest.mark.parametrize("fails", [False, True])
def test_on_timeout_decides_whether_a_silent_backend_is_waited_for_or_cut_off(fails: bool) -> None:
    desk = Desk(timeout_ms=1000, fail_on_timeout=fails)
    request = desk.read(0, 0)
    desk.send()
    desk.queue.tick(999)
    assert not desk.queue.attention() & Attention.SILENT
    desk.queue.tick(1200)
    assert desk.queue.attention() & Attention.SILENT
    assert desk.queue.link is (LinkState.CUT if fails else LinkState.UP)
    desk.driver.consume()
    assert request.result is None
    if fails:
        desk.kill()
        desk.driver.consume()
        assert request.result == -errno.ETIMEDOUT


def test_on_timeout_fail_fails_a_request_that_waits_for_a_backend_past_its_deadline() -> None:
    desk = Desk(connected=False, timeout_ms=1000, fail_on_timeout=True)
    request = desk.read(0, 0)
    desk.queue.tick(5000)
    desk.driver.consume()
    assert request.result == -errno.ETIMEDOUT


def test_a_failing_waiter_leaves_the_others_in_order() -> None:
    desk = Desk(spare=0, timeout_ms=1000, fail_on_timeout=True)
    holder, first = desk.read(0, 0), desk.read(1, 1)
    desk.queue.tick(500)
    later = [desk.read(2, 2), desk.read(3, 3)]
    desk.queue.tick(1200)
    desk.kill()
    desk.driver.consume()
    assert (holder.result, first.result) == (-errno.ETIMEDOUT, -errno.ETIMEDOUT)
    desk.connect()
    desk.serve(2)
    desk.serve(3)
    assert [each.result for each in later] == [SECTOR_BYTES] * 2


def test_giving_up_fails_waiting_and_new_requests() -> None:
    desk = Desk(connected=False, place_in_backend=True)
    waiting, read = desk.write(0, 0, data(1)), desk.read(1, 0)
    desk.queue.give_up()
    later = desk.write(2, 8, data(2))
    desk.copy(0)
    desk.copy(2)
    desk.driver.consume()
    assert waiting.result == read.result == later.result == -errno.EIO


def test_after_absent_timeout_waiting_and_new_requests_fail_until_the_next_backend() -> None:
    desk = Desk(connected=False, place_in_backend=True, absent_ms=1000)
    desk.queue.tick(5000)
    waiting, read = desk.write(0, 0, data(1)), desk.read(1, 0)
    desk.queue.tick(5999)
    assert desk.state(0) is State.WAIT_PLACE and not desk.queue.attention() & Attention.ABSENT
    desk.queue.tick(6000)
    assert desk.queue.attention() & Attention.ABSENT
    later = desk.write(2, 8, data(2))
    desk.copy(0)
    desk.copy(2)
    desk.driver.consume()
    assert waiting.result == read.result == later.result == -errno.EIO
    desk.queue.clear(Attention.ABSENT)
    desk.queue.tick(9000)
    assert not desk.queue.attention() & Attention.ABSENT, "said once"
    desk.connect()
    after = desk.read(1, 0)
    desk.serve(1)
    assert after.result == SECTOR_BYTES


def test_every_absence_has_its_full_timeout() -> None:
    desk = Desk(absent_ms=1000)
    desk.queue.tick(5000)
    request = desk.read(0, 0)
    desk.kill()
    desk.queue.tick(5400)
    desk.connect()
    desk.kill()
    desk.queue.tick(6399)
    desk.queue.tick(7398)
    assert desk.state(0) is State.WAIT_LINK
    desk.queue.tick(7399)
    desk.driver.consume()
    assert request.result == -errno.EIO


def test_a_backend_that_was_cut_off_is_absent_but_keeps_its_buffers_until_its_death() -> None:
    desk = Desk(absent_ms=1000)
    held = desk.read(0, 0)
    desk.send()
    desk.queue.cut()
    desk.queue.tick(1)
    desk.queue.tick(1001)
    assert desk.queue.attention() & Attention.ABSENT and desk.state(0) is State.SERVING
    desk.kill()
    desk.driver.consume()
    assert held.result == -errno.EIO


@pytest.mark.parametrize("fence", [False, True])
def test_a_backend_that_is_expected_is_not_absent(fence: bool) -> None:
    desk = Desk(connected=False, absent_ms=1000)
    backend = desk.expect(fence)
    request = desk.read(0, 0)
    for now_ms in (1, 5000, 9000):
        desk.queue.tick(now_ms)
    desk.queue.input(backend.hello(0))
    desk.queue.tick(20000)
    assert request.result is None and not desk.queue.attention() & Attention.ABSENT


def test_giving_up_lets_a_living_backend_finish() -> None:
    desk = Desk()
    request = desk.read(0, 0)
    desk.queue.give_up()
    desk.serve(0)
    assert request.result == SECTOR_BYTES


def test_a_shorter_timeout_holds_for_a_request_that_waits() -> None:
    desk = Desk(connected=False, timeout_ms=60_000)
    request = desk.read(0, 0)
    desk.queue.tick(2000)
    desk.queue.set_deadlines(1000, True, 0)
    desk.queue.tick(2200)
    desk.driver.consume()
    assert request.result == -errno.ETIMEDOUT


def test_a_request_that_is_late_no_more_is_reported_again_when_the_new_timeout_has_passed() -> None:
    desk = Desk(timeout_ms=1000)
    desk.read(0, 0)
    desk.send()
    desk.queue.tick(1200)
    desk.queue.clear(Attention.SILENT)
    desk.queue.set_deadlines(5000, False, 0)
    desk.queue.tick(4900)
    assert not desk.queue.attention() & Attention.SILENT
    desk.queue.tick(5000)
    assert desk.queue.attention() & Attention.SILENT and desk.side.statistics.timeouts == 2


def test_a_request_that_stays_late_is_reported_once() -> None:
    desk = Desk(timeout_ms=1000)
    desk.read(0, 0)
    desk.send()
    desk.queue.tick(1200)
    desk.queue.clear(Attention.SILENT)
    desk.queue.set_deadlines(1100, False, 0)
    desk.queue.tick(1400)
    assert not desk.queue.attention() & Attention.SILENT and desk.side.statistics.timeouts == 1


def absent_desk() -> Desk:
    """A queue whose requests fail because its backend has been absent for a second."""
    desk = Desk(connected=False, absent_ms=1000)
    desk.queue.tick(0)
    desk.queue.tick(1000)
    desk.queue.clear(Attention.ABSENT)
    failed = desk.read(0, 0)
    desk.driver.consume()
    assert failed.result == -errno.EIO
    return desk


def test_requests_wait_again_when_absence_is_no_reason_to_fail_any_more() -> None:
    desk = absent_desk()
    desk.queue.set_deadlines(0, False, 0)
    desk.queue.tick(9000)
    request = desk.read(1, 0)
    desk.driver.consume()
    assert request.result is None and desk.state(1) is State.WAIT_LINK


@pytest.mark.parametrize(("absent_ms", "at_ms"), [(500, 1000), (3000, 3000)])
def test_an_absence_is_judged_anew_by_the_new_deadline(absent_ms: int, at_ms: int) -> None:
    desk = absent_desk()
    desk.queue.set_deadlines(0, False, absent_ms)
    request = desk.read(1, 0)
    desk.queue.tick(at_ms - 1)
    desk.driver.consume()
    assert request.result == (None if at_ms > 1000 else -errno.EIO)
    desk.queue.tick(at_ms)
    assert desk.queue.attention() & Attention.ABSENT
    desk.driver.consume()
    assert request.result == -errno.EIO


def test_new_deadlines_do_not_bring_back_a_device_that_is_going() -> None:
    desk = absent_desk()
    desk.queue.give_up()
    desk.queue.set_deadlines(0, False, 0)
    request = desk.read(1, 0)
    desk.driver.consume()
    assert request.result == -errno.EIO


def test_the_age_of_the_oldest_request_is_noted_and_failures_are_counted_by_operation() -> None:
    desk = Desk(timeout_ms=100_000, fail_on_timeout=True)
    statistics = desk.side.statistics
    desk.queue.tick(1000)
    first = desk.read(0, 0)
    desk.queue.tick(1500)
    desk.read(1, 8)
    desk.queue.tick(3000)
    assert statistics.oldest_ms == 2000
    desk.serve(0)
    desk.driver.consume()
    assert first.result == SECTOR_BYTES
    desk.queue.tick(4000)
    assert statistics.oldest_ms == 2500
    assert not any(statistics.failed)
    desk.send()
    desk.queue.tick(200_000)
    desk.kill()
    desk.driver.consume()
    assert list(statistics.failed) == [int(op == Op.READ) for op in range(len(statistics.failed))]
    assert statistics.errors == 1
