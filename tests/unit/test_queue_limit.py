"""A device's limits in the queue core: I/Os and bytes a second with a burst, shared by the queues, on a fake clock."""

import errno
from collections.abc import Callable

import pytest

from support.fakes.driver import SECTOR_BYTES, FakeDriver, Request
from support.fakes.queue_desk import OWN, Desk, data
from support.fakes.queue_rig import Plan, Rig
from ublkpool.bufpool.wire import Op
from ublkpool.ublk.queue import Attention
from ublkpool.workers.tag_state import State

S, MS = 10**9, 10**6
ABSURD = 2**62
"""A word of the shared memory that is ahead of every clock."""
BATCH_NS = 4 * MS


class Crowd:
    """Queues without a backend that always have as many requests as they have tags, under one device's limits."""

    def __init__(self, queues: int = 1, depth: int = 16, sectors: int = 1, **limits: int) -> None:
        self.rig = Rig(Plan(queues=queues, depth=depth, answers_itself=True))
        self.rig.limit(**limits)
        self.drivers = [FakeDriver(side) for side in self.rig.sides]
        self.sectors = sectors
        self.now_ns = 100 * S
        self.passed = [0] * queues
        for driver in self.drivers:
            driver.side.queue.start()
            driver.consume()
            driver.side.queue.limit_tick(self.now_ns)

    def fill(self, queue: int) -> None:
        """Deliver a read on every idle tag, and have the driver take the answers, until all tags wait."""
        driver = self.drivers[queue]
        for _ in range(100_000):
            idle = [tag for tag, at in enumerate(driver.requests) if at is None]
            if not idle:
                return
            for tag in idle:
                driver.deliver(tag, Request(Op.READ, 0, self.sectors))
            driver.consume()
            self.passed[queue] += len(driver.finished)
            driver.finished.clear()
        raise AssertionError("the limits let everything pass")

    def wake(self, queue: int) -> None:
        self.drivers[queue].side.queue.limit_tick(self.now_ns)
        self.drivers[queue].consume()
        self.fill(queue)

    def run(self, for_ns: int, queues: list[int], late_ns: int = 0) -> list[int]:
        """Serve these queues, each worker awake when the core says so and `late_ns` later; what each let through."""
        end_ns = self.now_ns + for_ns
        before = list(self.passed)
        for queue in queues:
            self.wake(queue)
        while self.now_ns < end_ns:
            waits = [self.drivers[each].side.queue.limit_wait_ms(500) for each in queues]
            self.now_ns += max(1, min(waits)) * MS + late_ns
            for queue in queues:
                self.wake(queue)
        return [now - was for now, was in zip(self.passed, before, strict=True)]


def waiter(**plan: int) -> Desk:
    """A desk whose device lets one I/O a second through; the burst has been used up."""
    desk = Desk(connected=True, **plan)
    desk.rig.limit(iops=1)
    desk.queue.limit_tick(S)
    desk.read(3, 40)
    desk.serve(3)
    desk.send()
    return desk


@pytest.mark.parametrize("late_ns", [0, 3 * MS])
@pytest.mark.parametrize(("iops", "depth"), [(7, 1), (100, 4), (5000, 64)])
def test_over_a_long_time_exactly_the_limit_passes(iops: int, depth: int, late_ns: int) -> None:
    crowd = Crowd(depth=depth, iops=iops, burst_ns=100 * MS)
    crowd.run(S, [0], late_ns)
    started_ns = crowd.now_ns
    (passed,) = crowd.run(20 * S if iops < 1000 else 2 * S, [0], late_ns)
    expected = iops * (crowd.now_ns - started_ns) / S
    assert abs(passed - expected) <= 1 + iops * BATCH_NS / S


@pytest.mark.parametrize("sectors", [1, 8, 32])
def test_bytes_are_limited_whatever_the_size_of_requests(sectors: int) -> None:
    rate = 1_000_000
    crowd = Crowd(depth=64, sectors=sectors, bytes_per_s=rate, burst_ns=50 * MS)
    crowd.run(S, [0])
    started_ns = crowd.now_ns
    moved = crowd.run(4 * S, [0])[0] * sectors * SECTOR_BYTES
    assert abs(moved - rate * (crowd.now_ns - started_ns) / S) <= sectors * SECTOR_BYTES + rate * BATCH_NS / S


def test_the_tighter_of_both_limits_holds() -> None:
    both = {"iops": 1000, "bytes_per_s": 100 * SECTOR_BYTES, "burst_ns": 10 * MS}
    crowd = Crowd(**both)
    assert crowd.run(10 * S, [0])[0] <= 1002 + 1
    both = {"iops": 10, "bytes_per_s": 100 * SECTOR_BYTES, "burst_ns": 10 * MS}
    assert 100 <= Crowd(**both).run(10 * S, [0])[0] <= 102


