"""A live disk grows under verified load on a mounted file system, and around the deaths of its processes."""

import os
import signal
from pathlib import Path

import pytest

from support.vm.daemon import Daemon
from support.vm.files import make_file_system, mounted, run
from support.vm.fio import drop_fio, finish_fio, start_fio
from support.vm.process import Forked, disk_bytes
from support.vm.recovery import kill, wait_for_backend
from ublkpool.daemon.errors import DaemonError, RemoteError
from ublkpool.ublk.abi import Feature
from ublkpool.ublk.control import get_features

MIB = 1 << 20
OLD, NEW, LAST = 16 * MIB, 32 * MIB, 40 * MIB


def resize_in_another_process(daemon: Daemon, name: str, size_bytes: int) -> Forked:
    """A client that asks for a size, and may lose its daemon."""

    def ask() -> int:
        try:
            daemon.client.resize(name, size_bytes)
        except DaemonError:
            return 1
        return 0

    return Forked(ask)


@pytest.mark.one_kernel("7.3")
def test_a_mounted_disk_grows_under_load_whoever_is_killed(daemon: Daemon) -> None:
    if not get_features() & Feature.UPDATE_SIZE:
        pytest.skip("this kernel's driver lacks UPDATE_SIZE")
    image = daemon.path("grow.img")
    with daemon.device("grow", "file", options={"path": image, "size": "16M"}, size_bytes=OLD) as status:
        assert status.path is not None
        make_file_system("ext4", status.path)
        with mounted(status.path, daemon.path("mnt")) as root:
            room = os.statvfs(root).f_blocks
            fio = start_fio(str(root / "load"), size=2 * MIB, time_based=1, runtime=3600, verify_backlog=8)
            try:
                _grow(daemon, status.path, image)
                run("resize2fs", status.path)
                assert os.statvfs(root).f_blocks > 1.5 * room
                fio.send_signal(signal.SIGINT)
                result = finish_fio(fio, may_fail=True)
                assert result.errors == 0 and result.written_bytes and result.read_bytes, result.text
            finally:
                drop_fio(fio)


def _grow(daemon: Daemon, path: str, image: Path) -> None:
    result = daemon.client.resize("grow", NEW)
    assert (result.before_bytes, result.after_bytes) == (OLD, NEW)
    assert disk_bytes(path) == NEW == image.stat().st_size
    before = daemon.status("grow").backend.pid
    assert before is not None
    kill(before)
    wait_for_backend(daemon, "grow", before)
    # The daemon dies while the size changes: there is one size afterwards, the old one or the new one.
    with resize_in_another_process(daemon, "grow", LAST):
        daemon.crash()
    daemon.start()
    assert daemon.wait_live("grow").size_bytes in (NEW, LAST)
    assert daemon.client.resize("grow", LAST).after_bytes == LAST
    assert disk_bytes(path) == LAST == image.stat().st_size
    listed = daemon.status("grow")
    assert (listed.size_bytes, listed.config_size_bytes) == (LAST, OLD)


@pytest.mark.one_kernel("6.12")
def test_a_driver_without_update_size_is_named_with_the_way_out_and_nothing_changes(daemon: Daemon) -> None:
    if get_features() & Feature.UPDATE_SIZE:
        pytest.skip("this kernel's driver has UPDATE_SIZE")
    image = daemon.path("stays.img")
    with daemon.device("stays", "file", options={"path": image, "size": "16M"}) as status:
        assert status.path is not None
        with pytest.raises(RemoteError, match=r"has no UPDATE_SIZE \(Linux 6.16 has\): unmount the disk"):
            daemon.client.resize("stays", NEW)
        assert disk_bytes(status.path) == OLD == image.stat().st_size
        assert daemon.client.resize("stays", OLD).after_bytes == OLD
