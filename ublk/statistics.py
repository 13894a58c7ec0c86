"""A queue's statistics block: its counters and its histograms of durations.

Owns the names by which they are read.  The block lies in the control segment and is written by the queue's worker; the
layout is that of struct uq_block (csrc/queue_core.h).
"""

from typing import Any, NamedTuple

from ublkpool.ublk.calls import ffi, lib

BUCKETS = lib.UQ_BUCKETS
LATENCIES = ("read", "write", "other", "buffer_wait", "backend")
"""The histograms of a queue, in the order of enum uq_latency."""


class Durations(NamedTuple):
    """A histogram as it is counted: a count for each of BUCKETS buckets, and the sum in nanoseconds."""

    counts: tuple[int, ...]
    sum_ns: int


class Statistics(NamedTuple):
    """A queue's counters, which continue over a recovery; the first three by operation (`wire.Op`)."""

    requests: tuple[int, ...]
    moved_bytes: tuple[int, ...]
    failed: tuple[int, ...]
    counters: dict[str, int]
    latencies: dict[str, Durations]
    """By the names of LATENCIES; csrc/queue_latency.h says what each counts."""


_BY_OPERATION = ("requests", "bytes", "failed")


def read_statistics(block: bytes) -> Statistics:
    """Decode a queue's block of the control segment; names are those of struct uq_stats.

    Raises `ValueError` for a block that is too short.
    """
    (view,) = ffi.from_buffer("struct uq_block[1]", block)
    stats = view.stats
    names = [name for name, _ in ffi.typeof("struct uq_stats").fields]
    counters = {name: int(getattr(stats, name)) for name in names if name not in _BY_OPERATION}
    latencies = {name: _durations(view.latencies.of[index]) for index, name in enumerate(LATENCIES)}
    return Statistics(tuple(stats.requests), tuple(stats.bytes), tuple(stats.failed), counters, latencies)


def _durations(histogram: Any) -> Durations:
    counts = ffi.new("uint64_t[]", BUCKETS)
    lib.uq_histogram_read(ffi.addressof(histogram), counts)
    return Durations(tuple(counts), int(histogram.sum_ns))


def bucket_bounds_ns() -> tuple[int, ...]:
    """The upper bound of each bucket but the last, which has none; in nanoseconds."""
    return tuple(int(lib.uq_bucket_bound_ns(bucket)) for bucket in range(BUCKETS - 1))
