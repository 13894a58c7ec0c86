"""The backend nbd under fio: its server is killed again and again, and the client sees no error."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.sources.nbdkit import Nbdkit
from support.vm.daemon import Daemon, eventually, total
from support.vm.fio import drop_fio, finish_fio, start_fio

pytestmark = pytest.mark.one_kernel("7.3")
MIB = 1 << 20
KILLS = 3


def _forgetful(daemon: Daemon, disk: Path) -> Nbdkit:
    """A server that loses what was not flushed when it dies: it keeps writes in a file without a name."""
    return Nbdkit(["file", disk, "cache=writeback"], socket_path=daemon.path("nbd.sock"), filters=["cache"])


def _written(daemon: Daemon) -> int:
    return total(daemon.stats("nbd"), "kernel_write_bytes")


def _has_written(daemon: Daemon, goal_bytes: int) -> bool:
    return _written(daemon) >= goal_bytes


def test_a_server_killed_and_restarted_under_fio_costs_no_data_and_no_error(daemon: Daemon) -> None:
    disk = daemon.path("nbd.img")
    disk.write_bytes(bytes(16 * MIB))
    with (
        _forgetful(daemon, disk) as server,
        daemon.device("nbd", "nbd", options=server.options, queues=2, depth=32) as status,
    ):
        assert status.path is not None
        # It writes until it is told to end, and verifies along the way.
        going: dict[str, Any] = {"time_based": 1, "runtime": 3600, "verify_backlog": 64}
        fio = start_fio(status.path, size=3 * MIB, iodepth=16, fsync=32, verify="crc32c", **going)
        try:
            for _ in range(KILLS):
                goal = _written(daemon) + MIB // 2
                eventually(partial(_has_written, daemon, goal), "fio writes")
                server.restart()
            goal = _written(daemon) + MIB // 2
            eventually(partial(_has_written, daemon, goal), "fio writes after the last restart")
            fio.send_signal(signal.SIGINT)
            result = finish_fio(fio, may_fail=True)
        finally:
            drop_fio(fio)
        assert result.errors == 0 and result.written_bytes and result.read_bytes, result.text
        stats = daemon.rest("nbd")
        assert total(stats, "errors") == total(stats, "violations") == 0
    assert "connected again" in daemon.said()
    disk.unlink()
