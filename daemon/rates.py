"""What devices did between two readings of their counters: requests and bytes a second, and quantiles of durations.

Owns the fields of a line of `stats --watch --json`, which scripts rely on: fields are added, never renamed.  Pure: the
caller reads the clock and the counters.
"""

from collections.abc import Sequence
from math import floor
from typing import NamedTuple

import msgspec
from msgspec import structs

from ublkpool.daemon.latency import difference, merge, quantile
from ublkpool.daemon.status import DeviceStats, Histogram, Latencies, OpCounts, QueueStats

_OPS = OpCounts.__struct_fields__


class OpRates(msgspec.Struct, frozen=True, kw_only=True):
    """Requests or bytes a second for each operation."""

    read: float = 0.0
    write: float = 0.0
    flush: float = 0.0
    discard: float = 0.0
    write_zeroes: float = 0.0


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """The number of durations in the interval, and what 50 % and 99 % of them did not exceed, in seconds.

    None where no duration was counted.
    """

    count: int = 0
    p50_s: float | None = None
    p99_s: float | None = None


class LatencyQuantiles(msgspec.Struct, frozen=True, kw_only=True):
    """The kinds of durations are those of `Latencies`."""

    read: Quantiles = Quantiles()
    write: Quantiles = Quantiles()
    other: Quantiles = Quantiles()
    buffer_wait: Quantiles = Quantiles()
    backend: Quantiles = Quantiles()


class DeviceRates(msgspec.Struct, frozen=True, kw_only=True):
    """One device over one interval, all its queues together.

    `time`: the interval's end, in UTC.  `interval_s`: its real length, without the time in which the machine slept.
    `requests`, `bytes`, `errors` and `counters` are totals at its end, as in `stats --json`, not of the interval;
    of `oldest_ms` and counters that end in `_max`, the greatest of the queues.
    """

    time: str
    interval_s: float
    name: str
    reason: str = ""
    requests_per_s: OpRates = OpRates()
    bytes_per_s: OpRates = OpRates()
    errors_per_s: float = 0.0
    latency: LatencyQuantiles = LatencyQuantiles()
    in_flight: int = 0
    requests: OpCounts = OpCounts()
    bytes: OpCounts = OpCounts()
    errors: int = 0
    counters: dict[str, int] = {}


class Measured(NamedTuple):
    """A device's reading; `rates` is None if the interval before it is not whole.

    `before`: the reading at the interval's beginning, if there is one.  `latencies`: the interval's durations.
    """

    stats: DeviceStats
    rates: DeviceRates | None
    before: DeviceStats | None = None
    latencies: Latencies | None = None


class Interval(NamedTuple):
    """The devices in the daemon's order; `elapsed_s` is None for a first reading, which ends no interval."""

    time: str
    elapsed_s: float | None
    devices: list[Measured]


class Meter:
    """Remembers the last reading, so that the next one ends an interval."""

    def __init__(self) -> None:
        self._before: dict[str, DeviceStats] = {}
        self._at_s: float | None = None

    def read(self, devices: Sequence[DeviceStats], at_s: float, time: str) -> Interval:
        """What the devices did since the last reading; `at_s`: the reading's time on the monotonic clock."""
        elapsed_s = None if self._at_s is None else at_s - self._at_s
        measured = [self._measured(each, elapsed_s, time) for each in devices]
        self._before = {each.name: each for each in devices}
        self._at_s = at_s
        return Interval(time, elapsed_s, measured)

    def forget(self) -> None:
        """Have the next reading be a first one: the daemon was away, and its devices may be others of their names."""
        self._before, self._at_s = {}, None

    def _measured(self, now: DeviceStats, elapsed_s: float | None, time: str) -> Measured:
        before = self._before.get(now.name)
        if before is None or not elapsed_s:
            return Measured(now, None)
        return measure(before, now, elapsed_s, time)


def rates_between(before: DeviceStats, now: DeviceStats, elapsed_s: float, time: str) -> DeviceRates | None:
    """The device's rates; None if a counter fell or the queues are others: the device was made anew."""
    return measure(before, now, elapsed_s, time).rates


def measure(before: DeviceStats, now: DeviceStats, elapsed_s: float, time: str) -> Measured:
    """The device over the interval between the two readings."""
    latencies = latencies_between(before.queues, now.queues)
    rates = None if latencies is None else _rates(before, now, latencies, elapsed_s, time)
    return Measured(now, rates, before, latencies)


