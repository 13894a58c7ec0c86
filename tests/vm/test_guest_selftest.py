"""The guest has the properties that the other tests rely on."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT_READ_ONLY_ERRNO = 30
in_guest = pytest.mark.skipif("UBLKPOOL_GUEST" not in os.environ, reason="about the guest, not the driver")


def test_the_driver_is_loaded() -> None:
    assert Path("/sys/module/ublk_drv").is_dir()
    assert os.access("/dev/ublk-control", os.W_OK)


@in_guest
def test_the_kernel_is_the_one_asked_for() -> None:
    assert os.uname().release.startswith(os.environ["UBLKPOOL_GUEST"] + ".")


@in_guest
def test_the_root_is_read_only() -> None:
    with pytest.raises(OSError) as refused:
        Path("/written-by-a-test").touch()
    assert refused.value.errno == ROOT_READ_ONLY_ERRNO


@in_guest
@pytest.mark.parametrize("directory", ["/tmp", "/var/tmp", "/run", "/dev/shm"])
def test_scratch_directories_are_writable_and_of_the_guest_alone(directory: str) -> None:
    device = Path(directory).stat().st_dev
    assert device != Path("/").stat().st_dev
    scratch = Path(directory) / "written-by-a-test"
    scratch.write_text("x")
    scratch.unlink()


@in_guest
def test_modprobe_finds_the_modules_of_the_running_kernel() -> None:
    subprocess.run(["/sbin/modprobe", "null_blk", "nr_devices=0"], check=True)
    assert Path("/sys/module/null_blk").is_dir()


@in_guest
def test_the_loopback_interface_is_up() -> None:
    assert Path("/sys/class/net/lo/carrier").read_text() == "1\n"
