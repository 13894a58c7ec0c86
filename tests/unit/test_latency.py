"""Histograms of durations: bounds, sums, differences, quantiles, and their JSON."""

import random
from itertools import pairwise

import msgspec
import pytest

from ublkpool.daemon.latency import (
    BOUNDS_NS,
    BOUNDS_S,
    difference,
    from_counts,
    merge,
    merge_latencies,
    quantile,
)
from ublkpool.daemon.status import Bucket, DeviceStats, Histogram, Latencies, QueueStats

BUCKETS = len(BOUNDS_NS) + 1


def counts(*pairs: tuple[int, int]) -> list[int]:
    result = [0] * BUCKETS
    for index, count in pairs:
        result[index] = count
    return result


def of(durations_ns: list[int]) -> Histogram:
    found = [0] * BUCKETS
    for duration in durations_ns:
        found[next((i for i, bound in enumerate(BOUNDS_NS) if duration <= bound), BUCKETS - 1)] += 1
    return from_counts(found, sum(durations_ns))


def test_bounds_rise_by_at_most_a_quarter_from_one_microsecond_to_a_minute() -> None:
    assert BOUNDS_NS[0] < 1000 and BOUNDS_NS[-1] > 60_000_000_000
    assert all(1 < after / before <= 1.25 for before, after in pairwise(BOUNDS_NS))


def test_only_buckets_with_a_count_are_kept_and_the_last_has_no_bound() -> None:
    histogram = from_counts(counts((0, 2), (5, 3), (BUCKETS - 1, 1)), 99)
    assert histogram == Histogram(
        count=6, sum_ns=99, buckets=(Bucket(BOUNDS_S[0], 2), Bucket(BOUNDS_S[5], 3), Bucket(None, 1))
    )


@pytest.mark.parametrize("length", [BUCKETS - 1, BUCKETS + 1])
def test_counts_of_another_layout_are_refused(length: int) -> None:
    with pytest.raises(ValueError):
        from_counts([0] * length, 0)


def test_a_sum_of_histograms_is_the_histogram_of_all() -> None:
    assert merge([of([1000, 5_000_000]), of([]), of([1001, 90_000_000_000])]) == of(
        [1000, 1001, 5_000_000, 90_000_000_000]
    )
    queues = [Latencies(read=of([1000]), other=of([7])), Latencies(read=of([2000]), backend=of([8]))]
    assert merge_latencies(queues) == Latencies(read=of([1000, 2000]), other=of([7]), backend=of([8]))
    assert merge_latencies([]) == Latencies()


def test_a_difference_has_what_came_between() -> None:
    before, between = [1000, 1000, 5_000_000], [1000, 2_000_000, 99_000_000_000]
    assert difference(of(before + between), of(before)) == of(between)
    assert difference(of(before), of(before)) == Histogram()


def test_counts_that_fell_have_no_difference() -> None:
    assert difference(of([1000]), of([1000, 1000])) is None
    assert difference(of([5_000_000_000]), of([1000])) is None
    assert difference(from_counts(counts((4, 2)), 5), from_counts(counts((4, 1)), 6)) is None


def test_no_durations_have_no_quantile() -> None:
    assert quantile(Histogram(), 0.5) is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0])
def test_a_quantile_is_off_by_at_most_the_width_of_a_bucket(share: float) -> None:
    random.seed(7)
    durations = sorted(int(random.lognormvariate(12, 2)) + 1000 for _ in range(2000))
    exact = durations[max(0, min(len(durations) - 1, int(share * len(durations) + 0.999999) - 1))] / 1e9
    found = quantile(of(durations), share)
    assert found is not None and abs(found - exact) <= 0.25 * exact


def test_quantiles_beyond_the_last_bound_are_that_bound() -> None:
    assert quantile(of([1000, 100_000_000_000]), 0.99) == BOUNDS_S[-1]


def test_a_count_that_disagrees_with_the_buckets_changes_no_quantile() -> None:
    honest = of([1000, 2000, 3000, 4000])
    for count in (0, 1, 1 << 60):
        torn = msgspec.structs.replace(honest, count=count)
        assert quantile(torn, 0.5) == quantile(honest, 0.5)


def test_json_has_pairs_of_bound_and_count_and_reads_back_equal() -> None:
    histogram = from_counts(counts((1, 2), (BUCKETS - 1, 1)), 99)
    stats = DeviceStats(name="vol0", queues=(QueueStats(queue=0, latency=Latencies(read=histogram)),))
    line = msgspec.json.encode(stats)
    assert b'"read":{"count":3,"sum_ns":99,"buckets":[[1.024e-6,2],[null,1]]}' in line
    assert msgspec.json.decode(line, type=DeviceStats) == stats


def test_every_bound_survives_json() -> None:
    assert tuple(msgspec.json.decode(msgspec.json.encode(BOUNDS_S))) == BOUNDS_S


def test_stats_of_a_daemon_without_histograms_have_empty_ones() -> None:
    old = b'{"name":"vol0","queues":[{"queue":0}]}'
    stats = msgspec.json.decode(old, type=DeviceStats)
    assert stats.latency == Latencies() and stats.queues[0].latency == Latencies()
