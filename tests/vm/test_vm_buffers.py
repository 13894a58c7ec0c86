"""A pool far smaller than the demand: requests wait only until others return their buffers."""

import subprocess
from collections.abc import Iterator

import pytest

from support.fakes import few_regions
from support.vm.daemon import Daemon, eventually, total
from ublkpool.daemon.status import DeviceStats, DeviceStatus

pytestmark = pytest.mark.one_kernel("6.12")
POOL_BYTES = 1 << 20
BURST = 64
BURSTS = 4


@pytest.fixture(scope="module")
def patient() -> Iterator[Daemon]:
    """A daemon whose workers have no periodic tick: they act only on events."""
    with Daemon(name="patient", module="support.vm.patient_daemon").life() as daemon:
        yield daemon


def _bursts(node: str, rw: str) -> list[str]:
    """fio's command for bursts: all requests of a burst are sent at once, the next burst after the last answer."""
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
    """Run all bursts; returns the counters.  Deletes the device, because a worker without a tick does not notice that
    the kernel has taken its last commits."""
    assert status.path is not None
    fio = subprocess.Popen(_bursts(status.path, rw), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        assert eventually(lambda: fio.poll() is not None, "every request is served") and fio.returncode == 0
        return daemon.stats(status.name)
    finally:
        daemon.client.delete([status.name], force=True)
        fio.wait()


def test_a_returned_buffer_goes_to_a_waiting_request_without_any_other_event(patient: Daemon) -> None:
    status = patient.add("short", "null", {"size": "64M"}, pool_bytes=POOL_BYTES, rings=True)
    assert total(_run_bursts(patient, status, "randwrite"), "buffers_waited") >= BURSTS * BURST // 2


def test_a_released_region_goes_to_the_backend_without_any_other_event(patient: Daemon) -> None:
    status = patient.add("few", few_regions.__file__, rings=True, max_io_bytes=few_regions.REGION_BYTES)
    _run_bursts(patient, status, "randread")
