"""Every placement and transport, on one, two and four queues, verified byte by byte on the real driver."""

import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from support.vm.daemon import Daemon, total
from support.vm.fio import finish_all, queue_cpus, run_fio, start_fio
from ublkpool.daemon.status import DeviceStats, DeviceStatus

MIB = 1 << 20
DEPTH_TOTAL = 64
SIZE_TOTAL = 10 * MIB
QUEUES = (1, 2, 4)
TROUBLE = (
    "errors",
    "violations",
    "requeues",
    "timeouts",
    "rescues",
    "replays",
    "unsupported",
    "stale_answers",
)


class Way(NamedTuple):
    """How a write reaches the backend."""

    need_get_data: bool
    placement: str

    def __str__(self) -> str:
        return self.placement if self.need_get_data else "off"


WAYS = (Way(False, "pool"), Way(True, "pool"), Way(True, "backend"))
# Each kernel's driver sees every way on every number of queues; the kind of the backend is invisible to it.  Of the
# three devices of a test some have rings and some frames (`has_rings`).
BACKENDS = [
    pytest.param("memory", marks=pytest.mark.one_kernel("6.12")),
    pytest.param("file", marks=pytest.mark.one_kernel("7.3")),
]


def _options(daemon: Daemon, backend: str, way: Way, queues: int) -> Mapping[str, object]:
    placement = {"placement": way.placement}
    if backend == "file":
        return {"path": daemon.path(f"disk{queues}.img"), "size": "64M", "segment": "32M", **placement}
    return {"size": "64M", **placement}


def _add(daemon: Daemon, backend: str, way: Way, queues: int) -> DeviceStatus:
    config = {"queues": queues, "need_get_data": way.need_get_data, "placement": way.placement}
    options = _options(daemon, backend, way, queues)
    return daemon.add(f"queues{queues}", backend, options, **config)


def _start_fio(status: DeviceStatus) -> "subprocess.Popen[str]":
    assert status.path is not None
    cpus, queues = queue_cpus(status.path, status.queues), status.queues
    return start_fio(status.path, queues, cpus, size=SIZE_TOTAL // queues, iodepth=DEPTH_TOTAL // queues)


def _assert_counted(stats: DeviceStats, written: int) -> None:
    assert written == total(stats, "kernel_write_bytes") == sum(each.bytes.write for each in stats.queues)
    assert total(stats, "own_copy_bytes") == 0
    assert all(each.requests.write and each.requests.read for each in stats.queues)
    assert {name: total(stats, name) for name in TROUBLE} == dict.fromkeys(TROUBLE, 0)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_fio_wrote_comes_back_from_devices_of_one_two_and_four_queues(
    daemon: Daemon, backend: str, way: Way
) -> None:
    devices = daemon.together(*(partial(_add, daemon, backend, way, queues) for queues in QUEUES))
    assert tuple(each.queues for each in devices) == QUEUES
    results = finish_all([_start_fio(each) for each in devices])
    for device, result in zip(devices, results, strict=True):
        stats = daemon.rest(device.name)
        _assert_counted(stats, result.written_bytes)
        assert bool(total(stats, "posts_used")) == (backend == "file" and way.placement == "backend")
        daemon.delete(device.name)


def test_requests_of_four_megabytes_come_in_one_piece(daemon: Daemon) -> None:
    options = {"size": "64M", "placement": "backend"}
    config = {"max_io_bytes": 4 * MIB, "placement": "backend", "depth": 16}
    with daemon.device("large", "memory", options=options, **config) as status:
        assert status.path is not None
        (Path("/sys/block") / Path(status.path).name / "queue/max_sectors_kb").write_text("4096")
        whole = run_fio(status.path, size=16 * MIB, rw="write", bssplit=None, bs="4m", iodepth=2)
        stats = daemon.rest("large")
        assert whole.written_bytes == 16 * MIB
        assert sum(queue.requests.write for queue in stats.queues) == 4
        mixed = run_fio(status.path, size=32 * MIB, iodepth=8, bssplit="512/25:300k/25:1m/25:4m/25")
        _assert_counted(daemon.rest("large"), whole.written_bytes + mixed.written_bytes)
