"""The histograms of a queue: buckets, counters whose carry is cut off, and what each kind of duration counts."""

import errno
from typing import Any

import pytest

from support.fakes.queue_desk import OWN, Desk, data
from ublkpool.bufpool.wire import Op
from ublkpool.daemon.latency import BOUNDS_NS
from ublkpool.ublk import _native
from ublkpool.ublk.queue import Attention, Queue
from ublkpool.ublk.statistics import BUCKETS, Statistics, bucket_bounds_ns, read_statistics
from ublkpool.workers.tag_state import State

_ffi, _lib = _native.ffi, _native.lib
US = 1000
CARRY = 1 << _lib.UQ_LOW_BITS
WRAPS = CARRY << 16
LAST = BUCKETS - 1


def histogram(bucket: int = 0, low: int = 0, high: int = 0) -> Any:
    made = _ffi.new("struct uq_histogram *")
    made.low[bucket], made.high[bucket] = low, high
    return made


def stored(value: int) -> tuple[int, int]:
    """The words of a counter with this value."""
    return value & 0xFFFFFFFF, value >> _lib.UQ_LOW_BITS & 0xFFFF


def counts(made: Any) -> list[int]:
    read = _ffi.new("uint64_t[]", BUCKETS)
    _lib.uq_histogram_read(made, read)
    return list(read)


def bucket_of(duration_ns: int) -> int:
    made = histogram()
    _lib.uq_histogram_add(made, 5, 5 + duration_ns)
    assert made.sum_ns == duration_ns
    (bucket,) = (index for index, count in enumerate(counts(made)) if count)
    return bucket


def test_c_and_python_have_the_same_bounds() -> None:
    assert bucket_bounds_ns() == BOUNDS_NS
    assert _lib.uq_bucket_bound_ns(LAST) == _lib.uq_bucket_bound_ns(BUCKETS) == 0


def test_a_bucket_has_its_upper_bound_and_the_next_one_begins_above_it() -> None:
    assert bucket_of(0) == bucket_of(1) == 0
    for bucket, bound in enumerate(BOUNDS_NS):
        assert (bucket_of(bound), bucket_of(bound + 1)) == (bucket, bucket + 1)
    assert bucket_of((1 << 63) - 1) == LAST


def test_a_clock_that_went_back_counts_as_no_time() -> None:
    made = histogram()
    _lib.uq_histogram_add(made, 5000, 4000)
    assert made.sum_ns == 0 and counts(made)[0] == 1


@pytest.mark.parametrize("carries", [1, 2, 3, 4, 5, 1 << 15])
def test_a_count_goes_on_over_its_carry(carries: int) -> None:
    for bucket in (0, LAST - 1, LAST):
        made = histogram(bucket, *stored(carries * CARRY - 2))
        duration = (*BOUNDS_NS, 2 * BOUNDS_NS[-1])[bucket]
        for more in range(4):
            assert counts(made)[bucket] == carries * CARRY - 2 + more
            _lib.uq_histogram_add(made, 0, duration)
        assert sum(counts(made)) == carries * CARRY + 2, "its neighbours are untouched"


def test_a_count_wraps_to_zero_and_no_sooner() -> None:
    made = histogram(0, *stored(WRAPS - 1))
    assert counts(made)[0] == WRAPS - 1
    _lib.uq_histogram_add(made, 0, 1)
    assert counts(made)[0] == 0


@pytest.mark.parametrize("carries", range(1, 9))
def test_a_worker_killed_in_the_middle_of_a_carry_loses_nothing(carries: int) -> None:
    (low, _), (_, high) = stored(carries * CARRY), stored(carries * CARRY - 1)
    made = histogram(0, low, high)
    assert counts(made)[0] == carries * CARRY
    _lib.uq_histogram_add(made, 0, 1)
    assert counts(made)[0] == carries * CARRY + 1
    made.low[0] = (made.low[0] + CARRY - 2) & 0xFFFFFFFF
    assert counts(made)[0] == (carries + 1) * CARRY - 1
    _lib.uq_histogram_add(made, 0, 1)
    assert counts(made)[0] == (carries + 1) * CARRY
    assert (made.low[0], made.high[0]) == stored((carries + 1) * CARRY), "the next carry repaired the counter"


@pytest.mark.parametrize("carries", range(1, 9))
def test_a_reader_that_saw_only_half_of_a_carry_reads_the_count_before_it(carries: int) -> None:
    (low, _), (_, high) = stored(carries * CARRY - 1), stored(carries * CARRY)
    assert counts(histogram(0, low, high))[0] == carries * CARRY - 1


def read(desk: Desk) -> Statistics:
    return read_statistics(desk.side.block_bytes())


def seen(desk: Desk) -> dict[str, list[int]]:
    """The bucket of every duration that was counted, by kind; its sum is compared elsewhere."""
    return {
        name: [bucket for bucket, count in enumerate(each.counts) for _ in range(count)]
        for name, each in read(desk).latencies.items()
        if each.sum_ns or any(each.counts)
    }


def assert_seen(desk: Desk, **expected_us: list[int]) -> None:
    """Exactly these durations, in microseconds, were counted."""
    buckets = {
        name: sorted(bucket_of(each * US) for each in durations) for name, durations in expected_us.items()
    }
    assert seen(desk) == buckets
    for name, durations in expected_us.items():
        assert read(desk).latencies[name].sum_ns == sum(durations) * US


class Clock:
    """Sets the real time of a desk's queue, in microseconds; it never begins at 0."""

    def __init__(self, desk: Desk) -> None:
        self._queue = desk.queue
        self.at(0)

    def at(self, now_us: int) -> None:
        self._queue.set_real_time((77_000_000 + now_us) * US)


