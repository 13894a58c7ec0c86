"""The run directory and the state directory: made, accepted unchanged, or refused."""

import os
from pathlib import Path

import pytest

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.settings.own_directory import make_own_directory


def make(path: Path, mode: int = 0o700) -> bool:
    return make_own_directory(path, "state directory", "--state-dir", mode)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_a_missing_directory_is_made_with_exactly_its_mode(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "parent").mkdir(0o755)
        (tmp_path / "parent").chmod(0o755)
        assert make(tmp_path / "parent" / "own", 0o750)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "parent" / "own") == 0o750


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o500])
def test_an_existing_directory_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(mode)
    assert not make(tmp_path / "there")
    assert mode_of(tmp_path / "there") == mode


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_directory_that_others_may_write_to_is_refused_and_left_alone(tmp_path: Path, mode: int) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(DaemonError, match=r"^state directory .*/open: other users may write .*--state-dir$"):
        make(tmp_path / "open")
    assert mode_of(tmp_path / "open") == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a directory away")
def test_a_directory_of_another_user_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(DaemonError, match="belongs to user 12345"):
        make(tmp_path / "theirs")
    assert (tmp_path / "theirs").stat().st_uid == 12345


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DaemonError, match="not a directory"):
        make(tmp_path / "file")
    with pytest.raises(DaemonError, match=r"Not a directory|File exists"):
        make(tmp_path / "file" / "below")


@pytest.mark.parametrize("directory", ["/etc", "/", "/dev", "", "/dev/shm/..", "/var/lib"])
def test_a_directory_of_the_system_and_the_current_one_are_refused(directory: str) -> None:
    with pytest.raises(DaemonError, match=r"directory of the system|the current directory"):
        make(Path(directory))


def test_a_new_directory_is_durable_with_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    assert make(tmp_path / "lib" / "at" / "own")
    assert {str(tmp_path), str(tmp_path / "lib"), str(tmp_path / "lib" / "at")} <= set(synced)
    synced.clear()
    assert not make(tmp_path / "lib" / "at" / "own") and synced == []