def test_after_a_pause_a_burst_passes_and_no_more() -> None:
    crowd = Crowd(depth=512, iops=1000, burst_ns=100 * MS)
    crowd.fill(0)
    assert crowd.passed[0] == 101, "the burst, and the request whose debt is paid afterwards"
    crowd.now_ns += 3600 * S
    crowd.wake(0)
    assert 200 <= crowd.passed[0] <= 206


def test_queues_that_compete_get_the_same_and_one_alone_gets_all() -> None:
    crowd = Crowd(queues=3, depth=64, iops=3000, burst_ns=100 * MS)
    for queue in range(3):
        crowd.wake(queue)
    shares = crowd.run(2 * S, [0, 1, 2])
    assert all(abs(each - 2000) < 130 for each in shares), shares
    alone = crowd.run(S, [1])
    assert abs(alone[1] - 3000) < 450 and alone[0] == alone[2] == 0, alone


def test_a_queue_that_is_asked_rarely_is_not_starved_by_a_busy_one() -> None:
    """The second queue's clock is read once in 20 ms, the first one's at every millisecond."""
    crowd = Crowd(queues=2, depth=64, iops=200, burst_ns=20 * MS)
    for at in range(5000):
        crowd.now_ns += MS
        crowd.wake(0)
        if at % 20 == 19:
            crowd.wake(1)
    assert crowd.passed[1] >= 245, f"a batch each time: {crowd.passed}"
    assert abs(sum(crowd.passed) - 1000) < 20


