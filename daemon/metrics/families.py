"""The metrics: each one's name, kind, labels, help, and where a snapshot has its values.

Owns the names, which dashboards and alerts rely on: metrics are added, never renamed.  docs/METRICS.md has the same
table.  Labels are bounded by what exists: devices, their queues, and fixed words.  Must not know the client library.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

from ublkpool.daemon.latency import BOUNDS_NS, NS_PER_S
from ublkpool.daemon.metrics.source import Snapshot
from ublkpool.daemon.metrics.usage import ProcessUsage
from ublkpool.daemon.status import (
    CUT_OFF_REASONS,
    DeviceStats,
    DeviceStatus,
    Histogram,
    OpCounts,
    QueueStats,
    State,
)

Kind = Literal["counter", "gauge", "info", "stateset", "histogram"]
Labels = tuple[str, ...]
BUCKETS_S = tuple(bound / NS_PER_S for bound in BOUNDS_NS if not bound & (bound - 1))
"""Upper bounds of the exposed buckets, from 1 us to 69 s, each twice the one before.

The workers count in finer ones; a time series for each of those would be too many on a machine with many devices.
"""
_STATES = get_args(State)
_QUEUE = ("device", "queue")
_PROCESS = ("role", "device", "queue")


class Distribution(NamedTuple):
    """A histogram's value: the cumulative count for each of `BUCKETS_S`, and the number and sum of all durations."""

    cumulative: tuple[int, ...]
    total: int
    sum_s: float


Value = float | Mapping[str, str] | Mapping[str, bool] | Distribution
Values = Iterator[tuple[Labels, Value]]


class Family(NamedTuple):
    """One metric; `name` is without the suffix that its kind adds."""

    name: str
    kind: Kind
    labels: Labels
    help: str
    read: Callable[[Snapshot], Values]

    @property
    def exposed(self) -> str:
        """The name as queries have it."""
        return self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")


def distribution(histogram: Histogram) -> Distribution:
    """The histogram in the exposed buckets."""
    counts = [0] * (len(BUCKETS_S) + 1)
    for bucket in histogram.buckets:
        counts[len(BUCKETS_S) if bucket.upper_s is None else bisect_left(BUCKETS_S, bucket.upper_s)] += (
            bucket.count
        )
    cumulative, below = [], 0
    for count in counts[:-1]:
        below += count
        cumulative.append(below)
    return Distribution(tuple(cumulative), below + counts[-1], histogram.sum_ns / NS_PER_S)


def _daemon(name: str, kind: Kind, text: str, read: Callable[[Snapshot], Value | None]) -> Family:
    """A metric of the daemon as a whole; without a value where `read` returns None."""

    def values(snapshot: Snapshot) -> Values:
        value = read(snapshot)
        if value is not None:
            yield (), value

    return Family(name, kind, (), text, values)


def _device(
    name: str, kind: Kind, text: str, read: Callable[[DeviceStatus, DeviceStats], Value | None]
) -> Family:
    """A metric with a value for each device, except where `read` returns None."""

    def values(snapshot: Snapshot) -> Values:
        for status, stats in snapshot.devices:
            value = read(status, stats)
            if value is not None:
                yield (status.name,), value

    return Family(name, kind, ("device",), text, values)


def _device_words(
    name: str,
    kind: Kind,
    label: str,
    text: str,
    read: Callable[[DeviceStatus, DeviceStats], Mapping[str, float]],
) -> Family:
    """A metric with a value for each device and each of a few words."""

    def values(snapshot: Snapshot) -> Values:
        for status, stats in snapshot.devices:
            for word, value in read(status, stats).items():
                yield (status.name, word), value

    return Family(name, kind, ("device", label), text, values)


def _queues(snapshot: Snapshot) -> Iterator[tuple[Labels, QueueStats]]:
    for status, stats in snapshot.devices:
        for queue in stats.queues:
            yield (status.name, str(queue.queue)), queue


def _queue(name: str, kind: Kind, text: str, read: Callable[[QueueStats], Value]) -> Family:
    """A metric with a value for each queue."""
    return Family(
        name,
        kind,
        _QUEUE,
        text,
        lambda snapshot: ((labels, read(each)) for labels, each in _queues(snapshot)),
    )


def _counter(name: str, counter: str, text: str, kind: Kind = "counter") -> Family:
    """One of the worker's own counters, which a worker of an earlier version may lack."""
    return _queue(name, kind, text, lambda queue: queue.counters.get(counter, 0))


def _operations(name: str, text: str, read: Callable[[QueueStats], OpCounts]) -> Family:
    def values(snapshot: Snapshot) -> Values:
        for labels, queue in _queues(snapshot):
            counts = read(queue)
            for op in OpCounts.__struct_fields__:
                yield (*labels, op), getattr(counts, op)

    return Family(name, "counter", (*_QUEUE, "op"), text, values)


