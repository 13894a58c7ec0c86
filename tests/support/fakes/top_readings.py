"""Readings of a daemon with believable devices, for the screen of `ublkpool top`; the same in each run."""

import math
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from ublkpool.daemon.cli.top.reading import Reading, Share
from ublkpool.daemon.events.event import Event, make_event, shown_time
from ublkpool.daemon.events.kinds import (
    BackendDied,
    BackendRefused,
    BackendReplaced,
    Details,
    DeviceFailed,
    RecoveryBegun,
    RecoveryEnded,
    WorkerDied,
)
from ublkpool.daemon.latency import BOUNDS_NS, from_counts, merge, merge_latencies
from ublkpool.daemon.metrics.usage import Owner
from ublkpool.daemon.rates import Meter
from ublkpool.daemon.status import (
    BackendStatus,
    DaemonStatus,
    DeviceStats,
    DeviceStatus,
    Histogram,
    Latencies,
    OpCounts,
    PoolStats,
    ProcessStatus,
    QueueStats,
    State,
    WorkerStatus,
)
from ublkpool.ublk.calls import ffi
from ublkpool.ublk.statistics import read_statistics

BEGIN_S = 1_795_719_454.0
"""2026-11-26T18:57:34Z."""

_COUNTERS = tuple(read_statistics(bytes(ffi.sizeof("struct uq_block"))).counters)
"""The names of a queue's counters, as its worker has them."""
DEATH = "its worker ended: killed by SIGKILL"
ABSENT = "no backend is attached, requests wait"
REFUSED = (
    "device vm-old is served from /srv/old.img, this backend brings /srv/new.img: bring the first one back, "
    "or accept this one with: ublkpool rebind vm-old"
)
_WORKER_DIED = WorkerDied(queue=1, pid=2079, reason=f"queue 1: {DEATH}")
_RECOVERED = RecoveryEnded(served=True, epoch=2, seconds=0.8, replayed=17)
_REPLACED = BackendReplaced(kind="nbd", pid=3108, earlier_pid=3092, seconds=1.9, replayed=6)


class Load(NamedTuple):
    """What a device does in a second, and how long its requests take at the median."""

    name: str
    reads: float
    writes: float
    request_bytes: int
    median_us: float
    queues: int = 1
    size_gib: int = 10
    kind: str | None = "file"
    state: State = "live"
    reason: str = ""
    epoch: int = 1
    iops_max: int = 0
    buffers: int = 64
    """Of each queue."""


LOADS = (
    Load("db-data", 41200, 14500, 8192, 480, 4, 512, "file"),
    Load("db-journal", 6, 5850, 16384, 190, 1, 16, "file"),
    Load("images", 910, 64, 262144, 9400, 4, 2048, "s3", epoch=2, buffers=8),
    Load("mirror", 0, 0, 4096, 80, 1, 100, "nbd", "recovering", f"queue 0: {DEATH}; {ABSENT}", 3),
    Load("scratch", 66400, 31800, 4096, 310, 2, 64, "memory", buffers=24),
    Load("vm-alpine", 196, 141, 8192, 260, 1, 20, "nbd", iops_max=500),
    Load("vm-build", 3740, 6630, 32768, 820, 2, 80, "nbd"),
    Load("vm-old", 0, 0, 4096, 80, 1, 20, None, "waiting", REFUSED),
    Load("vm-web", 2520, 388, 8192, 330, 2, 40, "nbd"),
    Load("wiki", 0, 0, 4096, 80, 1, 8, "http", "failed", f"queue 0: {DEATH}"),
)


def readings(loads: Sequence[Load] = LOADS, interval_s: float = 1.0) -> Iterator[Reading]:
    """A reading for each interval, the first of which ends none."""
    meter, totals = Meter(), {each.name: [_idle(queue) for queue in range(each.queues)] for each in loads}
    second = 0
    while True:
        now = [_stats(load, totals[load.name], second, interval_s) for load in loads]
        interval = meter.read(now, second * interval_s, shown_time(BEGIN_S + second * interval_s))
        shares = {owner: share for load in loads for owner, share in _shares(load, second)}
        events = _story(second)
        yield Reading(
            interval, [_status(load, at) for at, load in enumerate(loads)], _daemon(), shares, events
        )
        second += 1


def reading(count: int, loads: Sequence[Load] = LOADS) -> list[Reading]:
    """The first readings."""
    return list(islice(readings(loads), count))


def _idle(queue: int) -> QueueStats:
    return QueueStats(queue=queue)


def _stats(load: Load, queues: list[QueueStats], second: int, interval_s: float) -> DeviceStats:
    chance = random.Random(f"{load.name} {second}")
    is_served = load.state == "live"
    if second:
        for number, before in enumerate(queues):
            queues[number] = _grown(load, before, second, interval_s, chance) if is_served else before
    count = load.buffers * load.queues
    lent = min(count, sum(each.in_flight for each in queues))
    held = min(count, lent + 12 * load.queues)
    return DeviceStats(
        name=load.name,
        reason=load.reason,
        queues=tuple(queues) if load.state != "waiting" else (),
        pool=PoolStats(
            size_bytes=count * 262144,
            buffer_count=count,
            free_count=count - held,
            lent_count=lent,
            waiting_count=sum(max(0, each.in_flight - load.buffers) for each in queues),
        ),
        cut_offs={"silence": 1} if load.name == "images" else {},
        latency=merge_latencies([each.latency for each in queues]),
    )


