"""The guest has the properties that the other tests rely on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.vm import warm_starts
from support.vm.daemon import DEADLINE_S, MARK, WARM, eventually, marked_processes

ROOT_READ_ONLY_ERRNO = 30
BEYOND_THE_HEAP_BYTES = 1 << 20
"""The C library maps so much memory by itself, at a higher address than that of the heap."""
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


def test_a_copy_of_the_warm_process_is_a_child_with_a_command_line_and_an_environment_of_its_own(
    tmp_path: Path,
) -> None:
    look = "import os; print(*map(ascii, (open('/proc/self/cmdline').read(), os.getppid(), os.environ))); 1/0"
    command = [sys.executable, "-m", "timeit", "-n", "1", look]
    with (tmp_path / "out").open("w+b") as out:
        child = WARM.start(command, {**os.environ, "ONE": "1"}, out.fileno())
        assert child.wait(DEADLINE_S) == 1 and child.poll() == 1
        out.seek(0)
        said = out.read().decode()
    words = "\0".join([*command, ""])
    assert said.startswith(f"{words!a} {os.getpid()} ") and "'ONE': '1'" in said
    assert "ZeroDivisionError" in said


def test_tests_find_a_copy_of_the_warm_process_by_its_mark(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    wait = f"open('/proc/{os.getpid()}/fd/{reader}').read()"
    command = [sys.executable, "-m", "timeit", "-n", "1", wait]
    with os.fdopen(reader), os.fdopen(writer, "w"), (tmp_path / "out").open("wb") as out:
        child = WARM.start(command, {**os.environ, MARK: str(tmp_path)}, out.fileno())
        found = eventually(lambda: marked_processes(str(tmp_path)), "the copy is found")
        child.kill()
        assert child.wait(DEADLINE_S) == -signal.SIGKILL
    assert found == {child.pid: " ".join(command)}


def test_what_proc_shows_of_a_copy_may_move_up_and_down_in_memory() -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for count in (2000, BEYOND_THE_HEAP_BYTES, 2000, BEYOND_THE_HEAP_BYTES, 4000):
                word, value = "w" * count, "v" * count
                warm_starts._show(["python", word], {"NAME": value})
                assert Path("/proc/self/cmdline").read_text() == f"python\0{word}\0"
                assert Path("/proc/self/environ").read_text() == f"NAME={value}\0"
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
