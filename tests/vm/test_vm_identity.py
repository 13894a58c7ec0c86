"""A store that is missing, emptied or replaced: the device waits; no new store is made, no zeros are read."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest

from support.vm.daemon import Daemon, eventually
from support.vm.files import checksums, copy_tree, forget_cached, make_file_system, mounted, run
from support.vm.process import Forked, read_block, run_command, write_block
from support.vm.recovery import kill, wait_for_backend
from ublkpool.daemon.device.state import DeviceState
from ublkpool.daemon.errors import DaemonError

pytestmark = pytest.mark.one_kernel("7.3")
MIB = 1 << 20
SIZE = 64 * MIB
PAGE = 4096


def state(daemon: Daemon, name: str) -> DeviceState:
    """The daemon's state file of a device."""
    return msgspec.json.decode((daemon.state_dir / f"{name}.json").read_bytes(), type=DeviceState)


def refused(daemon: Daemon, name: str, *words: str) -> str:
    """Wait until `list` shows this text in the reason why the device has no backend."""

    def reason() -> str:
        text = next((each.reason for each in daemon.client.devices() if each.name == name), "")
        return text if all(word in text for word in words) else ""

    return eventually(reason, f"the reason of {name} says {words}")


def end_backend(daemon: Daemon, name: str) -> int:
    """Kill the backend with SIGKILL; returns its pid."""
    pid = daemon.status(name).backend.pid
    assert pid is not None and kill(pid)
    return pid


def test_a_renamed_file_is_not_made_anew_and_its_device_goes_on_when_it_is_back(daemon: Daemon) -> None:
    image, away, tree = daemon.path("g.img"), daemon.path("away.img"), daemon.path("tree")
    disk = daemon.add("g", "file", {"path": image, "size": SIZE}).path or ""
    make_file_system("ext4", disk)
    tree.mkdir()
    with mounted(disk, tree):
        copy_tree(tree)
        before, first = checksums(tree), state(daemon, "g").generation
        # Before the backend dies, because without it dirty pages could not be written.
        forget_cached()
        image.rename(away)
        pid = end_backend(daemon, "g")
        refused(daemon, "g", "no such file", str(image))
        reading = Forked(partial(_reads_as, tree, before))
        # The daemon starts a new backend every few seconds: wait for two.
        said = daemon.said()
        eventually(lambda: daemon.said() != said, "the next backend has tried")
        assert reading.running and not image.exists()
        away.rename(image)
        wait_for_backend(daemon, "g", pid)
        assert reading.wait() == 0
        assert state(daemon, "g").generation > first
    daemon.delete("g")
    assert image.stat().st_size == SIZE
    assert state(daemon, "g").store is None and state(daemon, "g").generation > first


def _reads_as(tree: Path, expected: dict[str, str]) -> int:
    return 0 if checksums(tree) == expected else 1


@contextmanager
def served_file(daemon: Daemon, name: str, directory: Path) -> Iterator[tuple[Path, str, bytes]]:
    """A device on a file that holds one written block."""
    image, data = directory / f"{name}.img", os.urandom(PAGE)
    disk = daemon.add(name, "file", {"path": image, "size": "16M"}).path or ""
    assert write_block(disk, 0, data) == 0
    yield image, disk, data
    daemon.delete(name)


def test_a_file_that_was_replaced_is_refused_with_both_named_until_it_is_accepted(daemon: Daemon) -> None:
    with served_file(daemon, "swapped", daemon.path("")) as (image, disk, data):
        first = image.stat().st_ino
        image.rename(daemon.path("first.img"))
        image.write_bytes(bytes(16 * MIB))
        second = image.stat().st_ino
        pid = end_backend(daemon, "swapped")
        reason = refused(daemon, "swapped", f"inode {first}", f"inode {second}", "ublkpool rebind swapped")
        assert reason.index(f"inode {first}") < reason.index(f"inode {second}")
        reading = Forked(partial(_block_is, disk, bytes(PAGE)))
        assert reading.running
        daemon.client.rebind("swapped")
        wait_for_backend(daemon, "swapped", pid)
        assert reading.wait() == 0
        pid = end_backend(daemon, "swapped")
        wait_for_backend(daemon, "swapped", pid)
        image.unlink()
        daemon.path("first.img").rename(image)
        end_backend(daemon, "swapped")
        refused(daemon, "swapped", f"inode {first}", f"inode {second}")
        assert run_command(daemon, "rebind", "swapped").status == 0
        assert Forked(partial(_block_is, disk, data)).wait() == 0


