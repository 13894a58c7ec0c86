"""A disk that answers no request blocks only its own users: not the daemon, and no other device."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from support.fakes import gated_functions
from support.vm.daemon import DEADLINE_S, BackendProcess, Daemon, eventually, eventually_nothing
from support.vm.process import Forked, write_block
from support.vm.stuck import (
    DISK_BYTES,
    expect_other_devices_served,
    process_state,
    resume,
    suspend,
    suspended_file,
)
from ublkpool.daemon.errors import DaemonError
from ublkpool.ublk.abi import Feature
from ublkpool.ublk.control import get_features


class Gate(NamedTuple):
    """The files that a backend of `gated_functions` polls."""

    asked: Path
    gate: Path

    def backend(self, daemon: Daemon, device: str) -> BackendProcess:
        kind = str(Path(gated_functions.__file__))
        return daemon.backend(kind, device, size=DISK_BYTES, asked=self.asked, gate=self.gate)


@pytest.fixture
def gate(daemon: Daemon) -> Iterator[Gate]:
    gate = Gate(daemon.path("asked"), daemon.path("gate"))
    yield gate
    for path in gate:
        path.unlink(missing_ok=True)


def test_a_backend_that_dies_in_the_partition_scan_is_replaced_and_blocks_no_other_device(
    daemon: Daemon, gate: Gate
) -> None:
    daemon.add("slow", size_bytes=DISK_BYTES)
    first = gate.backend(daemon, "slow")
    eventually(gate.asked.exists, "the kernel reads the partition table")
    expect_other_devices_served(daemon)
    assert daemon.status("slow").state == "waiting"
    first.end(signal.SIGKILL)
    expect_other_devices_served(daemon)
    gate.gate.touch()
    second = gate.backend(daemon, "slow")
    status = daemon.wait_live("slow")
    assert status.path is not None and Path(status.path).is_block_device()
    daemon.delete("slow")
    assert second.wait() == 0


def test_a_worker_that_dies_in_the_partition_scan_is_recovered_and_the_disk_goes_live(
    daemon: Daemon, gate: Gate
) -> None:
    if not get_features() & Feature.NO_AUTO_PART_SCAN:
        pytest.skip("this driver scans partitions within START_DEV, which a worker's death ends")
    added = daemon.add("slow", size_bytes=DISK_BYTES)
    gate.backend(daemon, "slow")
    eventually(gate.asked.exists, "the kernel reads the partition table")
    os.kill(daemon.status("slow").workers[0].pid, signal.SIGKILL)
    eventually(lambda: daemon.status("slow").epoch > added.epoch, "the next epoch has begun")
    assert daemon.status("slow").state in ("waiting", "recovering")
    gate.gate.touch()
    status = daemon.wait_live("slow")
    assert status.path is not None and Path(status.path).is_block_device()
    daemon.delete("slow")


@contextmanager
def rereading(daemon: Daemon, path: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`blockdev --rereadpt` of a disk that does not answer."""
    reader = subprocess.Popen(["blockdev", "--rereadpt", path], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: process_state(reader.pid) == "D", "blockdev waits for the disk")
        yield reader
    except BaseException:
        # Only this ends its wait, without which the test could not end.
        daemon.clean()
        raise
    finally:
        reader.wait(DEADLINE_S)


def test_a_disk_whose_partition_scan_waits_for_a_dead_backend_is_not_deleted_and_goes_on(
    daemon: Daemon, gate: Gate
) -> None:
    gate.gate.touch()
    daemon.add("stuck", size_bytes=DISK_BYTES)
    first = gate.backend(daemon, "stuck")
    path = daemon.wait_live("stuck").path
    assert path is not None
    first.end(signal.SIGKILL)
    with rereading(daemon, path) as reader:
        with pytest.raises(DaemonError, match=rf"process {reader.pid} \(blockdev\) has it open.*--force"):
            daemon.client.delete(["stuck"])
        expect_other_devices_served(daemon)
        gate.backend(daemon, "stuck")
        assert reader.wait(DEADLINE_S) == 0, "the successor answered it"
    eventually(lambda: daemon.status("stuck").backend.attached, "the successor is attached")
    daemon.backends[-1].end(signal.SIGKILL)
    with rereading(daemon, path) as reader:
        assert daemon.client.delete(["stuck"], force=True) == ["stuck"]
        reader.wait(DEADLINE_S)


@pytest.mark.one_kernel("6.12")
def test_a_suspended_disk_under_a_device_blocks_no_other_device_no_del_and_no_stop() -> None:
    lower = Daemon(name="lower")
    with lower.life():
        below = lower.add("below", "memory", {"size": DISK_BYTES}).path
        assert below is not None
        # Existing processes do not count as left behind by the daemon.
        upper = Daemon(module="support.vm.hasty_daemon")
        with suspended_file(below) as backing, closing(upper):
            upper.start()
            path = upper.add("above", "file", {"path": backing, "direct": "on"}).path
            assert path is not None
            suspend()
            with Forked(lambda: write_block(path, 0, bytes(4096))) as writer:
                eventually(lambda: upper.stats("above").queues[0].in_flight, "the write waits")
                expect_other_devices_served(upper)
                with pytest.raises(DaemonError, match=f"process {writer.pid} "):
                    upper.client.delete(["above"])
                expect_other_devices_served(upper)
                # Not with `del`, because the end of the daemon, which deletes it too, comes next.
                assert upper.stop() == 0
                resume()
                writer.wait()
            eventually_nothing(upper.remains, "nothing is left of the daemon")
        lower.client.delete(None)
