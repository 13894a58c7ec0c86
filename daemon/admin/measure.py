"""A device's counters, read from the control segment that its workers write, without a message to a process.

Owns the mapping from the workers' counters to `stats --json`.
"""

from collections.abc import Sequence

from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.wire import Op
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.latency import from_counts, merge_latencies
from ublkpool.daemon.status import CopyStats, DeviceStats, Latencies, OpCounts, PoolStats, QueueStats
from ublkpool.ublk.statistics import Statistics, read_statistics


def device_stats(device: Device) -> DeviceStats:
    """The device's counters now; without queues and pool before the device has started."""
    if device.arena is None:
        return DeviceStats(
            name=device.config.name,
            reason=device.trouble,
            memory_bytes=device.memory_bytes,
            cut_offs=device.cut_offs,
        )
    arena = device.arena
    read = [read_statistics(arena.control.statistics_block(queue)) for queue in range(arena.queues)]
    queues = tuple(_queue_stats(queue, each) for queue, each in enumerate(read))
    return DeviceStats(
        name=device.config.name,
        reason=device.trouble,
        queues=queues,
        pool=_pool_stats(arena, read),
        clients=device.client_stats(),
        memory_bytes=device.memory_bytes,
        latency=merge_latencies([queue.latency for queue in queues]),
        cut_offs=device.cut_offs,
    )


def _queue_stats(queue: int, read: Statistics) -> QueueStats:
    counters = read.counters
    return QueueStats(
        queue=queue,
        requests=_by_op(read.requests),
        bytes=_by_op(read.moved_bytes),
        errors=counters["errors"],
        failed=_by_op(read.failed),
        in_flight=counters["in_flight"],
        # Deadlines are judged only while requests are in flight.
        oldest_request_s=counters["oldest_ms"] / 1000 if counters["in_flight"] else 0.0,
        buffers_held=counters["buffers_held"],
        buffers_waited=counters["buffers_waited"],
        copies=CopyStats(
            kernel_bytes=counters["kernel_write_bytes"] + counters["kernel_read_bytes"],
            own_bytes=counters["own_copy_bytes"],
            in_place_bytes=counters["zero_copy_bytes"],
        ),
        counters=counters,
        latency=Latencies(**{name: from_counts(*each) for name, each in read.latencies.items()}),
    )


def _by_op(values: Sequence[int]) -> OpCounts:
    return OpCounts(**{op.name.lower(): values[op] for op in Op})


def _pool_stats(arena: Arena, read: Sequence[Statistics]) -> PoolStats:
    def total(name: str) -> int:
        return sum(each.counters[name] for each in read)

    count = arena.geometry.slot_count
    return PoolStats(
        size_bytes=arena.geometry.total_bytes,
        huge_bytes=arena.huge_bytes,
        buffer_count=count,
        free_count=count - total("buffers_held"),
        lent_count=total("buffers_lent"),
        waiting_count=total("buffers_waiting"),
        lent_total=total("lent_total"),
        returned_total=total("returned_total"),
    )
