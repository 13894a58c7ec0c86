"""The backend rbd under fio: it is killed again and again, and the client sees no error."""

import mmap
import os
import select
import signal
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from support.ceph.cluster import CLIENT, POOL, Cluster, Shape
from support.threads import of_each_thread
from support.vm.daemon import DEADLINE_S, Daemon, eventually, total
from support.vm.fio import drop_fio, finish_fio, start_fio
from support.vm.process import write_block

pytestmark = [pytest.mark.one_kernel("7.3"), pytest.mark.long]
MIB = 1 << 20
KILLS = 50
_MEMALLOC_NOIO = 0x00080000
"""PF_MEMALLOC_NOIO, which PR_SET_IO_FLUSHER sets."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    shape = Shape(stores=("memstore",), replicas=1, settings={"mon_allow_pool_size_one": "true"})
    with Cluster(tmp_path_factory.mktemp("ceph") / "cluster", shape) as cluster:
        cluster.rbd("create", "--size", "16M", f"{POOL}/vol")
        yield cluster


def _written(daemon: Daemon) -> int:
    return total(daemon.stats("rbd"), "kernel_write_bytes")


def _has_written(daemon: Daemon, goal_bytes: int) -> bool:
    return _written(daemon) >= goal_bytes


def _threads_without_the_flag(pid: int) -> list[str]:
    """The threads of a process that may wait for I/O on the disk that they serve, by name."""
    flags = {
        thread: int(stat.rpartition(") ")[2].split()[6])
        for thread, stat in of_each_thread(pid, "stat").items()
    }
    names = of_each_thread(pid, "comm")
    return [name.strip() for thread, name in names.items() if not flags.get(thread, 0) & _MEMALLOC_NOIO]


def _first_write_s(pid: int, path: str) -> float:
    """Kill the backend; how many seconds later a write that is sent after its death has been answered."""
    pidfd = os.pidfd_open(pid)
    try:
        began_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], DEADLINE_S)[0], "the backend ends"
    finally:
        os.close(pidfd)
    assert write_block(path, 8 * MIB, bytes(mmap.PAGESIZE)) == 0
    return time.monotonic() - began_s


def test_a_backend_killed_under_fio_costs_no_data_and_no_error(
    daemon: Daemon, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    waits_s = []
    options = {"pool": POOL, "image": "vol", "conf": str(cluster.conf), "id": CLIENT}
    with daemon.device("rbd", "rbd", options=options, queues=2, depth=32) as status:
        assert status.path is not None
        # It writes until it is told to end, and verifies along the way.
        going: dict[str, Any] = {"time_based": 1, "runtime": 3600, "verify_backlog": 64}
        fio = start_fio(status.path, size=3 * MIB, iodepth=16, fsync=32, verify="crc32c", **going)
        try:
            for _ in range(KILLS):
                goal = _written(daemon) + MIB // 4
                eventually(partial(_has_written, daemon, goal), "fio writes", 300)
                pid = daemon.status("rbd").backend.pid
                assert pid is not None
                assert _threads_without_the_flag(pid) == []
                waits_s.append(_first_write_s(pid, status.path))
            goal = _written(daemon) + MIB // 4
            eventually(partial(_has_written, daemon, goal), "fio writes after the last kill", 300)
            fio.send_signal(signal.SIGINT)
            result = finish_fio(fio, may_fail=True)
        finally:
            drop_fio(fio)
        assert result.errors == 0 and result.written_bytes and result.read_bytes, result.text
        stats = daemon.rest("rbd")
        assert total(stats, "errors") == total(stats, "violations") == 0
    assert daemon.said().count("taking over from the predecessor") >= KILLS
    with capsys.disabled():
        print(
            f"\nrbd: {KILLS} kills under fio, 0 errors; first write after a kill: "
            f"median {statistics.median(waits_s):.2f} s, {min(waits_s):.2f} to {max(waits_s):.2f} s"
        )
