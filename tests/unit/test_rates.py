"""Rates and quantiles between two readings of a device's counters."""

import json
from typing import Any

import msgspec
import pytest

from ublkpool.daemon.latency import BOUNDS_NS, BOUNDS_S, from_counts
from ublkpool.daemon.rates import (
    DeviceRates,
    LatencyQuantiles,
    Measured,
    Meter,
    OpRates,
    Quantiles,
    following,
    rates_between,
)
from ublkpool.daemon.status import DeviceStats, Histogram, Latencies, OpCounts, QueueStats

NOW = "2026-11-26T17:00:00.000Z"


def histogram(*pairs: tuple[int, int]) -> Histogram:
    counts = [0] * (len(BOUNDS_NS) + 1)
    for bucket, count in pairs:
        counts[bucket] = count
    return from_counts(counts, sum(count for _, count in pairs))


def queue(reads: int = 0, writes: int = 0, **more: Any) -> QueueStats:
    return QueueStats(
        queue=0,
        requests=OpCounts(read=reads, write=writes),
        bytes=OpCounts(read=4096 * reads, write=512 * writes),
        **more,
    )


def device(*queues: QueueStats, name: str = "vol0", reason: str = "") -> DeviceStats:
    return DeviceStats(name=name, reason=reason, queues=queues)


def between(before: DeviceStats, now: DeviceStats, elapsed_s: float = 1.0) -> DeviceRates:
    rates = rates_between(before, now, elapsed_s, NOW)
    assert rates is not None
    return rates


def test_rates_are_what_was_counted_by_the_real_time_over_all_queues() -> None:
    before = device(queue(reads=1000, writes=5, errors=1), queue(reads=50))
    now = device(
        queue(reads=1300, writes=5, errors=4, in_flight=2), queue(reads=150, in_flight=3), reason="why"
    )
    rates = between(before, now, elapsed_s=2.0)
    assert rates.requests_per_s == OpRates(read=200.0)
    assert rates.bytes_per_s == OpRates(read=200.0 * 4096)
    assert (rates.errors_per_s, rates.in_flight, rates.interval_s) == (1.5, 5, 2.0)
    assert (rates.time, rates.name, rates.reason) == (NOW, "vol0", "why")
    assert (rates.requests, rates.bytes.read, rates.errors) == (OpCounts(read=1450, write=5), 1450 * 4096, 4)


def test_each_operation_has_its_own_rate() -> None:
    counts = {"read": 1, "write": 2, "flush": 3, "discard": 4, "write_zeroes": 5}
    rates = between(device(QueueStats(queue=0)), device(QueueStats(queue=0, requests=OpCounts(**counts))))
    assert rates.requests_per_s == OpRates(**counts) and rates.bytes_per_s == OpRates()


def test_latencies_are_of_the_interval_alone() -> None:
    slow, fast = (90, 10_000), (8, 100)
    before = device(queue(latency=Latencies(read=histogram(slow))), queue())
    now = device(
        queue(latency=Latencies(read=histogram(slow, fast))),
        queue(latency=Latencies(backend=histogram((20, 1)))),
    )
    latency = between(before, now).latency
    assert latency.read.count == 100 and latency.backend.count == 1
    assert latency.read.p50_s is not None and latency.read.p99_s is not None
    assert BOUNDS_S[7] < latency.read.p50_s < latency.read.p99_s < BOUNDS_S[8]
    assert (latency.write, latency.other, latency.buffer_wait) == (Quantiles(), Quantiles(), Quantiles())


def test_a_quantile_is_of_the_durations_of_all_queues() -> None:
    now = device(
        queue(latency=Latencies(write=histogram((8, 60)))),
        queue(latency=Latencies(write=histogram((40, 40)))),
    )
    write = between(device(queue(), queue()), now).latency.write
    assert write.p50_s is not None and write.p99_s is not None
    assert write.p50_s <= BOUNDS_S[8] and BOUNDS_S[39] < write.p99_s <= BOUNDS_S[40]


def test_counters_are_added_and_extremes_are_not() -> None:
    counters = (
        {"commits": 5, "in_flight_max": 9, "oldest_ms": 100},
        {"commits": 6, "in_flight_max": 4, "oldest_ms": 700},
    )
    now = device(*(queue(counters=each) for each in counters))
    assert between(now, now).counters == {"commits": 11, "in_flight_max": 9, "oldest_ms": 700}


FALLEN = {
    "requests": (queue(reads=5), queue(reads=4)),
    "bytes": (queue(), QueueStats(queue=0, bytes=OpCounts(flush=-1))),
    "errors": (queue(errors=1), queue()),
    "a bucket": (
        queue(latency=Latencies(other=histogram((3, 1), (4, 1)))),
        queue(latency=Latencies(other=histogram((3, 1), (5, 9)))),
    ),
}


