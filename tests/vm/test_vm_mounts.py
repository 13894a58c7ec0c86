"""Mounts made after `serve` exist for backends that the daemon runs, and none of its processes pins another's mount.

With `/` private and with `/` shared: in the first no mount reaches the daemon's copy of the namespace by itself, in the
second every one does.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.vm.daemon import Daemon, eventually, eventually_nothing, marked_processes
from support.vm.process import read_block, write_block
from support.vm.recovery import wait_for_backend
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig

pytestmark = pytest.mark.one_kernel("7.3")
MIB = 1 << 20
CHUNK = 4096
SMALL: dict[str, Any] = {"depth": 8, "max_io_bytes": 65536}


def _mount(where: Path, *options: str, source: str = "ublkpool-test") -> Path:
    where.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, source, where], check=True)
    return where


def _tmpfs(where: Path) -> Path:
    return _mount(where, "-t", "tmpfs")


def _umount(where: Path) -> None:
    subprocess.run(["umount", where], check=True)


def _who_has(where: Path) -> list[str]:
    """All processes of the machine in whose mount namespace this path is a mount point."""
    found = []
    for table in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            lines = table.read_text().splitlines()
        except OSError:
            continue
        if any(line.split()[4] == str(where) for line in lines):
            found.append(table.parent.name)
    return found


def _namespace(pid: int) -> str:
    """The mount namespace of a process; empty if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return str(Path(f"/proc/{pid}/ns/mnt").readlink())
    return ""


@pytest.fixture(params=["private", "shared"])
def propagation(request: pytest.FixtureRequest) -> Iterator[str]:
    subprocess.run(["mount", f"--make-r{request.param}", "/"], check=True)
    yield request.param
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def test_backends_see_the_mounts_of_now_and_the_daemon_pins_none(propagation: str) -> None:
    daemon = Daemon(name=propagation)
    early, other = _tmpfs(daemon.path("early")), _tmpfs(daemon.path("other"))
    late = daemon.path("late")
    try:
        with daemon.life():
            _tmpfs(late)
            path = daemon.add("vol", "file", {"path": late / "a.img", "size": "4M"}, **SMALL).path
            assert (late / "a.img").stat().st_size == 4 * MIB, "the file lies in the mount"
            block = os.urandom(CHUNK)
            assert path is not None and write_block(path, 0, block) == 0
            assert (late / "a.img").read_bytes()[:CHUNK] == block
            _check_relative_paths(daemon, late)
            _check_that_an_earlier_mount_goes(daemon, early)
            _check_a_restarted_backend(daemon, path, late, block)
            daemon.crash()
            daemon.start()
            _check_that_an_earlier_mount_goes(daemon, other)
            daemon.delete("vol")
    finally:
        for where in (early, other, late):
            subprocess.run(["umount", where], check=False, capture_output=True)


def _check_relative_paths(daemon: Daemon, late: Path) -> None:
    """A relative path starts at the directory of the user's command, even on a mount that the daemon does not have."""
    options = {"path": "relative.img", "size": "1M"}
    backend = BackendConfig(kind="file", options=options, cwd=str(late))
    daemon.client.add(DeviceConfig(name="relative", backend=backend, **SMALL))
    assert (late / "relative.img").stat().st_size == MIB
    daemon.delete("relative")


def _check_that_an_earlier_mount_goes(daemon: Daemon, where: Path) -> None:
    backend = daemon.status("vol").backend.pid
    assert backend is not None and _namespace(backend) == _namespace(os.getpid())
    ours = set(marked_processes(str(daemon.run_dir)))
    assert {daemon.pid, daemon.broker_pid, backend} < ours
    assert not {pid for pid in ours if _namespace(pid) != _namespace(backend)} & set(
        map(int, _who_has(where))
    )
    _umount(where)
    eventually_nothing(lambda: _who_has(where), "the mount is gone for every process of the machine")


def _check_a_restarted_backend(daemon: Daemon, path: str, late: Path, block: bytes) -> None:
    """A new backend serves although the old one's mount was replaced by another mount of the same file system."""
    before, aside = daemon.status("vol").backend.pid, daemon.path("aside")
    assert before is not None
    with daemon.stopped(daemon.pid):
        os.kill(before, signal.SIGKILL)
        _mount(aside, "--bind", source=str(late))
        eventually(lambda: not subprocess.run(["umount", late], check=False).returncode, "it let go")
        assert not _who_has(late)
        _mount(late, "--bind", source=str(aside))
        _umount(aside)
    wait_for_backend(daemon, "vol", before)
    assert read_block(path, 0, CHUNK) == block
