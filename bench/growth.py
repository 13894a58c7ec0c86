"""The cost of a request as devices, depth and size grow, and with a pool that is nearly empty.

All runs use the backend `null`, so that any growth is ublkpool's.  Cost is CPU time per request that the driver saw;
flat is good.
"""

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.accounts import Books, busy_share, memory_of, parts_shares
from bench.cells import REGION_BYTES, Cell
from bench.exact import instructions
from bench.growth_results import Growth, Idle, Step, Timing
from bench.measure import FAILURES, syscalls_of
from bench.stage import Disk, Stage
from bench.syscalls import SyscallsError
from bench.watched import run_fio
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.daemon.status import DeviceStatus

DEPTHS = (1, 8, 32, 128, 1024, 4096)
BLOCKS = tuple(4096 << shift for shift in range(0, 11, 2))
"""Bytes: 4 KiB to 4 MiB."""
DEVICES = (1, 4, 16, 64)
SMALL_POOL_BYTES = 1 << 20
_AT_A_TIME = 4
_WARM_S = 1.0
_EXACT_S, _EXACT_S_PER_DEVICE = 0.2, 0.05
"""Reading the counters of 64 devices takes a tenth of a second of instructions."""
Say = Callable[[str], None]


def grow(
    stage: Stage,
    growth: Growth,
    say: Say,
    keep: Callable[[Growth], None],
    devices_max: int,
    only: str = "",
) -> None:
    """Run every axis whose name matches the regular expression `only`; a failure does not end the others."""
    axes: dict[str, Callable[[Stage, Growth, Say], None]] = {
        "depth": _depths,
        "bytes": _blocks,
        "pool": _pools,
        "devices": partial(_devices, devices_max=devices_max),
    }
    for name, axis in axes.items():
        if not re.search(only, name):
            continue
        try:
            axis(stage, growth, say)
        except FAILURES as error:
            growth.errors.append(f"{name}: {' '.join(str(error).split())[:300]}")
            say(f"FAILED: {growth.errors[-1]}")
        keep(growth)


def _cell(block_bytes: int = 4096, depth: int = 32, jobs: int = 1) -> Cell:
    return Cell("growth", "randwrite", block_bytes, depth, jobs, "IOPS")


def _depths(stage: Stage, growth: Growth, say: Say) -> None:
    for depth in DEPTHS:
        with _device(stage, f"depth{depth}", depth=depth) as disk:
            _step(stage, growth, say, "depth", depth, disk, _cell(depth=depth))


def _blocks(stage: Stage, growth: Growth, say: Say) -> None:
    with _device(stage, "blocks", max_io_bytes=BLOCKS[-1]) as disk:
        _allow(disk.node, BLOCKS[-1])
        for block_bytes in BLOCKS:
            _step(stage, growth, say, "bytes a request", block_bytes, disk, _cell(block_bytes, depth=8))


def _allow(node: str, request_bytes: int) -> None:
    """Let the block layer send requests of this size without splitting them."""
    Path(f"/sys/block/{Path(node).name}/queue/max_sectors_kb").write_text(str(request_bytes >> 10))


def _pools(stage: Stage, growth: Growth, say: Say) -> None:
    """The default pool, and one with fewer buffers than requests in flight."""
    for name, pool_bytes in (("derived", None), ("small", SMALL_POOL_BYTES)):
        with _device(stage, f"pool-{name}", pool_bytes=pool_bytes) as disk:
            size_bytes = stage.daemon.stats(disk.device).pool.size_bytes
            _step(stage, growth, say, "bytes of pool, depth 128", size_bytes, disk, _cell(depth=128))


def _devices(stage: Stage, growth: Growth, say: Say, devices_max: int) -> None:
    names: list[str] = []
    try:
        for count in (each for each in DEVICES if each <= devices_max):
            more = [f"many{number}" for number in range(len(names), count)]
            names += more
            seconds = _timed(partial(_add_all, stage, more))
            growth.timings.append(Timing(what=f"devices added: {len(more)}", seconds=seconds))
            say(f"{count} devices after {seconds:.1f} s more")
            growth.idle += _idle(stage, names)
            disks = [_disk(stage, status) for status in stage.daemon.client.devices() if status.name in names]
            _step(stage, growth, say, "devices, I/O on one", count, disks[0], _cell())
            # Each has the depth of the single one.
            _step(stage, growth, say, "devices, I/O on all", count, _together(disks), _cell(depth=32 * count))
    finally:
        seconds = _timed(partial(stage.daemon.client.delete, names))
        growth.timings.append(Timing(what=f"devices deleted: {len(names)}", seconds=seconds))


