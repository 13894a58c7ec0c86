"""When nothing is under way a queue sleeps until something comes; otherwise it looks at the clock now and then."""

import os
import threading

from support.fakes.queue_desk import Desk
from ublkpool.bufpool.wire import Kind
from ublkpool.ublk.queue import FOREVER_MS, WATCH_SHIFT, Attention, IoUring, LinkState

TICK_MS = 500
REGION_MS = 10
IDLE_S = 3 * TICK_MS / 1000


def _ticks(desk: Desk) -> bool:
    waits_ms = desk.queue.wait_ms(FOREVER_MS)
    assert waits_ms in (TICK_MS, FOREVER_MS)
    assert desk.queue.wait_ms(10) == 10
    return waits_ms == TICK_MS


def test_an_idle_queue_with_a_backend_looks_at_no_clock() -> None:
    desk = Desk(timeout_ms=1000, absent_ms=1000)
    assert desk.queue.link is LinkState.UP
    assert not _ticks(desk)


def test_a_queue_looks_at_the_clock_while_it_has_a_request() -> None:
    desk = Desk(timeout_ms=1000)
    request = desk.read(0, 0)
    assert _ticks(desk)
    desk.serve(0)
    assert request.result is not None
    assert not _ticks(desk)


def test_a_queue_looks_at_the_clock_while_it_awaits_a_hello() -> None:
    desk = Desk(connected=False)
    assert not _ticks(desk)
    desk.expect()
    assert _ticks(desk)


def test_a_queue_looks_at_the_clock_while_its_backend_may_be_absent_for_too_long() -> None:
    desk = Desk(connected=False, absent_ms=1000)
    assert _ticks(desk)
    desk.queue.tick(1)
    desk.queue.tick(1001)
    assert not _ticks(desk), "it has given up"
    desk.queue.set_deadlines(0, False, 2000)
    assert _ticks(desk), "a new deadline"
    desk.queue.hold(True)
    assert not _ticks(desk), "no deadline counts in a held queue"


def test_a_queue_looks_at_the_clock_while_its_own_flush_is_unanswered() -> None:
    desk = Desk(timeout_ms=1000)
    desk.queue.hold(True)
    assert not _ticks(desk)
    assert desk.queue.attention() & Attention.QUIET and desk.queue.flush()
    assert _ticks(desk)


def test_a_queue_looks_at_the_clock_until_its_idle_buffers_have_gone_back() -> None:
    desk = Desk(spare=4)
    size_class, each = 0, desk.queue.config.classes[0]
    idle_max = each.reserve + 3 * each.batch
    held = len(desk.queue.stock_held(size_class))
    assert held <= idle_max and not _ticks(desk)
    more = range(each.first_slot + held, each.first_slot + idle_max + 1)
    desk.queue.stock_add(size_class, list(more))
    assert _ticks(desk)
    now_ms = 0
    while not any(want < 0 for _, want in desk.queue.stock_wants()):
        now_ms += TICK_MS
        assert _ticks(desk) and now_ms < 10 * TICK_MS
        desk.queue.tick(now_ms)
    for index, want in desk.queue.stock_wants():
        desk.queue.stock_take(index, -want)
    assert not _ticks(desk)


def test_a_queue_wakes_soon_to_give_back_a_region_that_another_queue_may_wait_for() -> None:
    """The driver takes the commit in the call in which the worker falls asleep, so the region is free after it."""
    desk = Desk(reads_own=True)
    request = desk.read(0, 0)
    desk.send()
    assert desk.backend is not None and desk.backend.execute((0, 0))
    desk.queue.input(desk.backend.answer((0, 0)))
    assert desk.queue.wait_ms(FOREVER_MS) == REGION_MS and desk.queue.wait_ms(1) == 1
    desk.driver.consume()
    assert request.result is not None
    assert _ticks(desk), "the backend does not have the region yet"
    assert [each.kind for each in desk.send()] == [Kind.RELEASE]
    assert not _ticks(desk)


def test_an_idle_ring_is_woken_by_nothing_but_news() -> None:
    desk = Desk()
    desk.queue.clear(Attention.LINK)
    ring = IoUring(desk.queue, -1)
    event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        ring.watch(0, event)
        before = desk.side.statistics.enters
        bell = threading.Timer(IDLE_S, os.eventfd_write, (event, 1))
        bell.start()
        assert ring.run(FOREVER_MS) == 1 << WATCH_SHIFT
        bell.join()
        # One to sleep, one to harvest what came with it; a tick would have made three more.
        assert desk.side.statistics.enters - before <= 2
    finally:
        ring.close()
        os.close(event)