def desk_and_clock(**plan: Any) -> tuple[Desk, Clock]:
    desk = Desk(**plan)
    return desk, Clock(desk)


def test_a_read_counts_from_its_arrival_to_its_commit() -> None:
    desk, clock = desk_and_clock()
    clock.at(10)
    desk.read(0, 0)
    clock.at(47)
    assert seen(desk) == {}
    desk.serve(0)
    assert_seen(desk, read=[37], backend=[37])


def test_a_writes_time_with_its_backend_begins_when_its_data_is_there() -> None:
    desk, clock = desk_and_clock()
    desk.write(0, 0, data(1))
    clock.at(100)
    desk.copy(0)
    clock.at(350)
    desk.serve(0)
    assert_seen(desk, write=[350], backend=[250])


@pytest.mark.parametrize("op", [Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES])
def test_other_operations_count_together(op: Op) -> None:
    desk, clock = desk_and_clock()
    desk.other(0, op)
    clock.at(5)
    desk.serve(0)
    assert_seen(desk, other=[5], backend=[5])


def test_an_unsupported_operation_counts_as_other_and_has_no_backend() -> None:
    desk, _ = desk_and_clock()
    desk.other(0, 4)
    assert_seen(desk, other=[0])


def test_a_queue_that_answers_itself_has_no_time_with_a_backend() -> None:
    desk, clock = desk_and_clock(connected=False, answers_itself=True)
    desk.write(0, 0, data(1))
    desk.read(1, 0)
    clock.at(9)
    desk.copy(0)
    assert_seen(desk, write=[9], read=[0])


def test_a_wait_for_a_pool_buffer_counts_and_a_buffer_at_once_does_not() -> None:
    desk, clock = desk_and_clock(spare=0)
    desk.read(0, 0)
    clock.at(10)
    desk.read(1, 1)
    clock.at(60)
    desk.serve(0)
    assert_seen(desk, read=[60], backend=[60], buffer_wait=[50])
    clock.at(90)
    desk.serve(1)
    assert_seen(desk, read=[60, 80], backend=[60, 30], buffer_wait=[50])
    assert desk.side.statistics.buffers_waited == 1


def test_the_question_where_a_write_shall_land_is_a_wait_and_a_posted_region_is_none() -> None:
    desk, clock = desk_and_clock(**OWN)
    desk.write(0, 0, data(1))
    clock.at(70)
    desk.place(0)
    assert_seen(desk, buffer_wait=[70])
    assert desk.backend is not None
    desk, clock = desk_and_clock(**OWN, posts=True)
    assert desk.backend is not None
    frame = desk.backend.post(0)
    assert frame is not None
    desk.queue.input(frame)
    clock.at(5)
    desk.write(0, 0, data(1))
    assert desk.state(0) is State.COPYING and seen(desk) == {}


def test_a_write_that_waits_for_a_backend_to_ask_waits_once_whatever_dies_meanwhile() -> None:
    desk, clock = desk_and_clock(connected=False, place_in_backend=True)
    desk.write(0, 0, data(1))
    clock.at(20)
    desk.connect()
    desk.send()
    assert desk.state(0) is State.PLACING
    clock.at(30)
    desk.kill()
    desk.connect()
    clock.at(45)
    desk.place(0)
    assert_seen(desk, buffer_wait=[45])


def test_a_replayed_request_counts_once_from_the_first_backend_to_the_last_ones_answer() -> None:
    desk, clock = desk_and_clock()
    clock.at(10)
    desk.read(0, 0)
    desk.send()
    clock.at(20)
    desk.kill()
    clock.at(1_000_000)
    desk.connect()
    clock.at(1_500_000)
    desk.serve(0)
    assert desk.side.statistics.replays == 1
    assert_seen(desk, read=[1_499_990], backend=[1_499_990])


def test_a_request_that_fails_while_it_waits_counts_its_wait_and_no_backend() -> None:
    desk, clock = desk_and_clock(spare=0, timeout_ms=1000, fail_on_timeout=True)
    holder, waiter = desk.read(0, 0), desk.read(1, 1)
    clock.at(2_000_000)
    desk.queue.tick(2000)
    desk.driver.consume()
    assert waiter.result == -errno.ETIMEDOUT and holder.result is None
    assert_seen(desk, read=[2_000_000], buffer_wait=[2_000_000])


def test_a_refused_place_ends_the_wait_and_the_write() -> None:
    desk, clock = desk_and_clock(**OWN)
    desk.write(0, 0, data(1))
    desk.send()
    clock.at(8)
    assert desk.backend is not None
    desk.queue.input(desk.backend.reject((0, 0), -errno.ENOSPC))
    assert seen(desk) == {"buffer_wait": [bucket_of(8 * US)]}
    clock.at(11)
    desk.copy(0)
    assert_seen(desk, write=[11], buffer_wait=[8])


def test_a_request_of_the_next_worker_goes_on_with_the_histograms_of_the_last() -> None:
    desk, clock = desk_and_clock()
    desk.read(0, 0)
    clock.at(30)
    desk.serve(0)
    desk.read(1, 0)
    desk.send()
    desk.queue = Queue(desk.queue.config, desk.queue._memory)
    assert_seen(desk, read=[30], backend=[30])
    assert not desk.queue.attention() & Attention.FAULT


def test_a_block_of_a_worker_that_counts_no_durations_reads_as_empty() -> None:
    block = _ffi.new("struct uq_block *")
    block.stats.commits = 7
    statistics = read_statistics(bytes(_ffi.buffer(block)))
    assert statistics.counters["commits"] == 7
    assert all(not any(each.counts) and not each.sum_ns for each in statistics.latencies.values())


def test_a_block_that_is_cut_off_is_refused() -> None:
    with pytest.raises(ValueError):
        read_statistics(bytes(4095))
