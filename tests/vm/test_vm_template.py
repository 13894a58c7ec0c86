"""Backends that are copies of the daemon's template: their start, rights and deaths; the template's deaths."""

import pwd
import sys
import time
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, eventually, marked_processes
from support.vm.process import read_block, write_block
from support.vm.recovery import kill, wait_for_backend
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig

pytestmark = pytest.mark.one_kernel("7.3")
MIB = 1 << 20
BLOCK = 4096
GROUP = "nogroup"


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def _runs_warm(daemon: Daemon, name: str) -> bool:
    """Whether the device's backend is a copy of the template: it has the place of the template's code in memory."""
    pid, template = daemon.status(name).backend.pid, daemon.template_pid
    assert pid is not None
    stacks = [
        next(line for line in Path(f"/proc/{each}/maps").read_text().splitlines() if "[stack]" in line)
        for each in (pid, template)
        if each
    ]
    return len({each.split("-")[1].split()[0] for each in stacks}) == 1 and len(stacks) == 2


def _killed(daemon: Daemon, name: str) -> float:
    """Kill the device's backend; the seconds until its successor serves."""
    before, began_s = daemon.status(name).backend.pid, time.monotonic()
    kill(before or 0)
    wait_for_backend(daemon, name, before)
    return time.monotonic() - began_s


def test_a_backend_is_a_copy_of_the_template_and_outlives_it(daemon: Daemon) -> None:
    status = daemon.add("vol", "memory", {"size": "1M"})
    template = daemon.template_pid
    assert template and status.path is not None
    assert _parent(status.backend.pid or 0) == daemon.pid == _parent(template)
    assert _runs_warm(daemon, "vol")
    assert write_block(status.path, 0, b"t" * BLOCK) == 0
    warm_s = _killed(daemon, "vol")
    assert _runs_warm(daemon, "vol")

    # The template dies while it is asked: the successor is started by exec, and the log says so once.
    said = len(daemon.said().encode())
    with daemon.stopped(template):
        before = daemon.status("vol").backend.pid
        kill(before or 0)
        eventually(lambda: Path(f"/proc/{template}/wchan").exists(), "the template is stopped")
        kill(template)
    wait_for_backend(daemon, "vol", before)
    assert daemon.said(said).count("the template of backends ended") == 1
    assert read_block(status.path, 0, BLOCK) == b"t" * BLOCK
    eventually(lambda: daemon.template_pid not in (0, template), "another template runs")
    daemon.delete("vol")

    python = BackendConfig(kind="memory", options={"size": "1M"}, cwd="/", python=sys.executable)
    daemon.client.add(DeviceConfig(name="cold", backend=python, io_timeout_s=60))
    cold_s = _killed(daemon, "cold")
    daemon.delete("cold")
    print(f"from a backend's death to its successor: {warm_s:.2f} s by the template, {cold_s:.2f} s by exec")


def test_a_copy_has_its_users_rights_and_the_next_daemon_its_own_template() -> None:
    with Daemon(f'[daemon]\ngroup = "{GROUP}"\n', name="template").life() as daemon:
        backend = BackendConfig(kind="null", cwd="/", user="nobody")
        daemon.client.add(DeviceConfig(name="vol", size_bytes=MIB, backend=backend, io_timeout_s=60))
        pid = daemon.status("vol").backend.pid or 0
        assert _runs_warm(daemon, "vol")
        shown = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert set(shown["Uid"].split()) == {str(pwd.getpwnam("nobody").pw_uid)}
        assert {int(shown[each], 16) for each in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert shown["NoNewPrivs"] == "1"
        targets = [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()]
        assert not [each for each in targets if "ublk" in each and "memfd" not in each]
        first = daemon.template_pid
        daemon.crash()
        daemon.start()
        assert daemon.status("vol").backend.pid == pid
        # Not by its number: nothing reaps it in this guest.
        eventually(
            lambda: first not in marked_processes(str(daemon.run_dir)),
            "the killed daemon's template has ended",
        )
        _killed(daemon, "vol")
        assert _runs_warm(daemon, "vol")
        daemon.delete("vol")
