"""The daemon's processes are set up so that they cannot wait for the disk that they serve."""

import errno
import mmap
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from support.vm.daemon import Daemon, eventually, marked_processes, total
from support.vm.fio import cpus_of_queue
from support.vm.hostile_backend import start_hostile
from support.vm.process import (
    Forked,
    flusher_flags,
    holders_of_device,
    mapped_huge_bytes,
    process_flags,
    status_field,
    write_block,
)
from support.vm.recovery import kill_broker, kill_worker, wait_for_epoch
from support.vm.rights import expect_no_rights
from ublkpool.bufpool.huge_pages import HUGE_PAGE_BYTES
from ublkpool.daemon.status import DeviceStatus

MIB = 1 << 20
# Of tests in which only the worker's own deadline counts.
ON_ONE_KERNEL = pytest.mark.one_kernel("6.12")


def _mount_namespace(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/mnt").readlink())


def test_processes_cannot_wait_for_their_own_disk_nor_keep_it_from_going(daemon: Daemon) -> None:
    with daemon.device("p", "memory", options={"size": "16M"}, queues=2, huge_pages="require") as status:
        assert len(status.workers) == 2
        _check_that_serving_needs_no_reclaim(daemon)
        _check_that_everybody_maps_the_pool_in_huge_pages(daemon)
        _check_that_each_worker_has_a_cpu_of_its_queue(status)
        _check_that_only_workers_hold_the_device(daemon, status)
        _check_that_mounts_stay_apart(daemon, status)
        assert write_block(str(status.path), 0, bytes(4096)) == 0
        expect_no_rights(daemon, "p")


def _check_that_serving_needs_no_reclaim(daemon: Daemon) -> None:
    flusher, status = flusher_flags(), daemon.status("p")
    assert flusher and status.backend.pid is not None
    for pid in (*(each.pid for each in status.workers), status.backend.pid):
        assert process_flags(pid) & flusher == flusher
        assert int(status_field(pid, "VmLck").split()[0]) > 0


def _check_that_everybody_maps_the_pool_in_huge_pages(daemon: Daemon) -> None:
    status, pool = daemon.status("p"), daemon.stats("p").pool
    assert pool.huge_bytes == pool.size_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES > 0
    assert status.backend.pid is not None
    for pid in (*(each.pid for each in status.workers), status.backend.pid):
        assert mapped_huge_bytes(pid, "/memfd:ublkpool-data (deleted)") == pool.huge_bytes


def _check_that_each_worker_has_a_cpu_of_its_queue(status: DeviceStatus) -> None:
    assert status.path is not None
    for worker in status.workers:
        assert os.sched_getaffinity(worker.pid) == {worker.cpu}
        assert worker.cpu in cpus_of_queue(status.path, worker.queue)


def _check_that_only_workers_hold_the_device(daemon: Daemon, status: DeviceStatus) -> None:
    workers = {each.pid for each in status.workers}
    others = set(marked_processes(str(daemon.run_dir))) - workers
    assert {daemon.pid, daemon.broker_pid, daemon.status("p").backend.pid} <= others
    assert holders_of_device(f"ublkc{status.id}") == workers


class Watch:
    """Polls which processes hold a device while others start and end; `others`: all pids that ever held one."""

    def __init__(self, status: DeviceStatus) -> None:
        self.looks = 0
        self.others: set[int] = set()
        self._device = f"ublkc{status.id}"
        self._workers = {each.pid for each in status.workers}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.is_set():
            self.others |= holders_of_device(self._device) - self._workers
            self.looks += 1


@pytest.mark.one_kernel("6.12")
def test_no_process_ever_holds_a_device_that_it_does_not_serve(daemon: Daemon) -> None:
    # Meanwhile control commands, udev, a broker, a backend and two generations of workers are forked.
    small, last_cpu = {"size": "4M"}, max(os.sched_getaffinity(0))
    with (
        daemon.device("held", "memory", options=small, queues=2, affinity="off") as held,
        Watch(held) as watch,
        daemon.device("other", "memory", options=small, affinity=f"{last_cpu}") as other,
    ):
        assert [each.cpu for each in (*held.workers, *other.workers)] == [None, None, last_cpu]
        assert os.sched_getaffinity(held.workers[0].pid) == os.sched_getaffinity(daemon.pid)
        assert os.sched_getaffinity(other.workers[0].pid) == {last_cpu}
        assert holders_of_device(f"ublkc{other.id}") == {each.pid for each in other.workers}
        before = kill_worker(daemon, "other", random.Random(1))
        kill_broker(daemon)
        after = wait_for_epoch(daemon, "other", before.epoch + 1)
        assert holders_of_device(f"ublkc{after.id}") == {each.pid for each in after.workers}
        expect_no_rights(daemon, "other")
        # Of the workers that have seen two brokers.
        assert write_block(str(held.path), 0, bytes(4096)) == 0
        expect_no_rights(daemon, "held")
    assert watch.looks and not watch.others


def _check_that_mounts_stay_apart(daemon: Daemon, status: DeviceStatus) -> None:
    namespaces = {_mount_namespace(pid) for pid in (daemon.pid, status.workers[0].pid)}
    assert len(namespaces) == 1
    assert _mount_namespace(os.getpid()) not in namespaces
    # Their mounts do not reach this namespace either: no mount point is shared.
    assert "shared:" not in Path(f"/proc/{daemon.pid}/mountinfo").read_text()


def _attach(daemon: Daemon, placement: str) -> Forked:
    disk, segment_bytes = mmap.mmap(-1, MIB), MIB if placement == "backend" else 0
    backend = start_hostile(daemon.run_dir, "slow", disk, segment_bytes=segment_bytes)
    daemon.wait_live("slow")
    return backend


@ON_ONE_KERNEL
def test_an_overdue_request_is_reported_and_goes_on_waiting(daemon: Daemon) -> None:
    daemon.add("slow", size_bytes=MIB, io_timeout_s=1, max_io_bytes=65536, depth=8)
    backend = _attach(daemon, "pool")
    path = str(daemon.status("slow").path)
    # On a slow machine the partition scan may have been overdue before.
    before = total(daemon.stats("slow"), "timeouts")
    with daemon.stopped(backend.pid):
        write = Forked(lambda: write_block(path, 0, bytes(4096)))
        eventually(lambda: total(daemon.stats("slow"), "timeouts") > before, "it is overdue")
        eventually(lambda: "longer than io_timeout = 1 s" in daemon.said(), "the log says so")
        assert write.running
    assert write.wait() == 0
    assert daemon.status("slow").backend.attached
    daemon.delete("slow")
    assert backend.wait() == 0


@pytest.mark.parametrize("placement", [pytest.param("pool", marks=ON_ONE_KERNEL), "backend"])
def test_an_overdue_request_fails_where_that_is_asked_for(daemon: Daemon, placement: str) -> None:
    small: dict[str, Any] = {"size_bytes": MIB, "max_io_bytes": 65536, "depth": 8}
    daemon.add("slow", io_timeout_s=10, on_timeout="fail", placement=placement, **small)
    # The requests of the partition scan must not be overdue.
    backend = _attach(daemon, placement)
    with daemon.stopped(backend.pid):
        path = str(daemon.status("slow").path)
        assert write_block(path, 0, bytes(4096)) == errno.ETIMEDOUT
        assert backend.wait() == -signal.SIGKILL
    assert total(daemon.stats("slow"), "timeouts")
    daemon.delete("slow")