def _request_durations(snapshot: Snapshot) -> Values:
    for labels, queue in _queues(snapshot):
        for op in ("read", "write", "other"):
            yield (*labels, op), distribution(getattr(queue.latency, op))


def _process(name: str, kind: Kind, text: str, read: Callable[[ProcessUsage], float]) -> Family:
    return Family(
        name,
        kind,
        _PROCESS,
        text,
        lambda snapshot: ((tuple(each.owner), read(each)) for each in snapshot.processes),
    )


def _copies(snapshot: Snapshot) -> Values:
    for labels, queue in _queues(snapshot):
        for word in ("kernel", "own", "in_place"):
            yield (*labels, word), getattr(queue.copies, f"{word}_bytes")


def _device_information(status: DeviceStatus, _stats: DeviceStats) -> Mapping[str, str]:
    return {
        "path": status.path or "",
        "backend": status.backend.kind or ("its workers" if status.answers == "worker" else ""),
        "placement": status.placement,
        "recovery": status.recovery,
    }


def _has_backend(status: DeviceStatus, _stats: DeviceStats) -> float | None:
    return None if status.answers == "worker" else float(status.backend.attached)


def _pool_buffers(_status: DeviceStatus, stats: DeviceStats) -> Mapping[str, float]:
    pool = stats.pool
    stock = pool.buffer_count - pool.free_count - pool.lent_count
    return {"free": pool.free_count, "stock": max(0, stock), "lent": pool.lent_count}


def _client_slices(_status: DeviceStatus, stats: DeviceStats) -> Mapping[str, float]:
    clients = stats.clients
    if not clients.slice_bytes:
        return {}
    return {"lent": clients.lent_count, "resting": clients.resting_count, "free": clients.free_count}


def _all(*groups: Iterable[Family]) -> tuple[Family, ...]:
    return tuple(family for group in groups for family in group)


