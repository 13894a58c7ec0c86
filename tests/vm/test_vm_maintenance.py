"""One device under a verified load: its settings change, its backend is killed, drained, moved and exchanged."""

import signal
from functools import partial
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, eventually, total
from support.vm.fio import drop_fio, finish_fio, start_fio
from support.vm.process import run_command
from support.vm.recovery import kill

pytestmark = pytest.mark.one_kernel("7.3")
DISK_BYTES = 8 << 20
TIMEOUT_S = 250
DIFFERS = [f"io_timeout={TIMEOUT_S}", "on_absent=fail"]
REASON = "drained: requests wait for: ublkpool resume vol"


def _in_flight(daemon: Daemon) -> bool:
    return total(daemon.stats("vol"), "in_flight") > 0


def test_a_device_is_changed_and_its_backend_exchanged_under_a_verified_load(daemon: Daemon) -> None:
    store, moved = daemon.path("store.img"), daemon.path("moved.img")
    options = {"path": store, "size": DISK_BYTES}
    path = daemon.add("vol", "file", options, queues=2, on_timeout="fail").path
    assert path is not None
    fio = start_fio(path, rw="randrw", size=DISK_BYTES, iodepth=8, time_based=1, runtime=600, loops=1000)
    try:
        eventually(lambda: total(daemon.stats("vol"), "commits") > 0, "fio has begun")
        _set(daemon)
        _drain_and_move(daemon, store, moved)
        _kill_while_drained(daemon)
        assert run_command(daemon, "resume", "vol").status == 0
        before = total(daemon.stats("vol"), "commits")
        eventually(lambda: total(daemon.stats("vol"), "commits") > before, "requests are served again")
        fio.send_signal(signal.SIGINT)
        result = finish_fio(fio, may_fail=True)
        assert result.errors == 0 and result.written_bytes and result.read_bytes, result.text
    finally:
        drop_fio(fio)
    assert daemon.stats("vol").queues[0].errors == 0
    daemon.delete("vol")


def _set(daemon: Daemon) -> None:
    assert run_command(daemon, "set", "vol", f"io_timeout={TIMEOUT_S}", "on_absent=fail").status == 0
    assert [each.split()[0] for each in daemon.status("vol").differs] == DIFFERS
    refused = run_command(daemon, "set", "vol", "io_timeout=1", "on_absent=never")
    assert refused.status == 2 and "on_absent" in refused.err
    assert [each.split()[0] for each in daemon.status("vol").differs] == DIFFERS
    assert run_command(daemon, "set", "vol", "on_absent=wait").status == 0


def _drain_and_move(daemon: Daemon, store: Path, moved: Path) -> None:
    pid = daemon.status("vol").backend.pid
    assert pid is not None
    drained = run_command(daemon, "drain", "vol")
    assert (drained.status, drained.out) == (0, "drained\n"), drained
    assert not Path(f"/proc/{pid}").exists()
    status = daemon.status("vol")
    assert (status.state, status.drain, status.reason) == ("live", "drained", REASON)
    eventually(partial(_in_flight, daemon), "requests wait")
    # The same file under another name, as after a move; the backend learns of it at its next start.
    store.rename(moved)
    assert run_command(daemon, "set", "vol", f"backend.path={moved}").status == 0


def _kill_while_drained(daemon: Daemon) -> None:
    """The next workers wait as well."""
    epoch = daemon.status("vol").epoch
    kill(daemon.status("vol").workers[0].pid)
    eventually(lambda: daemon.status("vol").epoch > epoch, "a worker is replaced")
    eventually(lambda: daemon.status("vol").state == "live", "the device is live")
    assert daemon.status("vol").drain == "drained" and daemon.status("vol").backend.pid is None