def test_thousands_of_requests_a_second_need_a_wake_up_for_a_batch() -> None:
    crowd = Crowd(depth=64, iops=10_000, burst_ns=100 * MS)
    crowd.run(S // 4, [0])
    wakes, before, end_ns = 0, crowd.passed[0], crowd.now_ns + S // 2
    while crowd.now_ns < end_ns:
        crowd.now_ns += crowd.drivers[0].side.queue.limit_wait_ms(500) * MS
        crowd.wake(0)
        wakes += 1
    assert wakes <= 200 and crowd.passed[0] - before > 4900


def test_a_stopped_worker_has_saved_nothing_up() -> None:
    crowd = Crowd(queues=2, depth=64, iops=1000, burst_ns=20 * MS)
    crowd.run(S, [0, 1])
    before = sum(crowd.passed)
    started_ns = crowd.now_ns
    crowd.run(3 * S, [0])
    # The second worker goes on where it stopped: its clock is old until it has read it.
    crowd.fill(1)
    crowd.run(S, [0, 1])
    assert sum(crowd.passed) - before <= 1000 * (crowd.now_ns - started_ns) / S + 20 + 2 * 5


def test_an_old_clock_does_not_set_the_word_of_the_others_back() -> None:
    crowd = Crowd(queues=2, depth=2, iops=1000, burst_ns=20 * MS)
    old_ns = crowd.now_ns
    crowd.run(2 * S, [0])
    paid = crowd.rig.limits.paid_until[0]
    assert crowd.now_ns - old_ns > S
    crowd.fill(1)
    assert crowd.rig.limits.paid_until[0] >= paid and crowd.passed[1] == 0


@pytest.mark.parametrize("sectors", [8, 32])
def test_a_request_larger_than_the_burst_passes_and_leaves_a_debt(sectors: int) -> None:
    crowd = Crowd(depth=1, sectors=sectors, bytes_per_s=sectors * SECTOR_BYTES, burst_ns=10 * MS)
    assert 10 <= crowd.run(10 * S, [0])[0] <= 12


@pytest.mark.parametrize("word", [ABSURD, 2**63, 2**64 - 1])
def test_a_word_that_makes_no_sense_costs_a_bounded_wait(word: int) -> None:
    crowd = Crowd(depth=1, iops=10, burst_ns=100 * MS)
    crowd.rig.limits.paid_until[0] = word
    assert crowd.run(3 * S, [0])[0] > 15


@pytest.mark.parametrize(
    "limits", [{"iops": 2**64 - 1}, {"bytes_per_s": 1}, {"iops": 1, "burst_ns": 2**64 - 1}]
)
def test_limits_that_make_no_sense_are_no_undefined_arithmetic(limits: dict[str, int]) -> None:
    crowd = Crowd(depth=1, **limits)
    driver = crowd.drivers[0]
    for at in range(3):
        crowd.now_ns += 4000 * S
        driver.side.queue.limit_tick(crowd.now_ns)
        driver.deliver(0, Request(Op.READ, at, 8))
        crowd.now_ns += 2 * 4000 * S
        driver.side.queue.limit_tick(crowd.now_ns)
        driver.consume()
        assert len(driver.finished) == at + 1


def test_one_charge_for_each_request() -> None:
    crowd = Crowd(depth=8, iops=1000)
    start = crowd.now_ns
    crowd.run(S, [0])
    charged = (crowd.rig.limits.paid_until[0] / 64 - start) / MS
    in_batch = 8
    assert crowd.passed[0] <= round(charged) <= crowd.passed[0] + in_batch


@pytest.mark.parametrize("plan", [{}, OWN], ids=["pool", "backend"])
def test_what_waits_has_no_buffer_and_the_backend_hears_nothing_of_it(plan: dict[str, int]) -> None:
    desk = waiter(**plan)
    write, read = desk.write(0, 0, data(1)), desk.read(1, 8)
    assert [desk.state(0), desk.state(1)] == [State.WAIT_LIMIT] * 2
    assert desk.side.statistics.buffers_lent == 0 and desk.send() == []
    assert not desk.side.commands()
    desk.queue.limit_tick(2 * S)
    assert desk.state(0) not in (State.WAIT_LIMIT, State.KERNEL) and desk.state(1) is State.WAIT_LIMIT
    if plan:
        desk.place(0)
    desk.copy(0)
    desk.serve(0)
    desk.queue.limit_tick(3 * S)
    desk.serve(1)
    assert (write.result, read.result) == (SECTOR_BYTES, SECTOR_BYTES)
    stats = desk.side.statistics
    assert (stats.limited, stats.limited_ns, stats.limit_waiting) == (2, 3 * S, 0)


def test_requests_pass_in_the_order_of_their_arrival() -> None:
    desk = waiter()
    for tag in (2, 0, 1):
        desk.write(tag, 8 * tag, data(tag))
    for at, tag in enumerate((2, 0, 1), 2):
        desk.queue.limit_tick(at * S)
        assert [each.tag for each in desk.side.commands()] == [tag]
        desk.copy(tag)
        desk.serve(tag)


def test_a_flush_passes_at_once_and_a_discard_is_one_request_without_bytes() -> None:
    desk = Desk()
    desk.rig.limit(bytes_per_s=SECTOR_BYTES)
    desk.queue.limit_tick(S)
    flush, discards = (
        desk.other(0, Op.FLUSH, 0),
        [desk.other(1, Op.DISCARD, 64), desk.other(2, Op.WRITE_ZEROES, 64)],
    )
    for tag in range(3):
        desk.serve(tag)
    assert [each.result for each in (flush, *discards)] == [0, 0, 0]
    assert desk.side.statistics.limited == 0
    desk = waiter()
    discard, flush = desk.other(0, Op.DISCARD, 64), desk.other(1, Op.FLUSH, 0)
    assert desk.state(0) is State.WAIT_LIMIT and desk.state(1) is State.SERVING
    desk.serve(1)
    assert (flush.result, discard.result) == (0, None)
    desk.queue.limit_tick(2 * S)
    desk.serve(0)
    assert discard.result == 0


def test_a_deadline_begins_when_the_limits_let_a_request_pass() -> None:
    desk = waiter(timeout_ms=1000, fail_on_timeout=True)
    request = desk.read(0, 0)
    desk.queue.tick(50_000)
    assert desk.state(0) is State.WAIT_LIMIT and not desk.queue.attention() & Attention.SILENT
    desk.queue.limit_tick(2 * S)
    desk.send()
    desk.queue.tick(50_900)
    assert desk.state(0) is State.SERVING and not desk.queue.attention() & Attention.SILENT
    desk.queue.tick(51_100)
    assert desk.queue.attention() & Attention.SILENT
    desk.kill()
    desk.driver.consume()
    assert request.result == -errno.ETIMEDOUT


@pytest.mark.parametrize("plan", [{}, OWN], ids=["pool", "backend"])
def test_without_a_backend_giving_up_fails_what_waits_for_the_limits_too(plan: dict[str, int]) -> None:
    desk = waiter(**plan)
    write, read = desk.write(0, 0, data(1)), desk.read(1, 8)
    desk.kill()
    assert desk.state(0) is State.WAIT_LIMIT, "the next backend may come"
    desk.queue.give_up()
    later = desk.read(2, 0)
    desk.copy(0)
    desk.driver.consume()
    assert [each.result for each in (write, read, later)] == [-errno.EIO] * 3
    assert desk.side.statistics.limit_waiting == 0


def test_an_absence_that_is_too_long_fails_what_waits_for_the_limits_too() -> None:
    desk = waiter(absent_ms=1000)
    read = desk.read(0, 0)
    desk.kill()
    desk.queue.tick(10_000)
    desk.queue.tick(11_000)
    desk.driver.consume()
    assert read.result == -errno.EIO


def test_a_queue_that_gives_up_with_a_backend_serves_what_waits_at_once() -> None:
    desk = waiter()
    first, second = desk.read(0, 0), desk.read(1, 8)
    desk.queue.give_up()
    desk.serve(0)
    desk.serve(1)
    assert (first.result, second.result) == (SECTOR_BYTES, SECTOR_BYTES)


@pytest.mark.parametrize("plan", [{}, OWN], ids=["pool", "backend"])
def test_what_passes_without_a_backend_waits_for_the_next_in_order(plan: dict[str, int]) -> None:
    desk = waiter(**plan)
    requests = [desk.read(0, 0), desk.write(1, 8, data(1))]
    desk.kill()
    desk.queue.limit_tick(2 * S)
    desk.queue.limit_tick(3 * S)
    assert State.WAIT_LIMIT not in (desk.state(0), desk.state(1))
    desk.rig.settle(0)
    desk.connect()
    desk.send()
    desk.serve(0)
    if plan:
        desk.place(1)
    desk.copy(1)
    desk.serve(1)
    assert [each.result for each in requests] == [SECTOR_BYTES] * 2


def _raised(desk: Desk) -> None:
    desk.rig.limit(iops=1000)


def _lifted(desk: Desk) -> None:
    desk.rig.limit()


@pytest.mark.parametrize("change", [_raised, _lifted])
def test_limits_that_are_raised_or_lifted_hold_for_what_waits(change: Callable[[Desk], None]) -> None:
    desk = waiter()
    requests = [desk.read(0, 0), desk.read(1, 8)]
    change(desk)
    for at in range(10):
        desk.queue.limit_tick(S + at * MS)
    desk.serve(0)
    desk.serve(1)
    assert [each.result for each in requests] == [SECTOR_BYTES] * 2


def test_limits_can_be_set_lowered_and_lifted_while_requests_come() -> None:
    crowd = Crowd(depth=16, iops=1000, burst_ns=20 * MS)
    crowd.run(S, [0])
    crowd.rig.limit(iops=10, burst_ns=20 * MS)
    assert crowd.run(10 * S, [0])[0] <= 102 + 16
    crowd.rig.limit(iops=5000, burst_ns=20 * MS)
    assert crowd.run(S, [0])[0] > 4800


def test_a_queue_of_a_new_epoch_finds_the_bucket_as_it_is() -> None:
    crowd = Crowd(depth=64, iops=100, burst_ns=S)
    crowd.fill(0)
    assert crowd.passed[0] == 101
    fresh = Rig(crowd.rig.plan)
    fresh.limits.per_s, fresh.limits.burst_ns = list(crowd.rig.limits.per_s), crowd.rig.limits.burst_ns
    fresh.limits.paid_until = list(crowd.rig.limits.paid_until)
    fresh.limits.generation = 1
    driver = FakeDriver(fresh.sides[0])
    driver.side.queue.start()
    driver.consume()
    driver.side.queue.limit_tick(crowd.now_ns)
    driver.deliver(0, Request(Op.READ, 0, 1))
    driver.consume()
    assert not driver.finished


def test_a_write_that_the_driver_sends_again_is_charged_again() -> None:
    desk = waiter()
    desk.write(0, 0, data(1))
    desk.queue.limit_tick(2 * S)
    desk.copy(0, 0)
    again = desk.driver.again.popleft()
    desk.driver.deliver(0, again)
    assert desk.state(0) is State.WAIT_LIMIT
    desk.queue.limit_tick(3 * S)
    desk.copy(0)
    desk.serve(0)
    assert again.result == SECTOR_BYTES


def test_with_need_get_data_off_a_write_waits_in_the_buffer_that_its_tag_always_has() -> None:
    desk = waiter(need_get_data=False)
    write = desk.write(0, 0, data(1))
    assert desk.state(0) is State.WAIT_LIMIT and desk.send() == []
    desk.queue.limit_tick(2 * S)
    desk.serve(0)
    assert write.result == SECTOR_BYTES


def test_a_queue_without_limits_asks_for_no_wake_up() -> None:
    desk = Desk()
    desk.read(0, 0)
    assert desk.queue.limit_wait_ms(500) == 500
    limited = waiter()
    assert limited.queue.limit_wait_ms(500) == 500, "nothing waits"
    limited.read(0, 0)
    assert limited.queue.limit_wait_ms(500) == 100, "looks again for changed limits"
    limited.queue.limit_tick(2 * S - 30 * MS + 1)
    assert limited.queue.limit_wait_ms(500) == 30
