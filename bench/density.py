"""How fast devices come and go beside kublk's and nbd-client's, and what many idle ones take.

All devices have one queue, depth 128 and requests up to 512 KiB, and the engine `null`; nbd-client has one connection
to an nbdkit that runs.  An add ends when the node has been opened and read, a del when the node is gone, or
disconnected.  Contestants take turns, so that a busy host hits all alike.
"""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.cells import REGION_BYTES
from bench.density_results import Density, Life, Part, Whole
from bench.measure import FAILURES
from bench.nbd_clients import shared_nbdkit
from bench.peers import load_module, nbd_client
from bench.stage import Stage, run, wait_for
from support.vm.daemon import Daemon
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig

IDLE_S = 5.0
SMALL_POOL_BYTES = 1 << 20
"""Of the many devices, so that a small machine holds them; their number of buffers changes no other memory."""
COUNTS = (1, 10, 100, 1000)
PREPARED = "[prepare]\ncount = 1\npartitions = false\n"
_SINK = "/memfd:ublkpool-sink"
"""A worker's scratch buffer."""
Say = Callable[[str], None]


def measure_density(
    stage: Stage, density: Density, say: Say, keep: Callable[[Density], None], devices: int, rounds: int
) -> None:
    """Run both parts; a failure does not end the other one."""
    for part in (partial(_lives, rounds=rounds), partial(_many, devices=devices)):
        try:
            part(stage, density, say)
        except FAILURES as error:
            density.errors.append(" ".join(str(error).split())[:300])
            say(f"FAILED: {density.errors[-1]}")
        keep(density)


def _config(name: str, **config: Any) -> DeviceConfig:
    backend = BackendConfig(kind="null", options={"size": str(REGION_BYTES)}, cwd="/")
    return DeviceConfig(name=name, backend=backend, **config)


class _Way(NamedTuple):
    """How a device of ours is added: by which daemon, and with which config."""

    daemon: Daemon
    config: Callable[[str], DeviceConfig]


def _lives(stage: Stage, density: Density, say: Say, rounds: int) -> None:
    daemon, preparing = stage.daemon, stage.other_daemon("prepared", PREPARED)
    fast = partial(_config, isolation="none", partitions=False)
    ours = {
        "isolation none": _Way(daemon, partial(_config, isolation="none")),
        "isolation none, no partition scan": _Way(daemon, fast),
        "the same, prepared": _Way(preparing, fast),
        "isolation process": _Way(daemon, _config),
    }
    for number in range(rounds):
        density.lives += [_kublk(stage), _nbd(stage)]
        density.lives += [_of_ours(what, way, f"life{number}") for what, way in ours.items()]
    for each in density.lives[-len(ours) - 2 :]:
        say(f"{each.what}: add {each.add_ms:.0f} ms, del {each.del_ms:.0f} ms")


def _of_ours(what: str, way: _Way, name: str) -> Life:
    client = way.daemon.client
    wanted = client.daemon().prepared_wanted
    wait_for(lambda: client.daemon().prepared == wanted, "devices are prepared")
    begun_s = time.monotonic()
    status = client.add(way.config(name))
    assert status.path is not None
    _read(status.path)
    added_s = time.monotonic()
    client.delete([name])
    _await_gone(status.path)
    return _life(what, begun_s, added_s, time.monotonic())


def _kublk(stage: Stage) -> Life:
    number = stage.next_number()
    node = f"/dev/ublkb{number}"
    begun_s = time.monotonic()
    run(stage.kublk, "add", "-t", "null", "-q", "1", "-d", "128", "-n", str(number))
    _read(node)
    added_s = time.monotonic()
    run(stage.kublk, "del", "-n", str(number))
    _await_gone(node)
    return _life("kublk", begun_s, added_s, time.monotonic())


def _nbd(stage: Stage) -> Life:
    load_module("nbd")
    socket, _pid = shared_nbdkit(stage)
    begun_s = time.monotonic()
    with nbd_client(socket, connections=1) as node:
        _read(node)
        added_s = time.monotonic()
    connected = Path(f"/sys/block/{Path(node).name}/pid")
    wait_for(lambda: not connected.exists(), f"{node} is disconnected")
    return _life("nbd-client", begun_s, added_s, time.monotonic())