def _timed(action: Callable[[], object]) -> float:
    started_s = time.monotonic()
    action()
    return time.monotonic() - started_s


def _config(name: str, **config: Any) -> DeviceConfig:
    backend = BackendConfig(kind="null", options={"size": str(REGION_BYTES)}, cwd="/")
    return DeviceConfig(name=name, backend=backend, **config)


def _add_all(stage: Stage, names: list[str]) -> None:
    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        for added in [threads.submit(stage.daemon.client.add, _config(name)) for name in names]:
            added.result()


@contextmanager
def _device(stage: Stage, name: str, **config: Any) -> Iterator[Disk]:
    status = stage.daemon.client.add(_config(name, **config))
    try:
        yield _disk(stage, status)
    finally:
        stage.daemon.client.delete([name], force=True)


def _disk(stage: Stage, status: DeviceStatus) -> Disk:
    assert status.path is not None and status.backend.pid is not None
    workers = [each.pid for each in status.workers]
    return Disk(status.path, {"worker": workers, "backend": [status.backend.pid]}, status.name)


def _together(disks: list[Disk]) -> Disk:
    """All disks as one for fio, which takes a list of nodes; counters are those of the first."""
    parts = {part: [pid for each in disks for pid in each.parts[part]] for part in ("worker", "backend")}
    return Disk(":".join(each.node for each in disks), parts, disks[0].device)


def _step(stage: Stage, growth: Growth, say: Say, axis: str, at: int, disk: Disk, cell: Cell) -> None:
    before = _enters(stage, disk)
    numbers, books = run_fio(disk, cell, _exact_s(disk) if growth.exact else _WARM_S)
    enters, requests = (new - old for new, old in zip(_enters(stage, disk), before, strict=True))
    first, second = books
    done = max(1, second.requests - first.requests)
    spent = _exact_us(books, numbers.iops) if growth.exact else _cpu_us(books, done)
    step = Step(
        axis=axis,
        at=at,
        iops=numbers.iops,
        machine_us=sum(second.machine - first.machine) * 1e6 / done,
        worker_us=spent["worker"],
        backend_us=spent["backend"],
        busy=busy_share(first, second, growth.cpus),
        enters=enters / max(1, requests),
        syscalls={} if growth.exact else _syscalls(disk, cell),
    )
    growth.steps.append(step)
    spoken = (
        f"{instructions(step.iops):,.0f} instructions a request"
        if growth.exact
        else f"{step.iops:,.0f} IOPS, {step.machine_us:.0f} us CPU a request"
    )
    say(f"{axis} {at:,}: {spoken}")


def _exact_s(disk: Disk) -> float:
    return max(_EXACT_S, _EXACT_S_PER_DEVICE * len(disk.node.split(":")))


def _exact_us(books: tuple[Books, Books], iops: float) -> dict[str, float]:
    return {part: share * 1e6 / iops for part, share in parts_shares(*books, cpus=1).items()}


def _cpu_us(books: tuple[Books, Books], requests: int) -> dict[str, float]:
    first, second = books
    return {part: sum(second.parts[part] - first.parts[part]) * 1e6 / requests for part in second.parts}


def _syscalls(disk: Disk, cell: Cell) -> dict[str, float]:
    """Counted in a run of its own; empty on a kernel that cannot count."""
    try:
        return syscalls_of(disk, cell, _WARM_S)
    except SyscallsError:
        return {}


def _enters(stage: Stage, disk: Disk) -> tuple[int, int]:
    queues = stage.daemon.stats(disk.device).queues
    requests = sum(each.requests.read + each.requests.write for each in queues)
    return sum(each.counters["enters"] for each in queues), requests


def _idle(stage: Stage, names: list[str]) -> list[Idle]:
    devices = stage.daemon.client.devices()
    parts = {
        "worker": [each.pid for device in devices for each in device.workers],
        "backend": [device.backend.pid for device in devices if device.backend.pid],
        "supervisor": [stage.daemon.pid],
        "broker": [stage.daemon.broker_pid],
    }
    return [_idle_part(len(names), part, pids) for part, pids in parts.items()]


def _idle_part(devices: int, part: str, pids: list[int]) -> Idle:
    found = [memory_of(pid) for pid in pids]
    return Idle(
        devices=devices,
        part=part,
        processes=len(pids),
        pss_kib=sum(each.pss_kib for each in found) / len(found),
        uss_kib=sum(each.uss_kib for each in found) / len(found),
    )
