"""`del` without `--force` deletes no disk that is in use, and names its users."""

import mmap
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, eventually
from support.vm.files import load_module, make_file_system, mounted, partition_table, run
from ublkpool.daemon.errors import DaemonError

MIB = 1 << 20
DISK_BYTES = 64 * MIB
Use = Callable[[Daemon, str], AbstractContextManager[str]]


def refusal(daemon: Daemon, names: list[str] | None) -> str:
    with pytest.raises(DaemonError) as caught:
        daemon.client.delete(names)
    return str(caught.value)


def deleted(daemon: Daemon, name: str) -> bool:
    """Whether the device was deleted; a process that has just ended may still count as a user for a moment."""
    try:
        daemon.client.delete([name])
    except DaemonError as error:
        assert "in use" in str(error)
        return False
    return True


@contextmanager
def _open(path: str, flags: int) -> Iterator[str]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield f"process {os.getpid()} "
    finally:
        os.close(fd)


@contextmanager
def opened_by_a_shell(_daemon: Daemon, path: str) -> Iterator[str]:
    shell = subprocess.Popen(
        ["bash", "-c", f"exec 9<>{path}; echo open; read -r"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with shell:
        assert shell.stdout is not None and shell.stdout.readline() == b"open\n"
        yield f"process {shell.pid} (bash) has it open"
        shell.kill()


def opened_by_a_reader(_daemon: Daemon, path: str) -> AbstractContextManager[str]:
    return _open(path, os.O_RDONLY)


@contextmanager
def opened_by_another_name(daemon: Daemon, path: str) -> Iterator[str]:
    node = Path("/dev/ublkpool-test-node")
    os.mknod(node, 0o600 | stat.S_IFBLK, Path(path).stat().st_rdev)
    try:
        with _open(str(node), os.O_RDWR) as words:
            yield words
    finally:
        node.unlink()


@contextmanager
def mapped(_daemon: Daemon, path: str) -> Iterator[str]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    memory = mmap.mmap(fd, mmap.PAGESIZE)
    # Python's `mmap` keeps a duplicate of the descriptor, which is closed here without its knowledge.
    os.close(fd)
    duplicate = next(each for each in Path("/proc/self/fd").iterdir() if _is_link_to(each, path))
    kept = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(kept, int(duplicate.name), inheritable=False)
    os.close(kept)
    try:
        yield f"process {os.getpid()} "
    finally:
        memory.close()


def _is_link_to(link: Path, path: str) -> bool:
    try:
        return str(link.readlink()) == path
    except OSError:
        return False


@contextmanager
def under_a_loop_device(_daemon: Daemon, path: str) -> Iterator[str]:
    load_module("loop")
    loop = run("losetup", "--find", "--show", path).strip()
    try:
        yield f"{Path(loop).name} is a loop device on it"
    finally:
        run("losetup", "--detach", loop)


@contextmanager
def under_device_mapper(_daemon: Daemon, path: str) -> Iterator[str]:
    load_module("dm-mod")
    name = "ublkpool-test"
    run("dmsetup", "create", "--noudevsync", name, "--table", f"0 2048 linear {path} 0")
    try:
        yield f"({name})"
    finally:
        run("dmsetup", "remove", "--noudevsync", "--retry", name)


@contextmanager
def used_for_swap(_daemon: Daemon, path: str) -> Iterator[str]:
    run("mkswap", path)
    run("swapon", path)
    try:
        yield f"swap is on {path}"
    finally:
        run("swapoff", path)


@contextmanager
def mounted_in_another_namespace(daemon: Daemon, path: str) -> Iterator[str]:
    make_file_system("ext4", path)
    directory = daemon.path("elsewhere")
    directory.mkdir()
    script = f"mount {path} {directory} && echo mounted && read -r"
    other = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout is not None and other.stdout.readline() == b"mounted\n"
        yield f"mounted at {directory} for process {other.pid} (bash)"
        other.kill()


@contextmanager
def a_partition_is_mounted(daemon: Daemon, path: str) -> Iterator[str]:
    with Path(path).open("r+b") as disk:
        disk.write(partition_table(2048, 40960))
    run("blockdev", "--rereadpt", path)
    eventually(Path(f"{path}p1").exists, "the partition is there")
    make_file_system("ext4", f"{path}p1")
    with mounted(f"{path}p1", daemon.path("partition")) as directory:
        yield f"mounted at {directory}"


@contextmanager
def under_another_of_our_devices(daemon: Daemon, path: str) -> Iterator[str]:
    with daemon.device("above", "file", options={"path": path}):
        pid = daemon.status("above").backend.pid
        yield f"process {pid} "


USES: list[Use] = [
    opened_by_a_shell,
    opened_by_a_reader,
    opened_by_another_name,
    mapped,
    under_a_loop_device,
    under_device_mapper,
    used_for_swap,
    mounted_in_another_namespace,
    under_another_of_our_devices,
    a_partition_is_mounted,
]


def test_a_disk_in_use_is_not_deleted_and_the_error_names_its_users(daemon: Daemon) -> None:
    path = daemon.add("busy", "memory", {"size": DISK_BYTES}).path
    assert path is not None
    for use in USES:
        with use(daemon, path) as words:
            said = refusal(daemon, ["busy"])
            assert "its disk" in said and "in use" in said and "--force" in said, use
            assert words in said, use
            assert daemon.status("busy").state == "live", use
    # The device served meanwhile, and is deleted once it has no users.
    eventually(lambda: deleted(daemon, "busy"), "the disk goes when it is not used any more")


@pytest.mark.one_kernel("7.3")
def test_all_devices_stay_if_one_of_them_is_in_use(daemon: Daemon) -> None:
    paths = [daemon.add(name, "null", {"size": DISK_BYTES}).path for name in ("first", "second", "third")]
    assert paths[1] is not None
    with opened_by_a_shell(daemon, paths[1]) as words:
        said = refusal(daemon, None)
        assert said.startswith("nothing was deleted: second: ") and words in said
        assert [each.state for each in daemon.client.devices()] == ["live"] * 3
        daemon.client.delete(["first"])
        assert daemon.client.delete(["second"], force=True) == ["second"]
    daemon.client.delete(["third"])