def _grown(
    load: Load, before: QueueStats, second: int, interval_s: float, chance: random.Random
) -> QueueStats:
    # A wave, so that sparklines have a shape, with a few slow moments.
    wave = 1 + 0.35 * math.sin(second / 5 + len(load.name)) + chance.uniform(-0.08, 0.08)
    slow = 3.5 if chance.random() < 0.07 else wave
    reads, writes = (round(each * wave * interval_s / load.queues) for each in (load.reads, load.writes))
    counts = {"read": reads, "write": writes, "other": writes // 40}
    waits = (reads + writes) // 25 if load.buffers < 64 else 0
    grown = {
        kind: _durations(count, load.median_us * slow * factor, chance)
        for kind, count, factor in (
            ("read", counts["read"], 1.0),
            ("write", counts["write"], 1.4),
            ("other", counts["other"], 6.0),
            ("buffer_wait", waits, 0.5),
            ("backend", reads + writes, 0.8),
        )
    }
    replays = 17 if load.epoch > 1 and before.queue == 1 else 0
    in_flight = max(1, round((reads + writes) / interval_s * load.median_us * slow * 1.5e-6))
    return QueueStats(
        queue=before.queue,
        requests=_plus(before.requests, reads, writes, counts["other"]),
        bytes=_plus(before.bytes, reads * load.request_bytes, writes * load.request_bytes, 0),
        in_flight=in_flight,
        oldest_request_s=0.5 if load.kind == "s3" else 0.0,
        buffers_held=min(load.buffers, in_flight + 12),
        buffers_waited=before.buffers_waited + waits,
        counters={name: replays if name == "replays" else 0 for name in _COUNTERS},
        latency=Latencies(
            **{kind: merge((getattr(before.latency, kind), each)) for kind, each in grown.items()}
        ),
    )


def _plus(before: OpCounts, reads: int, writes: int, flushes: int) -> OpCounts:
    return OpCounts(read=before.read + reads, write=before.write + writes, flush=before.flush + flushes)


def _durations(count: int, median_us: float, chance: random.Random) -> Histogram:
    """So many durations around the median, with a long tail, counted as the workers count them."""
    counts = [0] * (len(BOUNDS_NS) + 1)
    samples = min(count, 100)
    for number in range(samples):
        duration_ns = median_us * 1000 * math.exp(chance.gauss(0, 0.45) + (1.2 if number % 50 == 49 else 0))
        bucket = bisect_left(BOUNDS_NS, duration_ns)
        counts[bucket] += count // samples + (number < count % samples)
    return from_counts(counts, round(count * median_us * 1000))


def _status(load: Load, at: int) -> DeviceStatus:
    attached = load.kind is not None and load.state == "live"
    return DeviceStatus(
        name=load.name,
        id=at,
        path=f"/dev/ublkb{at}" if load.state != "waiting" else None,
        state=load.state,
        size_bytes=load.size_gib << 30,
        queues=load.queues,
        depth=128,
        need_get_data=True,
        placement="backend" if load.kind == "memory" else "pool",
        recovery="reissue",
        workers=tuple(
            WorkerStatus(queue=queue, pid=2100 + 10 * at + queue, cpu=queue) for queue in range(load.queues)
        ),
        backend=BackendStatus(kind=load.kind, pid=3100 + at if load.kind else None, attached=attached),
        reason=load.reason,
        epoch=load.epoch,
        iops_max=load.iops_max,
        burst_s=1.0 if load.iops_max else 0.0,
    )


def _daemon() -> DaemonStatus:
    return DaemonStatus(version="0.1.0", processes=(ProcessStatus(role="supervisor", pid=2000),))


def _shares(load: Load, second: int) -> Iterator[tuple[Owner, Share]]:
    chance = random.Random(f"cpu {load.name} {second}")
    busy = (load.reads + load.writes) / load.queues / 90_000
    for queue in range(load.queues):
        yield Owner("worker", load.name, str(queue)), Share(busy * chance.uniform(0.9, 1.1), 19 << 20)
    if load.kind and load.state == "live":
        yield Owner("backend", load.name), Share(busy * 2.2 * chance.uniform(0.9, 1.1), 46 << 20)
    if load.name == "db-data":
        yield Owner("supervisor"), Share(0.008, 38 << 20)
        yield Owner("broker"), Share(0.012, 24 << 20)


def _story(second: int) -> list[Event]:
    """What has happened by the first reading, and at later ones."""
    told = _BEFORE if second == 0 else tuple(each for each in _LATER if each[0] == second)
    return [
        make_event(100 + second + number, BEGIN_S + at, name, details, text, None)
        for number, (at, name, details, text) in enumerate(told)
    ]


_Told = tuple[int, str, Details, str]
_BEFORE: tuple[_Told, ...] = (
    (-2915, "images", _WORKER_DIED, _WORKER_DIED.reason),
    (-2914, "images", _RECOVERED, "recovered, epoch 2, after 0.8 s, 17 requests are sent again"),
    (-610, "vm-old", BackendRefused(reason=REFUSED), REFUSED),
)
_LATER: tuple[_Told, ...] = (
    (
        31,
        "vm-web",
        BackendDied(kind="nbd", pid=3092, was_cut_off=False),
        "backend nbd has ended (process 3092)",
    ),
    (
        33,
        "vm-web",
        _REPLACED,
        "backend nbd (process 3108) serves in the place of process 3092, after 1.9 s; requests sent again: 6",
    ),
    (
        44,
        "wiki",
        DeviceFailed(reason=f"queue 0: {DEATH}"),
        f"queue 0: {DEATH}",
    ),
    (
        59,
        "mirror",
        RecoveryBegun(reason=f"queue 0: {DEATH}", epoch=2),
        f"queue 0: {DEATH}; recovering",
    ),
)
