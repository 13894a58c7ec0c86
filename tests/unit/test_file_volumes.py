"""`ublkpool volume` on files: made whole or not at all, refused while in use, cloned with their holes."""

import errno
import fcntl
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ublkpool.backends import _file_volumes
from ublkpool.backends._file_volumes import FileVolumeOptions, FileVolumes
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.loader import load_volumes
from ublkpool.bufpool.sdk.volumes import VolumeError
from ublkpool.daemon.cli.commands import cli

MIB = 1 << 20


def _volumes(path: Path) -> FileVolumes:
    return FileVolumes(FileVolumeOptions(path=path))


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["volume", *map(str, arguments)])


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A volume of 8 MiB with some data and holes."""
    path = tmp_path / "disk.img"
    _volumes(path).create(8 * MIB)
    with path.open("r+b") as file:
        for at in (0, 3 * MIB, 8 * MIB - 4096):
            os.pwrite(file.fileno(), random.Random(at).randbytes(4096), at)
    return path


@pytest.fixture
def in_use(disk: Path) -> Iterator[Path]:
    """The volume, locked as a backend that writes locks it."""
    with disk.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield disk


def test_a_new_volume_is_sparse_and_private(tmp_path: Path) -> None:
    made = _run("create", "file", f"path={tmp_path}/new", "--size", "10G")
    assert (made.exit_code, made.stdout) == (0, f"path={tmp_path}/new\n"), made.output
    status = (tmp_path / "new").stat()
    assert (status.st_size, status.st_blocks, status.st_mode & 0o777) == (10 << 30, 0, 0o600)
    assert [each.name for each in tmp_path.iterdir()] == ["new"]


def test_what_exists_is_never_replaced(disk: Path) -> None:
    before = disk.read_bytes()
    with pytest.raises(VolumeError, match="exists already"):
        _volumes(disk).create(MIB)
    with pytest.raises(VolumeError, match="exists already"):
        _volumes(disk).clone(str(disk), print)
    # A link to nothing has the name, too.
    link = disk.with_name("link")
    link.symlink_to("nowhere")
    with pytest.raises(VolumeError, match="exists already"):
        _volumes(link).create(MIB)
    assert disk.read_bytes() == before
    assert sorted(each.name for each in disk.parent.iterdir()) == ["disk.img", "link"]


def test_a_name_that_is_taken_during_a_clone_stays_what_it_is(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = disk.with_name("target")

    def taken_meanwhile(source: int, file: int, progress: object) -> None:
        target.write_text("another one's")

    monkeypatch.setattr(_file_volumes, "_FICLONE", 0)
    monkeypatch.setattr(_file_volumes, "_copy", taken_meanwhile)
    with pytest.raises(VolumeError, match="exists already"):
        _volumes(disk).clone(str(target), print)
    assert target.read_text() == "another one's"
    assert sorted(each.name for each in disk.parent.iterdir()) == ["disk.img", "target"]


@pytest.mark.parametrize("size_bytes", [0, -512, 1000])
def test_a_size_is_whole_blocks(tmp_path: Path, size_bytes: int) -> None:
    with pytest.raises(VolumeError, match="multiple of 512"):
        _volumes(tmp_path / "new").create(size_bytes)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_made_where_it_would_end_with_the_boot() -> None:
    with pytest.raises(BackendError, match="end with the boot"):
        _volumes(Path("/dev/ublkpool-volume")).create(MIB)


def test_the_files_of_a_directory_are_listed_with_their_users(in_use: Path) -> None:
    (in_use.parent / "directory").mkdir()
    (in_use.parent / ".other.partial").write_bytes(b"unfinished")
    listed = _run("list", "file", f"path={in_use.parent}", "--json")
    assert listed.exit_code == 0, listed.output
    (found,) = json.loads(listed.stdout)
    assert (found["name"], found["size_bytes"], found["snapshots"]) == ("disk.img", 8 * MIB, [])
    assert 0 < found["used_bytes"] < MIB
    assert len(found["users"]) == 1
    assert found["users"][0].startswith(f"process {os.getpid()} ")
    table = _run("list", "file", f"path={in_use.parent}").stdout.splitlines()
    assert table[0].split() == ["volume", "size", "used", "parent", "snapshots", "used", "by"]
    assert table[1].split()[:2] == ["disk.img", "8M"]


def test_a_volume_grows_keeps_its_content_and_never_shrinks(disk: Path) -> None:
    before = disk.read_bytes()
    grown = _run("resize", "file", f"path={disk}", "--size", "16M")
    assert grown.stdout == "grew from 8M to 16M (16777216 bytes)\n", grown.output
    assert disk.read_bytes() == before + bytes(8 * MIB)
    with pytest.raises(VolumeError, match="never shrinks"):
        _volumes(disk).resize(8 * MIB)
    assert disk.stat().st_size == 16 * MIB


def test_a_volume_in_use_is_neither_grown_nor_cloned_nor_deleted(in_use: Path) -> None:
    for act in (
        lambda: _volumes(in_use).resize(16 * MIB),
        lambda: _volumes(in_use).clone(str(in_use.with_name("copy")), print),
        lambda: _volumes(in_use).delete(),
    ):
        with pytest.raises(VolumeError, match=rf"in use by process {os.getpid()} .*ublkpool del"):
            act()
    assert in_use.stat().st_size == 8 * MIB
    assert [each.name for each in in_use.parent.iterdir()] == ["disk.img"]


def test_a_volume_that_is_only_read_can_be_cloned_but_not_deleted(disk: Path) -> None:
    with disk.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        _volumes(disk).clone(str(disk.with_name("copy")), print)
        with pytest.raises(VolumeError, match="in use"):
            _volumes(disk).delete()
    _volumes(disk).delete()
    assert [each.name for each in disk.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("copies", ["by the file system", "in the kernel", "here"])
def test_a_clone_has_the_content_and_the_holes(
    disk: Path, monkeypatch: pytest.MonkeyPatch, copies: str
) -> None:
    if copies != "by the file system":
        monkeypatch.setattr(_file_volumes, "_FICLONE", 0)
    if copies == "here":

        def refused(*_: object) -> int:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "copy_file_range", refused)
    seen: list[tuple[int, int]] = []
    target = disk.with_name("copy")
    assert _volumes(disk).clone(str(target), lambda *done: seen.append(done)) == f"path={target}"
    assert target.read_bytes() == disk.read_bytes()
    assert target.stat().st_blocks <= disk.stat().st_blocks
    if copies != "by the file system":
        assert seen == sorted(seen)
        assert seen[-1] == (8 * MIB, 8 * MIB)


def test_a_clone_that_fails_leaves_nothing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_file_volumes, "_FICLONE", 0)
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space"):
        _volumes(disk).clone(str(disk.with_name("copy")), print)
    assert [each.name for each in disk.parent.iterdir()] == ["disk.img"]


def test_what_is_no_file_is_no_volume(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(VolumeError, match="not a regular file"):
        _volumes(tmp_path / "fifo").clone(str(tmp_path / "copy"), print)
    with pytest.raises(VolumeError, match="no such volume"):
        _volumes(tmp_path / "missing").delete()
    with pytest.raises(VolumeError, match="no directory"):
        _volumes(tmp_path / "missing" / "new").create(MIB)
    with pytest.raises(VolumeError, match="no directory"):
        _volumes(tmp_path / "missing").list()


def test_a_file_has_no_snapshots_and_says_what_to_do_instead(disk: Path) -> None:
    with pytest.raises(VolumeError, match="ublkpool volume clone file path=") as refused:
        _volumes(disk).snapshot("monday")
    assert "\n" not in str(refused.value)


def test_a_kind_without_volumes_and_a_wrong_option_are_named() -> None:
    with pytest.raises(BackendError, match="memory: has no volumes"):
        load_volumes("memory", {})
    with pytest.raises(BackendError, match="unknown option size=1G; options are: path=PATH"):
        load_volumes("file", {"path": "x", "size": "1G"})
    with pytest.raises(BackendError, match="no backend is called"):
        load_volumes("nothing", {})