FAMILIES = _all(
    (
        _daemon(
            "ublkpool_up", "gauge", "1 if the daemon answered this scrape, else 0.", lambda s: float(s.is_up)
        ),
        _daemon(
            "ublkpool_scrape_duration_seconds",
            "gauge",
            "Time that the daemon took to answer all questions of this scrape.",
            lambda s: s.duration_s,
        ),
        _daemon(
            "ublkpool_build",
            "info",
            "The daemon's version.",
            lambda s: {"version": s.daemon.version} if s.daemon is not None else None,
        ),
        _daemon(
            "ublkpool_memory_bytes",
            "gauge",
            "Memory of all devices, prepared ones included, that counts for memory_max.",
            lambda s: s.daemon.memory_bytes if s.daemon is not None else None,
        ),
        _daemon(
            "ublkpool_memory_max_bytes",
            "gauge",
            "The budget of the devices' memory, memory_max; no value without one.",
            lambda s: (s.daemon.memory_max_bytes or None) if s.daemon is not None else None,
        ),
        _daemon(
            "ublkpool_prepared_devices",
            "gauge",
            "Prepared devices that an add can take now; no value unless some are wanted.",
            lambda s: s.daemon.prepared if s.daemon is not None and s.daemon.prepared_wanted else None,
        ),
    ),
    (
        _device(
            "ublkpool_device",
            "info",
            "The device's block device, its backend's kind, its placement and its recovery policy.",
            _device_information,
        ),
        _device(
            "ublkpool_device_state",
            "stateset",
            "The state that list shows; 1 for the state that it is in.",
            lambda status, _: {each: each == status.state for each in _STATES},
        ),
        _device(
            "ublkpool_device_served",
            "gauge",
            "1 if requests are served, 0 if list has a reason why they are not.",
            lambda status, _: float(not status.reason),
        ),
        _device(
            "ublkpool_device_backend_attached",
            "gauge",
            "1 if a backend is attached; no value where the workers answer themselves.",
            _has_backend,
        ),
        _device(
            "ublkpool_device_size_bytes",
            "gauge",
            "The size of the disk; no value before it is known.",
            lambda status, _: status.size_bytes,
        ),
        _device(
            "ublkpool_device_memory_bytes",
            "gauge",
            "Memory of the device that counts for memory_max.",
            lambda status, _: status.memory_bytes,
        ),
        _device(
            "ublkpool_device_queue_depth",
            "gauge",
            "Requests that each hardware queue can have in flight.",
            lambda status, _: status.depth,
        ),
        _device(
            "ublkpool_device_recoveries",
            "counter",
            "Replacements of the device's workers, the epoch less one: recoveries, attempts that failed, and upgrades.",
            lambda status, _: status.epoch - 1,
        ),
        _device_words(
            "ublkpool_device_cut_offs",
            "counter",
            "reason",
            "Backends cut off by this daemon, by reason.",
            lambda _, stats: {each: stats.cut_offs.get(each, 0) for each in CUT_OFF_REASONS},
        ),
        _device(
            "ublkpool_pool_size_bytes",
            "gauge",
            "Memory of the device's pool.",
            lambda _, stats: stats.pool.size_bytes,
        ),
        _device(
            "ublkpool_pool_huge_bytes",
            "gauge",
            "The part of the pool that is in huge pages.",
            lambda _, stats: stats.pool.huge_bytes,
        ),
        _device_words(
            "ublkpool_pool_buffers",
            "gauge",
            "state",
            "Buffers of the pool: free with the broker, in a queue's stock, lent to a request.",
            _pool_buffers,
        ),
        _device_words(
            "ublkpool_client_slices",
            "gauge",
            "state",
            "Slices of client_buffers: lent to a client, resting after a client's end, free.",
            _client_slices,
        ),
    ),
    (
        _operations("ublkpool_requests", "Requests answered, failed ones included.", lambda q: q.requests),
        _operations(
            "ublkpool_request_bytes", "Bytes of the requests answered without an error.", lambda q: q.bytes
        ),
        _operations("ublkpool_request_errors", "Requests answered with an error.", lambda q: q.failed),
        _queue(
            "ublkpool_requests_in_flight", "gauge", "Requests with the worker now.", lambda q: q.in_flight
        ),
        _queue(
            "ublkpool_oldest_request_age_seconds",
            "gauge",
            "Time since the oldest request arrived in the worker, to half a second; 0 without one; "
            "stands still while the worker is stopped or dead.",
            lambda q: q.oldest_request_s,
        ),
        Family(
            "ublkpool_request_duration_seconds",
            "histogram",
            (*_QUEUE, "op"),
            "From a request's arrival in the worker to its commit.",
            _request_durations,
        ),
        _queue(
            "ublkpool_buffer_wait_seconds",
            "histogram",
            "Waits of a request for a buffer of the pool, or for a region that its backend names.",
            lambda q: distribution(q.latency.buffer_wait),
        ),
        _queue(
            "ublkpool_backend_duration_seconds",
            "histogram",
            "From the moment that a request was first handed to a backend to the answer, over backends' deaths.",
            lambda q: distribution(q.latency.backend),
        ),
        _queue("ublkpool_buffers_held", "gauge", "Pool buffers of the queue.", lambda q: q.buffers_held),
        _counter("ublkpool_buffers_lent", "buffers_lent", "Pool buffers with a request now.", "gauge"),
        _counter(
            "ublkpool_requests_waiting_for_buffer",
            "buffers_waiting",
            "Requests that wait for a buffer now.",
            "gauge",
        ),
        _counter("ublkpool_buffer_waits", "buffers_waited", "Times that a request had to wait for a buffer."),
        Family(
            "ublkpool_copied_bytes",
            "counter",
            (*_QUEUE, "by"),
            "Bytes copied once by the kernel, copied by ublkpool itself (own), and not copied (in_place).",
            _copies,
        ),
        _counter(
            "ublkpool_requeues", "requeues", "Writes of which the kernel could copy nothing and sent again."
        ),
        _counter(
            "ublkpool_short_copies", "short_copies", "Writes of which the kernel copied less than announced."
        ),
        _counter("ublkpool_replays", "replays", "Requests sent again to a backend's successor."),
        _counter(
            "ublkpool_rescues", "rescues", "Writes whose data was copied out of a dead backend's segment."
        ),
        _counter("ublkpool_timeouts", "timeouts", "Requests past io_timeout."),
        _counter("ublkpool_violations", "violations", "Times that the worker cut a backend off."),
        _counter("ublkpool_hangups", "hangups", "Backends whose connection ended while they served."),
        _counter(
            "ublkpool_strangers", "strangers", "Refused connections and dropped frames of other processes."
        ),
        _counter("ublkpool_stale_answers", "stale_answers", "Dropped answers to requests that were over."),
        _counter(
            "ublkpool_unsupported_requests", "unsupported", "Requests of a kind or size that is not served."
        ),
    ),
    (
        _process(
            "ublkpool_process_cpu_seconds",
            "counter",
            "CPU time of a process of the daemon, in user and kernel mode.",
            lambda each: each.cpu_s,
        ),
        _process(
            "ublkpool_process_resident_memory_bytes",
            "gauge",
            "Resident memory of a process of the daemon; each process counts the shared pools that it has mapped.",
            lambda each: each.resident_bytes,
        ),
        _process(
            "ublkpool_process_start_time_seconds",
            "gauge",
            "Start of a process of the daemon, in seconds since the epoch.",
            lambda each: each.start_s,
        ),
    ),
)
