"""`ublkpool volume` on overlays: committed whole or not at all, thrown away at once, refused while in use."""

import fcntl
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ublkpool.backends import _cow_overlay, _cow_volumes
from ublkpool.backends._cow_format import read_head
from ublkpool.backends._cow_volumes import CowVolumeOptions, CowVolumes
from ublkpool.backends.cow import CowBackend, CowOptions
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Hint
from ublkpool.daemon.cli.commands import cli

MIB = 1 << 20
BASE_BYTES = 3 * MIB + 700
SIZE_BYTES = 96 * MIB
CONTENT = random.Random(1).randbytes(BASE_BYTES)
HINT = Hint(device="vol0", run_dir=Path("/nonexistent"))


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["volume", *map(str, arguments)])


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """An overlay of 96 MiB; its file and its map have some blocks, and some zeros over its base."""
    (tmp_path / "base").write_bytes(CONTENT)
    path = tmp_path / "overlay"
    made = _run("create", "cow", f"overlay={path}", f"base={tmp_path}/base", "--size", "96M")
    assert (made.exit_code, made.stdout) == (0, f"overlay={path}\n"), made.output
    _put(path)
    return path


def _put(path: Path) -> None:
    """Blocks 1 and 2 and the first of the second page of the map are data, block 4 is zeros."""
    with path.open("r+b") as file:
        layout = read_head(file.fileno(), path).layout
        for at in (layout.live_at, layout.durable_at):
            os.pwrite(file.fileno(), (0b10_00_01_01_00).to_bytes(8, "little"), at)
            os.pwrite(file.fileno(), (1).to_bytes(8, "little"), at + 4096)
        os.pwrite(file.fileno(), b"d" * 8192, layout.data_at + 4096)
        os.pwrite(file.fileno(), b"e" * 4096, layout.data_at + 64 * MIB)


def _held(path: Path) -> tuple[int, dict[int, bytes]]:
    """A file's size, and by offset its pages that are not zeros."""
    pages = {}
    with path.open("rb") as file:
        at, size = 0, os.fstat(file.fileno()).st_size
        while at < size:
            try:
                data = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), data, os.SEEK_HOLE)
            for page in range(data, at, 4096):
                if any(content := os.pread(file.fileno(), min(4096, size - page), page)):
                    pages[page] = content
    return size, pages


def _expected(size_bytes: int = SIZE_BYTES) -> tuple[int, dict[int, bytes]]:
    expected = bytearray(CONTENT.ljust(4 * MIB, b"\0"))
    expected[4096:12288] = b"d" * 8192
    expected[16384:20480] = bytes(4096)
    pages = {at: bytes(expected[at : at + 4096]) for at in range(0, len(expected), 4096)}
    pages[64 * MIB] = b"e" * 4096
    return size_bytes, {at: each for at, each in pages.items() if any(each)}


@contextmanager
def _served(overlay: Path) -> Iterator[None]:
    backend = CowBackend(CowOptions(overlay=overlay))
    backend.open(HINT)
    yield
    backend.close()


def test_a_commit_is_base_and_overlay_together_and_changes_neither(overlay: Path) -> None:
    before = _held(overlay)
    target = overlay.with_name("golden")
    made = _run("commit", "cow", f"overlay={overlay}", "--to", target)
    assert (made.exit_code, made.stdout) == (0, f"base={target}\n"), made.output
    assert _held(target) == _expected()
    assert target.stat().st_blocks * 512 < 4 * MIB
    assert _held(overlay) == before
    assert overlay.with_name("base").read_bytes() == CONTENT
    moved = _run("reset", "cow", f"overlay={overlay}", f"base={target}")
    assert (moved.exit_code, moved.stdout) == (0, f"overlay={overlay} base={target}\n"), moved.output
    again = overlay.with_name("again")
    assert _run("commit", "cow", f"overlay={overlay}", "--to", again).exit_code == 0
    assert _held(again) == _expected()