def _block_is(disk: str, expected: bytes) -> int:
    return 0 if read_block(disk, 0, PAGE) == expected else 1


def test_a_file_that_was_emptied_is_not_grown(daemon: Daemon) -> None:
    with served_file(daemon, "emptied", daemon.path("")) as (image, disk, data):
        image.write_bytes(b"")
        pid = end_backend(daemon, "emptied")
        refused(daemon, "emptied", "is empty", str(image))
        reading = Forked(partial(_block_is, disk, data))
        with image.open("r+b") as file:
            file.write(data)
        refused(daemon, "emptied", str(image), str(PAGE))
        assert reading.running and image.stat().st_size == PAGE
        os.truncate(image, 16 * MIB)
        wait_for_backend(daemon, "emptied", pid)
        assert reading.wait() == 0


@contextmanager
def _ext4(directory: Path) -> Iterator[Path]:
    image, path = directory / "ext4.img", directory / "ext4"
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    run("modprobe", "loop")
    # With a journal, because without one ext4 does not reuse the inode number of a removed file for some seconds.
    run("mkfs.ext4", "-q", str(image))
    path.mkdir(exist_ok=True)
    run("mount", "-o", "loop", str(image), str(path))
    try:
        yield path
    finally:
        run("umount", str(path))
        image.unlink()


def test_a_new_file_with_the_inode_number_of_a_removed_one_is_refused(daemon: Daemon) -> None:
    with _ext4(daemon.path("")) as directory, served_file(daemon, "reused", directory) as (image, _, _):
        bound = state(daemon, "reused").store
        assert bound is not None
        assert (bound.identity.strength, bound.identity.in_boot) == ("strong", "") and bound.identity.value
        inode = image.stat().st_ino
        image.unlink()
        # The inode number is free only after the backend, which has the file open, has ended.
        end_backend(daemon, "reused")
        refused(daemon, "reused", "no such file")
        image.write_bytes(bytes(16 * MIB))
        assert image.stat().st_ino == inode
        refused(daemon, "reused", "ublkpool rebind reused")
        daemon.client.rebind("reused")
        wait_for_backend(daemon, "reused", None)


CONFIG = """
[[device]]
name = "lasting"

[device.backend]
kind = "file"
path = "{image}"
size = "16M"
"""


def _live(daemon: Daemon, name: str) -> str:
    eventually(lambda: any(each.name == name for each in daemon.client.devices()), f"{name} is known")
    return daemon.wait_live(name).path or ""


def test_what_was_first_served_is_remembered_when_everything_begins_anew() -> None:
    """After a stop, and after all processes and the run directory are gone, as after a reboot."""
    daemon = Daemon()
    image, away, data = daemon.path("l.img"), daemon.path("away.img"), os.urandom(PAGE)
    daemon._config = CONFIG.format(image=image)
    with daemon.life():
        disk = _live(daemon, "lasting")
        assert write_block(disk, 0, data) == 0
        seen = [state(daemon, "lasting").generation]
        assert daemon.stop() == 0
        image.rename(away)
        daemon.start()
        refused(daemon, "lasting", "no such file")
        # The reason shows as soon as the backend says it; the name is free for an add once that backend has ended.
        eventually(lambda: daemon.status("lasting").state == "failed", "its start has failed")
        assert not image.exists()
        image.write_bytes(bytes(16 * MIB))
        with pytest.raises(DaemonError, match=f"inode {away.stat().st_ino}.*inode {image.stat().st_ino}"):
            daemon.add("lasting", "file", {"path": image})
        daemon.crash_everything()
        subprocess.run(["rm", "-rf", str(daemon.run_dir)], check=True)
        away.rename(image)
        daemon.start()
        disk = _live(daemon, "lasting")
        assert read_block(disk, 0, PAGE) == data
        seen.append(state(daemon, "lasting").generation)
        assert seen[0] < seen[1]
        assert daemon.client.delete(["lasting"]) == ["lasting"]


