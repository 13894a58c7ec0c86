"""The daemon goes on when memory is short, and replaces processes that the kernel's OOM killer ends.

All processes of the daemon run in a memory cgroup, whose limit the tests lower.
"""

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from support.vm.cgroup import MemoryGroup
from support.vm.daemon import Daemon, eventually, eventually_nothing
from support.vm.files import check_file_system, forget_cached, make_file_system, mounted
from support.vm.process import Forked, flusher_flags, process_flags, status_field
from support.vm.recovery import loaded, wait_for_backend, wait_for_epoch

pytestmark = pytest.mark.one_kernel("6.12")
MIB = 1 << 20
ROOM_BYTES = 16 * MIB
"""Memory that the group may use beyond its present use."""
WRITTEN_BYTES = 40 * MIB
WRITER_DEADLINE_S = 900
CHUNK = 65536


@pytest.fixture(scope="module")
def group() -> Iterator[MemoryGroup]:
    made = MemoryGroup("ublkpool-test")
    yield made
    made.close()


@pytest.fixture(scope="module")
def squeezed(group: MemoryGroup) -> Iterator[Daemon]:
    """The daemon in the group, shared by the tests of this file."""
    daemon = Daemon(name="squeezed")
    try:
        with group.entered():
            daemon.start()
        yield daemon
        assert daemon.stop() == 0, daemon.said()
        eventually_nothing(daemon.remains, "nothing is left of the daemon")
    finally:
        daemon.close()


def _pattern(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little")).digest() * (CHUNK // 32)


def _write_from_inside(group: MemoryGroup, target: Path) -> int:
    """Dirty far more pages than the group's limit."""
    group.enter()
    with target.open("wb") as file:
        for number in range(WRITTEN_BYTES // CHUNK):
            file.write(_pattern(number))
        file.flush()
        os.fsync(file.fileno())
    return 0


def _is_whole(target: Path) -> bool:
    with target.open("rb") as file:
        return all(file.read(CHUNK) == _pattern(number) for number in range(WRITTEN_BYTES // CHUNK))


def test_a_writer_that_fills_the_daemons_own_group_with_dirty_pages_of_its_disk_is_served(
    squeezed: Daemon, group: MemoryGroup
) -> None:
    status = squeezed.add("tight", "memory", {"size": "64M"}, queues=2)
    assert status.path is not None and status.backend.pid is not None
    make_file_system("ext4", status.path)
    members = set(group.processes())
    ours = [*(each.pid for each in status.workers), status.backend.pid]
    assert members >= {squeezed.pid, squeezed.broker_pid, *ours}
    for pid in ours:
        assert process_flags(pid) & flusher_flags() == flusher_flags()
        assert int(status_field(pid, "VmLck").split()[0]) > 0
    with mounted(status.path, squeezed.path("tight-mnt")) as root:
        before = group.events()
        group.set("high", group.used_bytes + ROOM_BYTES // 2)
        group.set("max", group.used_bytes + ROOM_BYTES)
        writer = Forked(partial(_write_from_inside, group, root / "big"))
        assert writer.wait(WRITER_DEADLINE_S) == 0
        after = group.events()
        assert after["high"] + after["max"] > before["high"] + before["max"], "nothing was tight"
        assert after["oom_kill"] == 0
        group.set("high", "max")
        group.set("max", "max")
        forget_cached()
        assert _is_whole(root / "big")
    check_file_system("ext4", status.path)
    assert squeezed.status("tight").epoch == 1
    squeezed.delete("tight")


def _eat(group: MemoryGroup) -> int:
    """Use more memory than the group's limit, exempt from the OOM killer; blocks while the kernel can kill no other."""
    Path("/proc/self/oom_score_adj").write_text("-1000")
    group.enter()
    meal = mmap.mmap(-1, 2 * ROOM_BYTES)
    for page in range(0, len(meal), mmap.PAGESIZE):
        meal[page] = 1
    return 0


def _let_the_kernel_kill(group: MemoryGroup, dies: Callable[[], bool]) -> None:
    """Fill the group until the kernel has killed a process and `dies` is true."""
    killed = group.events()["oom_kill"]
    eater = Forked(partial(_eat, group))
    try:
        eventually(
            lambda: group.events()["oom_kill"] > killed and dies(), "the kernel kills for want of memory"
        )
    finally:
        eater.kill()


def _run_out_of_memory(victim: int) -> None:
    """Let the OOM killer kill this process, in a group of its own.

    In a shared group the OOM killer would kill several, because locked memory is freed only when a process has ended.
    """
    group = MemoryGroup("ublkpool-victim")
    try:
        group.enter(victim)
        group.set("max", ROOM_BYTES)
        _let_the_kernel_kill(group, lambda: victim not in group.processes())
    finally:
        group.close()


def test_a_worker_and_a_backend_that_are_killed_for_want_of_memory_come_back(squeezed: Daemon) -> None:
    status = squeezed.add("oom", "memory", {"size": "32M"}, queues=2)
    with loaded(squeezed, [status]) as (load,):
        _run_out_of_memory(status.workers[0].pid)
        assert wait_for_epoch(squeezed, "oom", 2).epoch == 2
        load.goes_on()
        backend = squeezed.status("oom").backend.pid
        assert backend is not None
        _run_out_of_memory(backend)
        wait_for_backend(squeezed, "oom", backend)
        load.goes_on()


def test_a_group_that_is_killed_as_a_whole_for_want_of_memory_is_taken_over_by_the_next_daemon(
    squeezed: Daemon, group: MemoryGroup
) -> None:
    options = {"path": squeezed.path("whole.img"), "size": "32M"}
    status = squeezed.add("whole", "file", options, queues=2)
    with loaded(squeezed, [status]) as (load,):
        victims = set(group.processes())
        assert victims >= {squeezed.pid, squeezed.broker_pid, *(each.pid for each in status.workers)}
        group.set("oom.group", 1)
        group.set("max", group.used_bytes + ROOM_BYTES)
        _let_the_kernel_kill(group, lambda: not victims & set(group.processes()))
        group.set("oom.group", 0)
        group.set("max", "max")
        squeezed.crash()
        squeezed.start()
        # The daemon answers before the device's next backend serves.
        after = squeezed.wait_live("whole")
        assert (after.state, after.epoch) == ("live", 2)
        load.goes_on()
