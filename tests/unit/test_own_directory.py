"""The run directory and the state directory: made, accepted unchanged, or refused."""

import os
from pathlib import Path

import pytest

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.settings import own_directory
from ublkpool.daemon.settings.own_directory import make_own_directory

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a directory away")


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


@needs_root
def test_a_directory_of_another_user_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(DaemonError, match="belongs to user 12345"):
        make(tmp_path / "theirs")
    assert (tmp_path / "theirs").stat().st_uid == 12345


THEM = 12345


def parent(tmp_path: Path, mode: int, owner: int = 0, group: int = 0) -> Path:
    made = tmp_path / "parent"
    made.mkdir()
    os.chown(made, owner, group)
    made.chmod(mode)
    return made


@needs_root
@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o1777, 0o555])
def test_a_directory_below_another_user_s_is_refused_and_nothing_is_made(
    tmp_path: Path, mode: int, is_there: bool
) -> None:
    above = parent(tmp_path, mode, owner=THEM)
    own = above / "deeper" / "own"
    if is_there:
        own.mkdir(parents=True, mode=0o700)
    with pytest.raises(
        DaemonError,
        match=rf"^state directory {own}: the directory {above} on its way belongs to user {THEM}.*--state-dir$",
    ):
        make(own)
    assert own.exists() == is_there


@needs_root
@pytest.mark.parametrize(("mode", "group"), [(0o777, 0), (0o775, THEM), (0o2775, THEM), (0o702, 0)])
def test_a_directory_below_one_that_others_may_write_to_is_refused(
    tmp_path: Path, mode: int, group: int
) -> None:
    above = parent(tmp_path, mode, group=group)
    with pytest.raises(DaemonError, match=rf"other users may write to {above} on its way.*mode {mode:04o}"):
        make(above / "own")
    assert list(above.iterdir()) == []


@needs_root
@pytest.mark.parametrize(
    ("mode", "group"), [(0o755, 0), (0o755, THEM), (0o775, 0), (0o1777, 0), (0o1770, THEM)]
)
def test_a_directory_below_root_s_or_a_sticky_one_is_made(tmp_path: Path, mode: int, group: int) -> None:
    above = parent(tmp_path, mode, group=group)
    assert make(above / "deeper" / "own") and not make(above / "deeper" / "own")


@needs_root
def test_an_entry_of_another_user_in_a_sticky_directory_is_no_way(tmp_path: Path) -> None:
    above = parent(tmp_path, 0o1777)
    (above / "theirs").mkdir()
    os.chown(above / "theirs", THEM, THEM)
    with pytest.raises(DaemonError, match=f"the directory {above}/theirs on its way belongs to user {THEM}"):
        make(above / "theirs" / "own")


@needs_root
def test_links_are_followed_and_judged_with_what_they_lead_through(tmp_path: Path) -> None:
    above = parent(tmp_path, 0o755)
    (tmp_path / "ours").symlink_to(above)
    (tmp_path / "relative").symlink_to("parent/../parent")
    assert make(tmp_path / "ours" / "own") and not make(tmp_path / "relative" / "own")
    (tmp_path / "theirs").symlink_to(above)
    os.chown(tmp_path / "theirs", THEM, THEM, follow_symlinks=False)
    with pytest.raises(
        DaemonError, match=f"the symbolic link {tmp_path}/theirs on its way belongs to user {THEM}"
    ):
        make(tmp_path / "theirs" / "own")
    os.chown(above, THEM, THEM)
    for way in ("ours", "relative"):
        with pytest.raises(DaemonError, match=f"the directory {above} on its way belongs to user {THEM}"):
            make(tmp_path / way / "own")


def test_a_link_that_leads_to_itself_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DaemonError, match=r"Too many levels of symbolic links.*--state-dir$"):
        make(tmp_path / "loop" / "own")


@needs_root
def test_a_parent_that_another_user_made_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    above, mkdir = parent(tmp_path, 0o1777), Path.mkdir

    def overtaken(path: Path, mode: int = 0o777) -> None:
        mkdir(path, mode)
        if path.name == "deeper":
            os.chown(path, THEM, THEM)
            raise FileExistsError(path)

    monkeypatch.setattr(Path, "mkdir", overtaken)
    with pytest.raises(DaemonError, match=f"deeper on its way belongs to user {THEM}"):
        make(above / "deeper" / "own")


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_parents_that_are_made_are_no_other_user_s_to_write_to(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert make(tmp_path / "deep" / "deeper" / "own")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "deep") == mode_of(tmp_path / "deep" / "deeper") == 0o755


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


@needs_root
def test_in_a_user_namespace_that_does_not_know_root_its_directories_are_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the directories of root have the owner that / has: the number that stands for all who are not mapped."""
    (tmp_path / "of-root").mkdir()
    os.chown(tmp_path / "of-root", 65534, 65534)
    own = tmp_path / "of-root/run"
    with pytest.raises(DaemonError, match="belongs to"):
        make_own_directory(own, "run directory", "--run-dir")
    monkeypatch.setattr(own_directory, "_roots_owner", lambda: 65534)
    monkeypatch.setattr(own_directory, "is_in_user_namespace", lambda: False)
    with pytest.raises(DaemonError, match="belongs to"):
        make_own_directory(own, "run directory", "--run-dir")
    monkeypatch.setattr(own_directory, "is_in_user_namespace", lambda: True)
    assert make_own_directory(own, "run directory", "--run-dir")
    os.chown(own, 65534, 65534)
    with pytest.raises(DaemonError, match="belongs to"):
        make_own_directory(own, "run directory", "--run-dir")
