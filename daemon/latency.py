"""Arithmetic on latency histograms: their bounds, sums, differences and quantiles.

Owns the bucket bounds, which ublk/csrc/queue_latency.h has in C; a test compares the two.  Must not know who counted or
who shows the result.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

from ublkpool.daemon.status import Bucket, Histogram, Latencies

NS_PER_S = 1_000_000_000
BOUNDS_NS = (896, 1024, *(quarter << octave for octave in range(8, 34) for quarter in (5, 6, 7, 8)))
"""The upper bound of each bucket in nanoseconds, the bound itself included; one more bucket has no bound.

From 1 us to 68.7 s a bucket's upper bound is at most a quarter above its lower bound.
"""
BOUNDS_S = tuple(bound / NS_PER_S for bound in BOUNDS_NS)
"""The same in seconds, as in `Bucket.upper_s`."""


def from_counts(counts: Sequence[int], sum_ns: int) -> Histogram:
    """The histogram with this count for each bound of BOUNDS_NS, and a last one for the bucket without a bound."""
    buckets = zip((*BOUNDS_S, None), counts, strict=True)
    return _histogram((Bucket(upper_s, count) for upper_s, count in buckets if count), sum_ns)


def merge(histograms: Iterable[Histogram]) -> Histogram:
    """The durations of all of them."""
    counts: Counter[float | None] = Counter()
    sum_ns = 0
    for histogram in histograms:
        sum_ns += histogram.sum_ns
        for bucket in histogram.buckets:
            counts[bucket.upper_s] += bucket.count
    return _from_mapping(counts, sum_ns)


def merge_latencies(latencies: Sequence[Latencies]) -> Latencies:
    """The same for each kind of duration."""
    kinds = Latencies.__struct_fields__
    return Latencies(**{kind: merge(getattr(each, kind) for each in latencies) for kind in kinds})


def difference(now: Histogram, before: Histogram) -> Histogram | None:
    """The durations that were counted between two readings; None if a count fell: the two are of different queues."""
    if now == before:
        # Most devices of many are idle.
        return Histogram()
    counts = {bucket.upper_s: bucket.count for bucket in now.buckets}
    for bucket in before.buckets:
        counts[bucket.upper_s] = counts.get(bucket.upper_s, 0) - bucket.count
    if now.sum_ns < before.sum_ns or any(count < 0 for count in counts.values()):
        return None
    return _from_mapping(counts, now.sum_ns - before.sum_ns)


def quantile(histogram: Histogram, share: float) -> float | None:
    """The duration in seconds that `share` (0 to 1) of all durations do not exceed; None if there are none.

    Inside a bucket durations count as evenly spread, so that the result is off by at most the bucket's width.  For a
    duration beyond the last bound the result is that bound.
    """
    rank = share * sum(bucket.count for bucket in histogram.buckets)
    below, result = 0, None
    for bucket in histogram.buckets:
        if bucket.upper_s is None:
            return BOUNDS_S[-1]
        lower_s = _lower_s(bucket.upper_s)
        inside = min(1.0, max(0.0, (rank - below) / bucket.count))
        result = lower_s + (bucket.upper_s - lower_s) * inside
        below += bucket.count
        if below >= rank:
            break
    return result


def _lower_s(upper_s: float) -> float:
    index = bisect_left(BOUNDS_S, upper_s)
    return BOUNDS_S[index - 1] if index else 0.0


def _from_mapping(counts: dict[float | None, int], sum_ns: int) -> Histogram:
    def order(upper_s: float | None) -> float:
        return float("inf") if upper_s is None else upper_s

    return _histogram(
        (Bucket(each, counts[each]) for each in sorted(counts, key=order) if counts[each]), sum_ns
    )


def _histogram(buckets: Iterable[Bucket], sum_ns: int) -> Histogram:
    kept = tuple(buckets)
    return Histogram(count=sum(bucket.count for bucket in kept), sum_ns=sum_ns, buckets=kept)
