"""Load, recoveries and devices that come and go: no process of the daemon grows, and its counters say what fio says.

`make soak` runs it, for eleven minutes at most (UBLKPOOL_GROWTH_S): a round takes half a minute in a guest.
"""

import os
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

from support.vm.daemon import Daemon, eventually, marked_processes, total
from support.vm.process import read_block, write_block
from support.vm.recovery import Load, add_disk, kill, wait_for_backend, wait_for_epoch
from ublkpool.daemon.kernel.warm_process import TITLE as WARM
from ublkpool.daemon.status import DeviceStats

pytestmark = [pytest.mark.one_kernel("7.3"), pytest.mark.long]
GROWTH_S = float(os.environ.get("UBLKPOOL_GROWTH_S", "0"))
ROUNDS_MIN = 3
WARM_UP = 2
"""Rounds before the first look: caches, the first recovery's modules, the allocator's arenas."""
GROWTH_MAX_BYTES = 3 << 20
"""Of a process with some 30 MiB.  In eleven minutes a leak of 50 KiB a round exceeds it."""
BLOCK = 4096


class Size(NamedTuple):
    """What one process holds."""

    descriptors: int
    threads: int
    anonymous_bytes: int


def _size(pid: int) -> Size:
    process = Path(f"/proc/{pid}")
    fields = dict(re.findall(r"^(\w+):\s+(\d+)", (process / "status").read_text(), re.MULTILINE))
    return Size(len(list((process / "fd").iterdir())), int(fields["Threads"]), int(fields["RssAnon"]) * 1024)


def _sizes(daemon: Daemon) -> dict[str, list[Size]]:
    """The sizes of all processes of the daemon, the largest first, by their names."""
    found: dict[str, list[Size]] = defaultdict(list)
    for pid in marked_processes(str(daemon.run_dir)):
        found[Path(f"/proc/{pid}/comm").read_text().strip()].append(_size(pid))
    return {name: sorted(sizes, reverse=True) for name, sizes in found.items()}


def _settled_sizes(daemon: Daemon) -> dict[str, list[Size]]:
    """The sizes once three looks in a row find the same handles: what a round used is closed a moment after it."""
    looks = [_sizes(daemon), _sizes(daemon)]

    def is_settled() -> bool:
        looks.append(_sizes(daemon))
        return _handles(looks[-1]) == _handles(looks[-2]) == _handles(looks[-3])

    eventually(is_settled, "the number of descriptors and threads stays")
    return looks[-1]


def _handles(sizes: dict[str, list[Size]]) -> dict[str, list[tuple[int, int]]]:
    """The descriptors and threads of each process, by their names; of those that wait for calls some more may wait."""
    return {
        name: [(each.descriptors, each.threads) for each in (some[:1] if name == WARM else some)]
        for name, some in sizes.items()
    }


def _expect_no_growth(before: dict[str, list[Size]], after: dict[str, list[Size]]) -> None:
    assert _handles(after) == _handles(before)
    for name, sizes in after.items():
        largest = [max(each.anonymous_bytes for each in some) for some in (before[name], sizes)]
        assert largest[1] - largest[0] <= GROWTH_MAX_BYTES, f"{name}: {before[name]}, now {sizes}"


def _one_round(daemon: Daemon) -> None:
    """A worker and a backend die and are replaced; a device comes, is used and goes."""
    status = daemon.status("file-pool")
    kill(status.workers[0].pid)
    wait_for_epoch(daemon, "file-pool", status.epoch + 1)
    backend = daemon.status("file-pool").backend.pid
    kill(backend or 0)
    wait_for_backend(daemon, "file-pool", backend)
    passing = daemon.add("passing", "memory", {"size": "1M"})
    assert passing.path is not None
    data = os.urandom(BLOCK)
    assert write_block(passing.path, 0, data) == 0
    assert read_block(passing.path, 0, BLOCK) == data
    daemon.delete("passing")


def test_no_process_grows_and_the_counters_say_what_fio_says(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    steady, mortal = add_disk(daemon, "memory", "backend", 1), add_disk(daemon, "file", "pool", 2)
    began, rounds = time.monotonic(), 0
    counted = daemon.rest(steady.name)
    loads = [Load(daemon, each) for each in (steady, mortal)]
    try:
        for _ in range(WARM_UP):
            _one_round(daemon)
        before = _settled_sizes(daemon)
        while rounds < ROUNDS_MIN or time.monotonic() - began < GROWTH_S:
            _one_round(daemon)
            rounds += 1
            for load in loads:
                load.goes_on()
        _expect_no_growth(before, _settled_sizes(daemon))
        for load in loads:
            load.end()
    finally:
        for load in loads:
            load.drop()
    _expect_same_count(counted, daemon.rest(steady.name), loads[0])
    for each in (steady, mortal):
        daemon.delete(each.name)
    with capsys.disabled():
        print(f"\ngrowth: {WARM_UP + rounds} rounds in {time.monotonic() - began:.0f} s, no growth")


def _expect_same_count(before: DeviceStats, after: DeviceStats, load: Load) -> None:
    assert load.result is not None
    moved = {"kernel_write_bytes": load.result.written_bytes, "kernel_read_bytes": load.result.read_bytes}
    assert {name: total(after, name) - total(before, name) for name in moved} == moved
