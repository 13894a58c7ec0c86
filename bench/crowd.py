"""What many devices of one machine take while they are idle, and whether each of them is the disk that it should be.

All have one queue, depth 128, requests up to 512 KiB, `isolation = "none"` and the engine `memory`.
"""

import mmap
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bench.density_results import Density, Part, Whole
from bench.measure import FAILURES
from bench.stage import Stage, read_first_block, wait_for
from support.threads import of_each_thread
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig

IDLE_S = 5.0
SIZE_BYTES = 2 << 20
"""Of a disk, whose memory the engine takes at once: a thousand of them fit into a guest."""
SMALL_POOL_BYTES = 1 << 20
"""Of the devices, so that a small machine holds them; their number of buffers changes no other memory."""
COUNTS = (1, 10, 100, 1000)
BLOCK_BYTES = 4096
_SAY_EVERY = 100
_WRITES_EACH = 2
"""Random writes for each device."""
_SINK = "/memfd:ublkpool-sink"
"""A worker's scratch buffer."""
Say = Callable[[str], None]


def measure_crowd(
    stage: Stage, density: Density, say: Say, devices: int, keep: Callable[[Density], None]
) -> None:
    """Add devices one after another, look at idle ones, write to and read from random ones, and delete all.

    `keep` gets what has been measured so far, so that a run that is ended early has shown that much.

    Raises `AssertionError` if a device has read what another one was given, or something is left of them.
    """
    free_kib = _available_kib()
    nodes: list[str] = []
    try:
        for count in sorted({*(each for each in COUNTS if each < devices), devices}):
            _add(stage, density, say, nodes, count)
            _idle(stage, density, free_kib, count)
            keep(density)
        density.checked_blocks = check_random_blocks(nodes, random.Random(devices), _WRITES_EACH * devices)
        say(f"{density.checked_blocks} random blocks of them: each reads what was written to it")
    except FAILURES as error:
        # It is told after they are gone, which takes long.
        say(f"{len(nodes)} devices live, then: {error}")
        raise
    finally:
        keep(density)
        _delete(stage, density, say, len(nodes))
    wait_for(lambda: not stage.daemon.leftovers(), "nothing is left of the devices")
    say(f"{len(nodes)} devices are gone: the last took {density.dels_ms[-1]:.0f} ms")


def _name(number: int) -> str:
    return f"many{number}"


def _add(stage: Stage, density: Density, say: Say, nodes: list[str], count: int) -> None:
    """Add devices until there are so many."""
    for number in range(len(nodes), count):
        begun_s = time.monotonic()
        status = stage.daemon.client.add(_config(_name(number)))
        assert status.path is not None
        read_first_block(status.path)
        density.adds_ms.append((time.monotonic() - begun_s) * 1e3)
        nodes.append(status.path)
        if len(nodes) == count or len(nodes) % _SAY_EVERY == 0:
            say(f"{len(nodes)} devices: the last took {density.adds_ms[-1]:.0f} ms")


def _delete(stage: Stage, density: Density, say: Say, count: int) -> None:
    """Delete the first `count` devices; what is left of one that cannot be deleted is found later."""
    for number in range(count):
        begun_s = time.monotonic()
        with suppress(*FAILURES):
            stage.daemon.client.delete([_name(number)])
        density.dels_ms.append((time.monotonic() - begun_s) * 1e3)
        if (number + 1) % _SAY_EVERY == 0:
            say(f"{number + 1} are deleted: the last took {density.dels_ms[-1]:.0f} ms")


def _config(name: str) -> DeviceConfig:
    backend = BackendConfig(kind="memory", options={"size": str(SIZE_BYTES)}, cwd="/")
    return DeviceConfig(name=name, backend=backend, isolation="none", pool_bytes=SMALL_POOL_BYTES)


def check_random_blocks(nodes: list[str], choice: random.Random, writes: int) -> int:
    """Write that many random blocks, then read all of them; returns how many different ones there were.

    Raises `AssertionError` that names a node that reads something else.
    """
    written: dict[tuple[str, int], bytes] = {}
    with mmap.mmap(-1, BLOCK_BYTES) as block:
        for _ in range(writes):
            place = choice.choice(nodes), choice.randrange(SIZE_BYTES // BLOCK_BYTES) * BLOCK_BYTES
            written[place] = block[:] = choice.randbytes(BLOCK_BYTES)
            with _direct(place[0]) as fd:
                assert os.pwritev(fd, [block], place[1]) == BLOCK_BYTES
        for (node, offset), expected in choice.sample(sorted(written.items()), len(written)):
            with _direct(node) as fd:
                assert os.preadv(fd, [block], offset) == BLOCK_BYTES
            assert block[:] == expected, f"{node} reads at {offset} what was not written there"
    return len(written)


@contextmanager
def _direct(node: str) -> Iterator[int]:
    fd = os.open(node, os.O_RDWR | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)


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
        for status in of_each_thread(pid, "status").values()
        for line in status.splitlines()
        if line.startswith("voluntary_ctxt_switches")
    )


def _available_kib() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