def test_without_copies_in_the_kernel_a_commit_copies_itself(
    overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", cannot)
    target = overlay.with_name("golden")
    assert _run("commit", "cow", f"overlay={overlay}", "--to", target).exit_code == 0
    assert _held(target) == _expected()


def test_a_commit_that_fails_leaves_nothing(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(overlay.parent.iterdir())

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_cow_volumes, "copy_part", full)
    failed = _run("commit", "cow", f"overlay={overlay}", "--to", overlay.with_name("golden"))
    assert failed.exit_code != 0
    assert "No space left on device" in failed.output
    assert sorted(overlay.parent.iterdir()) == before


def test_a_commit_replaces_nothing(overlay: Path) -> None:
    target = overlay.with_name("golden")
    target.write_text("another one's")
    failed = _run("commit", "cow", f"overlay={overlay}", "--to", target)
    assert failed.exit_code == 2
    assert "exists already" in failed.output
    assert target.read_text() == "another one's"


def test_a_reset_disk_reads_as_its_base_and_takes_no_room(overlay: Path) -> None:
    inode = overlay.stat().st_ino
    done = _run("reset", "cow", f"overlay={overlay}")
    assert done.exit_code == 0, done.output
    status = overlay.stat()
    assert (status.st_ino, status.st_blocks * 512 <= 8192) == (inode, True)
    with _served(overlay):
        pass
    target = overlay.with_name("golden")
    assert _run("commit", "cow", f"overlay={overlay}", "--to", target).exit_code == 0
    assert (target.stat().st_size, target.read_bytes()[:BASE_BYTES]) == (SIZE_BYTES, CONTENT)


@pytest.mark.parametrize("call", ["write_next_head", "fsync", "ftruncate"])
def test_a_reset_that_is_interrupted_leaves_an_overlay_that_is_refused_until_the_next(
    overlay: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def ends(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        if call == "ftruncate":
            lengths = iter([os.ftruncate, ends])
            now.setattr(os, "ftruncate", lambda *given: next(lengths)(*given))
        else:
            now.setattr(*((os, "fsync") if call == "fsync" else (_cow_overlay, call)), ends)
        with pytest.raises(KeyboardInterrupt):
            CowVolumes(CowVolumeOptions(overlay)).reset()
    with pytest.raises(BackendError, match="is shorter than its disk"), _served(overlay):
        pass
    assert "trouble:  overlay=" in _run("info", "cow", f"overlay={overlay}").stdout
    assert _run("reset", "cow", f"overlay={overlay}").exit_code == 0
    with _served(overlay):
        pass


def test_info_tells_what_lies_in_the_overlay_also_while_it_is_served(overlay: Path) -> None:
    with _served(overlay):
        said = _run("info", "cow", f"overlay={overlay}", "--json")
        assert said.exit_code == 0, said.output
        found = json.loads(said.stdout)
        assert (found["size_bytes"], found["own_bytes"], found["zero_bytes"]) == (SIZE_BYTES, 12288, 4096)
        assert (found["parent"], found["trouble"]) == (str(overlay.with_name("base")), "")
        assert found["users"][0].startswith(f"process {os.getpid()} ")
    lines = _run("info", "cow", f"overlay={overlay}").stdout.splitlines()
    assert lines[0] == "disk:     96M (100663296 bytes)"
    assert lines[2] == "overlay:  12K of the disk (0 %), and 4K of zeros that take no room"
    assert lines[-1] == "used by:  -"
    overlay.with_name("base").unlink()
    assert _run("info", "cow", f"overlay={overlay}").stdout.splitlines()[-1] == (
        f"trouble:  base={overlay.with_name('base')}: No such file or directory"
    )


@pytest.mark.parametrize(
    "command", [("reset",), ("commit", "--to", "new"), ("resize", "--size", "1G"), ("delete",)]
)
def test_nothing_is_done_to_an_overlay_that_is_served(overlay: Path, command: tuple[str, ...]) -> None:
    before = _held(overlay)
    with _served(overlay):
        name, *rest = command
        refused = _run(name, "cow", f"overlay={overlay}", *rest)
        assert refused.exit_code == 2
        assert f"overlay={overlay}: in use by process {os.getpid()}" in refused.output
    assert _held(overlay) == before


def test_an_overlay_grows_keeps_its_content_and_never_shrinks(overlay: Path) -> None:
    grown = _run("resize", "cow", f"overlay={overlay}", "--size", "128M")
    assert grown.stdout == "grew from 96M to 128M (134217728 bytes)\n", grown.output
    assert "never shrinks" in _run("resize", "cow", f"overlay={overlay}", "--size", "96M").output
    target = overlay.with_name("golden")
    assert _run("commit", "cow", f"overlay={overlay}", "--to", target).exit_code == 0
    assert _held(target) == _expected(128 * MIB)


def test_overlays_are_listed_with_their_bases_and_deleted_without_them(overlay: Path) -> None:
    listed = _run("list", "cow", f"overlay={overlay.parent}", "--json")
    (found,) = json.loads(listed.stdout)
    assert (found["name"], found["size_bytes"]) == ("overlay", SIZE_BYTES)
    assert found["parent"] == str(overlay.with_name("base"))
    assert _run("delete", "cow", f"overlay={overlay.with_name('base')}").exit_code != 0
    assert _run("delete", "cow", f"overlay={overlay}").exit_code == 0
    assert [each.name for each in overlay.parent.iterdir()] == ["base"]


def test_a_base_that_a_disk_writes_is_neither_made_an_overlay_on_nor_committed(
    overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ublkpool.bufpool.sdk.claim.LIVE_PATIENCE_S", 0.0)
    base = overlay.with_name("base")
    with base.open("r+b") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        for command in (
            ("create", "cow", f"overlay={overlay}2", f"base={base}", "--size", "96M"),
            ("commit", "cow", f"overlay={overlay}", "--to", overlay.with_name("golden")),
            ("reset", "cow", f"overlay={overlay}"),
        ):
            refused = _run(*command)
            assert refused.exit_code != 0
            assert f"path={base}: locked by process {os.getpid()}" in refused.output, refused.output
    assert sorted(each.name for each in overlay.parent.iterdir()) == ["base", "overlay"]
    assert json.loads(_run("info", "cow", f"overlay={overlay}", "--json").stdout)["own_bytes"] == 12288