@pytest.mark.parametrize("what", FALLEN)
def test_an_interval_in_which_a_counter_of_one_queue_fell_has_no_rates(what: str) -> None:
    fell, now = FALLEN[what]
    busy = queue(reads=10**6, writes=10**6, errors=10**6, latency=Latencies(other=histogram((4, 10**6))))
    assert rates_between(device(fell, queue()), device(now, busy), 1.0, NOW) is None
    assert rates_between(device(queue(), fell), device(busy, now), 1.0, NOW) is None


def test_a_device_with_other_queues_is_another_device() -> None:
    one, two = device(queue()), device(queue(), queue())
    assert rates_between(one, two, 1.0, NOW) is None and rates_between(two, one, 1.0, NOW) is None


def test_a_device_without_queues_has_rates_of_nothing() -> None:
    waits = device(reason="waits for a backend")
    assert between(waits, waits).requests_per_s == OpRates()
    assert between(waits, waits).latency == LatencyQuantiles()


def read(meter: Meter, at_s: float, *devices: DeviceStats) -> dict[str, float | None]:
    """The rate of reads of each device."""
    interval = meter.read(devices, at_s, NOW)
    assert [each.stats for each in interval.devices] == list(devices)
    return {
        each.stats.name: each.rates.requests_per_s.read if each.rates is not None else None
        for each in interval.devices
    }


def vol(name: str, reads: int) -> DeviceStats:
    return device(queue(reads=reads), name=name)


def test_a_meter_follows_devices_that_appear_and_disappear() -> None:
    meter = Meter()
    assert read(meter, 10.0, vol("a", 100)) == {"a": None}
    assert read(meter, 11.0, vol("a", 150), vol("b", 7)) == {"a": 50.0, "b": None}
    assert read(meter, 12.0, vol("b", 9)) == {"b": 2.0}
    # The device of this name is not compared with the one of two readings before.
    assert read(meter, 13.0, vol("a", 1000), vol("b", 9)) == {"a": None, "b": 0.0}
    assert read(meter, 14.0, vol("a", 1001), vol("b", 9)) == {"a": 1.0, "b": 0.0}
    assert read(meter, 15.0) == {}


def test_a_device_made_anew_is_skipped_for_one_interval() -> None:
    meter = Meter()
    readings = [(10.0, 500), (11.0, 700), (12.0, 30), (13.0, 80)]
    assert [read(meter, at_s, vol("a", reads))["a"] for at_s, reads in readings] == [None, 200.0, None, 50.0]


def test_a_late_reading_has_the_rate_of_its_real_time() -> None:
    meter = Meter()
    read(meter, 10.0, vol("a", 0))
    assert read(meter, 3610.0, vol("a", 7200)) == {"a": 2.0}


def test_a_meter_that_forgets_begins_anew() -> None:
    meter = Meter()
    read(meter, 10.0, vol("a", 0))
    meter.forget()
    first = meter.read([vol("a", 9)], 20.0, NOW)
    assert first.elapsed_s is None and first.devices == [Measured(vol("a", 9), None)]
    assert read(meter, 21.0, vol("a", 10)) == {"a": 1.0}


def test_two_readings_at_one_time_have_no_rates() -> None:
    meter = Meter()
    read(meter, 10.0, vol("a", 0))
    assert read(meter, 10.0, vol("a", 5)) == {"a": None}


@pytest.mark.parametrize(
    ("now_s", "due_s"),
    [(10.0, 11.0), (10.4, 11.0), (11.0, 12.0), (11.5, 12.0), (3600.2, 3601.0), (9.0, 11.0)],
)
def test_readings_keep_their_beat_and_none_is_made_up_for(now_s: float, due_s: float) -> None:
    assert following(10.0, now_s, 1.0) == due_s


def test_a_line_of_json_is_the_contract() -> None:
    latency = Latencies(read=histogram((0, 1)))
    rates = between(device(queue()), device(queue(reads=1, latency=latency, counters={"commits": 1})))
    none = {"count": 0, "p50_s": None, "p99_s": None}
    others = {"write": 0, "flush": 0, "discard": 0, "write_zeroes": 0}
    assert json.loads(msgspec.json.encode(rates)) == {
        "time": NOW,
        "interval_s": 1.0,
        "name": "vol0",
        "reason": "",
        "requests_per_s": {"read": 1.0, **others},
        "bytes_per_s": {"read": 4096.0, **others},
        "errors_per_s": 0.0,
        "latency": {
            "read": {"count": 1, "p50_s": 4.48e-07, "p99_s": 8.87e-07},
            **dict.fromkeys(("write", "other", "buffer_wait", "backend"), none),
        },
        "in_flight": 0,
        "requests": {"read": 1, **others},
        "bytes": {"read": 4096, **others},
        "errors": 0,
        "counters": {"commits": 1},
    }


def test_all_kinds_of_operations_and_durations_have_a_field() -> None:
    assert OpRates.__struct_fields__ == OpCounts.__struct_fields__
    assert LatencyQuantiles.__struct_fields__ == Latencies.__struct_fields__
