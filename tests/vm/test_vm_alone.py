"""A device whose workers answer: reads return zeros through every death, and no backend may attach."""

import os
from functools import partial

import pytest

from support.vm.daemon import Daemon, eventually
from support.vm.process import read_block, write_block
from ublkpool.daemon.errors import DaemonError

CHUNK = 4096
DISK_BYTES = 4 << 20


def _serves(path: str) -> None:
    assert write_block(path, CHUNK, os.urandom(CHUNK)) == 0
    assert read_block(path, 0, 2 * CHUNK) == bytes(2 * CHUNK)


@pytest.mark.one_kernel("6.12")
def test_workers_answer_without_a_backend_through_a_recovery_and_a_new_daemon(daemon: Daemon) -> None:
    status = daemon.add("alone", answers="worker", size_bytes=DISK_BYTES, queues=2, depth=8)
    path = status.path or ""
    assert (status.state, status.answers, status.backend.kind) == ("live", "worker", None)
    _serves(path)
    assert daemon.backend("null", "alone").wait() != 0

    os.kill(status.workers[0].pid, 9)
    eventually(partial(_is_epoch, daemon, 2), "the device is recovered")
    _serves(path)

    daemon.crash()
    _serves(path)
    daemon.start()
    _serves(path)
    assert daemon.status("alone").epoch == 2

    daemon.crash_everything()
    daemon.start()
    eventually(partial(_is_epoch, daemon, 3), "the device is recovered")
    _serves(path)

    daemon.delete("alone")
    with pytest.raises(DaemonError, match="no device"):
        daemon.wait_live("alone")


def _is_epoch(daemon: Daemon, epoch: int) -> bool:
    status = daemon.status("alone")
    return status.state == "live" and status.epoch == epoch
