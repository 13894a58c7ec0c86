"""A pool far smaller than what is asked of it: requests wait for one another, and for nothing else."""

import subprocess
from collections.abc import Iterator

import pytest

from support.fakes import few_regions
from support.vm.daemon import Daemon, eventually, total
from ublkpool.daemon.status import DeviceStats, DeviceStatus

POOL_BYTES = 1 << 20
BURST = 64
BURSTS = 4


@pytest.fixture(scope="module")
def patient() -> Iterator[Daemon]:
    """A daemon whose workers look around only when something happens."""
    with Daemon(name="patient", module="support.vm.patient_daemon").life() as daemon:
        yield daemon


def _bursts(node: str, rw: str) -> list[str]:
    """Each is sent at once, and the next only when all of it is done."""
    whole = ("iodepth", "iodepth_batch_submit", "iodepth_batch_complete_min")
    settings = {
        "name": "burst",
        "filename": node,
        "direct": 1,
        "rw": rw,
        "bs": 4096,
        "size": 1 << 20,
    }
    settings |= {"ioengine": "libaio", "iodepth_low": 1, "number_ios": BURSTS * BURST} | dict.fromkeys(
        whole, BURST
    )
    return ["fio", *(f"--{key}={value}" for key, value in settings.items())]


def _run_bursts(daemon: Daemon, status: DeviceStatus, rw: str) -> DeviceStats:
    """Through to the end; what was counted.  The device is gone afterwards: that its last commits were taken, a worker
    without a clock does not notice."""
    assert status.path is not None
    fio = subprocess.Popen(_bursts(status.path, rw), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        assert eventually(lambda: fio.poll() is not None, "every request is served") and fio.returncode == 0
        return daemon.stats(status.name)
    finally:
        daemon.client.delete([status.name], force=True)
        fio.wait()


def test_a_buffer_that_comes_back_goes_to_who_waits_though_nothing_else_happens(patient: Daemon) -> None:
    status = patient.add("short", "null", {"size": "64M"}, pool_bytes=POOL_BYTES, rings=True)
    assert total(_run_bursts(patient, status, "randwrite"), "buffers_waited") >= BURSTS * BURST // 2


def test_a_region_that_comes_back_goes_to_the_backend_though_nothing_else_happens(patient: Daemon) -> None:
    status = patient.add("few", few_regions.__file__, rings=True, max_io_bytes=few_regions.REGION_BYTES)
    _run_bursts(patient, status, "randread")