def test_a_loop_device_that_has_another_file_now_is_refused(daemon: Daemon) -> None:
    first, second, data = daemon.path("first.img"), daemon.path("second.img"), os.urandom(PAGE)
    for image in (first, second):
        image.write_bytes(bytes(16 * MIB))
    run("modprobe", "loop")
    loop = run("losetup", "-f", "--show", str(first)).strip()
    try:
        daemon.add("looped")
        backend = daemon.backend("file", "looped", path=loop)
        disk = daemon.wait_live("looped").path or ""
        assert write_block(disk, 0, data) == 0
        backend.end(signal.SIGTERM)
        run("losetup", "-d", loop)
        run("losetup", loop, str(second))
        other = daemon.backend("file", "looped", path=loop)
        assert other.wait() != 0
        assert str(first) in other.said() and str(second) in other.said() and "rebind" in other.said()
        run("losetup", "-d", loop)
        run("losetup", loop, str(first))
        daemon.backend("file", "looped", path=loop)
        assert read_block(disk, 0, PAGE) == data
        daemon.delete("looped")
    finally:
        daemon.clean()
        run("losetup", "-d", loop)


def test_a_memory_disk_without_its_keeper_is_not_replaced_by_an_empty_one(daemon: Daemon) -> None:
    disk = daemon.add("lost", "memory", {"size": "4M"}).path or ""
    assert write_block(disk, 0, os.urandom(PAGE)) == 0
    keeper = eventually(lambda: _keeper(daemon), "there is a keeper")
    kill(keeper)
    end_backend(daemon, "lost")
    refused(daemon, "lost", "ended with its keeper", "ublkpool rebind lost")
    reading = Forked(partial(_block_is, disk, bytes(PAGE)))
    assert reading.running
    daemon.client.rebind("lost")
    assert reading.wait() == 0
    daemon.delete("lost")


def _keeper(daemon: Daemon) -> int:
    found = [pid for pid, words in daemon._strays().items() if "keeper.py" in words]
    return found[0] if found else 0


def test_a_backend_whose_attach_cannot_be_remembered_is_refused_until_it_can(daemon: Daemon) -> None:
    with served_file(daemon, "unsaved", daemon.path("")) as (_, disk, data):
        before = state(daemon, "unsaved").generation
        elsewhere = daemon.path("elsewhere")
        daemon.state_dir.rename(elsewhere)
        end_backend(daemon, "unsaved")
        reading = Forked(partial(_block_is, disk, data))
        refused(daemon, "unsaved", str(daemon.state_dir), "cannot write unsaved.json", "No such file")
        assert reading.running
        elsewhere.rename(daemon.state_dir)
        assert reading.wait() == 0
        assert state(daemon, "unsaved").generation > before


def test_a_state_directory_that_cannot_be_made_or_is_in_use_is_one_line(daemon: Daemon) -> None:
    read_only = daemon.path("read-only")
    read_only.mkdir()
    run("mount", "-t", "tmpfs", "-o", "ro", "none", str(read_only))
    try:
        for directory, reason in (
            (read_only / "state", "Read-only file system"),
            (daemon.state_dir, "another daemon uses it"),
        ):
            # Of an option that is given twice the last one holds.
            other = ("--run-dir", str(daemon.path("other")), "--state-dir", str(directory))
            done = run_command(daemon, "serve", *other)
            line = f"ublkpool: state directory {directory}: {reason}: choose another with --state-dir\n"
            assert done.status != 0 and done.err.endswith(line), done.err
    finally:
        run("umount", str(read_only))