def _life(what: str, begun_s: float, added_s: float, gone_s: float) -> Life:
    return Life(what=what, add_ms=(added_s - begun_s) * 1e3, del_ms=(gone_s - added_s) * 1e3)


def _read(node: str) -> None:
    wait_for(Path(node).exists, f"{node} exists")
    fd = os.open(node, os.O_RDONLY)
    try:
        os.read(fd, 4096)
    finally:
        os.close(fd)


def _await_gone(node: str) -> None:
    wait_for(lambda: not Path(node).exists(), f"{node} is gone")


def _many(stage: Stage, density: Density, say: Say, devices: int) -> None:
    client = stage.daemon.client
    names: list[str] = []
    free_kib = _available_kib()
    try:
        for count in sorted({*(each for each in COUNTS if each < devices), devices}):
            for number in range(len(names), count):
                names.append(f"many{number}")
                begun_s = time.monotonic()
                status = client.add(_config(names[-1], isolation="none", pool_bytes=SMALL_POOL_BYTES))
                assert status.path is not None
                _read(status.path)
                density.adds_ms.append((time.monotonic() - begun_s) * 1e3)
            _idle(stage, density, free_kib, count)
            say(f"{count} devices: the last took {density.adds_ms[-1]:.0f} ms")
    finally:
        for name in names:
            begun_s = time.monotonic()
            with suppress(*FAILURES):
                client.delete([name])
            density.dels_ms.append((time.monotonic() - begun_s) * 1e3)
    say(f"{len(names)} devices are gone: the last took {density.dels_ms[-1]:.0f} ms")


def _idle(stage: Stage, density: Density, free_kib: int, devices: int) -> None:
    """What the processes of this many devices take while nothing happens."""
    client = stage.daemon.client
    pool_bytes = sum(each.pool.size_bytes for each in client.stats())
    whole = Whole(
        devices=devices,
        used_kib_each=(free_kib - _available_kib()) / devices,
        pool_kib_each=pool_bytes / 1024 / devices,
    )
    density.wholes.append(whole)
    found = {each.role: [each.pid] for each in client.daemon().processes}
    found["worker"] = [each.pid for device in client.devices() for each in device.workers]
    # The question itself has woken the daemon.
    time.sleep(1.0)
    before = {part: _wakes(pids) for part, pids in found.items()}
    time.sleep(IDLE_S)
    after = {part: _wakes(pids) for part, pids in found.items()}
    for part, pids in found.items():
        wakes = (after[part] - before[part]) / IDLE_S / len(pids)
        density.parts.append(_part(devices, part, pids, wakes))


def _part(devices: int, part: str, pids: list[int], wakes_per_s: float) -> Part:
    pages = [pages_of(Path(f"/proc/{pid}/smaps").read_text().splitlines()) for pid in pids]
    count = len(pids)
    return Part(
        devices=devices,
        part=part,
        processes=count,
        threads=sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids) / count,  # noqa: PTH208
        descriptors=sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids) / count,  # noqa: PTH208
        own_kib=sum(each.own_kib for each in pages) / count,
        pool_kib=sum(each.pool_kib for each in pages) / count,
        wakes_per_s=wakes_per_s,
    )


class Pages(NamedTuple):
    """A process's private pages."""

    own_kib: int
    pool_kib: int


def pages_of(lines: Iterable[str]) -> Pages:
    """The private pages in the lines of /proc/PID/smaps: those of the pool's files, and all others."""
    own = pool = 0
    in_pool = False
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):
            name = words[5] if len(words) > 5 else ""
            in_pool = name.startswith(("/memfd:", "/dev/shm/ublkpool")) and not name.startswith(_SINK)
        elif words[0] in ("Private_Dirty:", "Private_Clean:", "Private_Hugetlb:"):
            if in_pool:
                pool += int(words[1])
            else:
                own += int(words[1])
    return Pages(own, pool)


def _wakes(pids: list[int]) -> int:
    return sum(
        int(line.split()[1])
        for pid in pids
        for status in Path(f"/proc/{pid}/task").glob("*/status")
        for line in status.read_text().splitlines()
        if line.startswith("voluntary_ctxt_switches")
    )


def _available_kib() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