def _rates(
    before: DeviceStats, now: DeviceStats, latencies: Latencies, elapsed_s: float, time: str
) -> DeviceRates:
    was, is_now = _totals(before.queues), _totals(now.queues)
    return DeviceRates(
        time=time,
        interval_s=round(elapsed_s, 6),
        name=now.name,
        reason=now.reason,
        requests_per_s=_per_s(was.requests, is_now.requests, elapsed_s),
        bytes_per_s=_per_s(was.bytes, is_now.bytes, elapsed_s),
        errors_per_s=round((is_now.errors - was.errors) / elapsed_s, 3),
        latency=_latency_quantiles(latencies),
        in_flight=is_now.in_flight,
        requests=is_now.requests,
        bytes=is_now.bytes,
        errors=is_now.errors,
        counters=is_now.counters,
    )


def following(due_s: float, now_s: float, interval_s: float) -> float:
    """When the reading after the one that was due at `due_s` is due.

    Readings whose time has passed are left out, so that none follows at once on a late one.
    """
    return due_s + (max(0, floor((now_s - due_s) / interval_s)) + 1) * interval_s


def queues_between(measured: Measured, elapsed_s: float, time: str) -> list[Measured]:
    """Each queue of a device by itself, as a device of one queue, over the interval that `measured` ends."""
    before, now = measured.before, measured.stats
    alone = [structs.replace(now, queues=(queue,)) for queue in now.queues]
    if before is None or len(before.queues) != len(now.queues):
        return [Measured(each, None) for each in alone]
    found = []
    for queue, each in zip(before.queues, alone, strict=True):
        found.append(measure(structs.replace(before, queues=(queue,)), each, elapsed_s, time))
    return found


def latencies_between(before: Sequence[QueueStats], now: Sequence[QueueStats]) -> Latencies | None:
    """The durations of all queues in the interval; None if a counter of one queue fell, which a sum would hide."""
    if len(before) != len(now) or any(map(_has_fallen, before, now)):
        return None
    found: dict[str, Histogram] = {}
    for kind in Latencies.__struct_fields__:
        grown = [
            difference(getattr(after.latency, kind), getattr(earlier.latency, kind))
            for earlier, after in zip(before, now, strict=True)
        ]
        whole = [each for each in grown if each is not None]
        if len(whole) < len(grown):
            return None
        found[kind] = merge(whole) if len(whole) != 1 else whole[0]
    return Latencies(**found)


def whole_request(latencies: Latencies) -> Histogram:
    """The durations of all requests, whatever their operation."""
    return merge((latencies.read, latencies.write, latencies.other))


def _latency_quantiles(latencies: Latencies) -> LatencyQuantiles:
    kinds = Latencies.__struct_fields__
    return LatencyQuantiles(**{kind: _quantiles(getattr(latencies, kind)) for kind in kinds})


def _has_fallen(before: QueueStats, now: QueueStats) -> bool:
    pairs = ((before.requests, now.requests), (before.bytes, now.bytes))
    fell = any(getattr(after, op) < getattr(earlier, op) for earlier, after in pairs for op in _OPS)
    return fell or now.errors < before.errors


def _quantiles(histogram: Histogram) -> Quantiles:
    return Quantiles(
        count=histogram.count,
        p50_s=_rounded(quantile(histogram, 0.5)),
        p99_s=_rounded(quantile(histogram, 0.99)),
    )


def _rounded(duration_s: float | None) -> float | None:
    return None if duration_s is None else round(duration_s, 9)


def _per_s(before: OpCounts, now: OpCounts, elapsed_s: float) -> OpRates:
    return OpRates(**{op: round((getattr(now, op) - getattr(before, op)) / elapsed_s, 3) for op in _OPS})


def _totals(queues: Sequence[QueueStats]) -> QueueStats:
    """The sums of what a line shows."""
    return QueueStats(
        queue=0,
        requests=_sum([each.requests for each in queues]),
        bytes=_sum([each.bytes for each in queues]),
        errors=sum(each.errors for each in queues),
        in_flight=sum(each.in_flight for each in queues),
        counters=_counters(queues),
    )


def _sum(counts: Sequence[OpCounts]) -> OpCounts:
    return OpCounts(**{op: sum(getattr(each, op) for each in counts) for op in _OPS})


def _counters(queues: Sequence[QueueStats]) -> dict[str, int]:
    names = dict.fromkeys(name for each in queues for name in each.counters)
    return {
        name: (max if _is_extreme(name) else sum)(each.counters.get(name, 0) for each in queues)
        for name in names
    }


def _is_extreme(counter: str) -> bool:
    return counter == "oldest_ms" or counter.endswith("_max")
