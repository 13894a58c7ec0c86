"""Run directories: accepted or refused, changed at the start, and cleaned at the end."""

import asyncio
import fcntl
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpool.daemon.errors import STATUS_USAGE, ConfigError, DaemonError
from ublkpool.daemon.processes.unix_socket import listen, remove_socket
from ublkpool.daemon.settings.run_directory import DaemonRuns, RunDirectory, restore_queues

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(path: Path) -> set[str]:
    return {each.name for each in path.iterdir()}


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_missing_directory_is_made_and_removed_with_its_entries(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"
    directory = RunDirectory.claim(path)
    directory.prepare(None)
    assert (mode(path), mode(directory.queues), mode(directory.devices)) == (0o700, 0o700, 0o700)
    (directory.queues / "0.1.ring").touch()
    (directory.devices / "vol0.new").touch()
    directory.remove()
    assert not path.exists()


def test_the_record_of_a_device_that_could_not_be_removed_stays_for_the_next_daemon(tmp_path: Path) -> None:
    first = RunDirectory.claim(tmp_path / "run")
    first.prepare(None)
    (first.devices / "vol0.json").touch()
    first.remove()
    assert names(first.devices) == {"vol0.json"}
    (first.devices / "vol0.json").unlink()
    second = RunDirectory.claim(tmp_path / "run")
    second.prepare(None)
    second.remove()


@pytest.mark.parametrize("found", [0o700, 0o750, 0o755, 0o711])
def test_an_existing_directory_keeps_its_mode_and_is_not_removed(tmp_path: Path, found: int) -> None:
    tmp_path.chmod(found)
    directory = RunDirectory.claim(tmp_path)
    directory.prepare(None)
    assert mode(tmp_path) == found
    directory.remove()
    assert names(tmp_path) == set() and mode(tmp_path) == found


@pytest.mark.parametrize("found", [0o777, 0o1777, 0o770])
def test_a_directory_that_others_may_write_to_is_refused_and_left_as_it_is(
    tmp_path: Path, found: int
) -> None:
    tmp_path.chmod(found)
    with pytest.raises(
        ConfigError, match=rf"{tmp_path}: other users may write to it \(mode {found:04o}.*--run-dir"
    ):
        RunDirectory.claim(tmp_path)
    assert mode(tmp_path) == found and names(tmp_path) == set()


@needs_root
def test_another_user_s_directory_is_refused_with_both_users(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, -1)
    with pytest.raises(ConfigError, match=r"it belongs to user nobody"):
        RunDirectory.claim(tmp_path)
    assert names(tmp_path) == set()


@needs_root
def test_another_user_s_link_is_refused_and_our_own_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir(mode=0o700)
    link.symlink_to(target)
    RunDirectory.claim(link).remove()
    os.chown(link, NOBODY, -1, follow_symlinks=False)
    with pytest.raises(ConfigError, match="a symbolic link of user nobody"):
        RunDirectory.claim(link)


@pytest.mark.parametrize("system", ["/", "/run", "/tmp", "/dev/shm", "/var/run", "/etc", "/proc"])
def test_the_system_s_own_directories_are_refused_and_nothing_is_left_there(system: str) -> None:
    # Another program's directory may have this name.
    before = mode(Path(system)), (Path(system) / "queues").exists()
    with pytest.raises(ConfigError, match=rf"^run directory {system}: "):
        RunDirectory.claim(Path(system))
    assert (mode(Path(system)), (Path(system) / "queues").exists()) == before


@pytest.mark.parametrize("name", ["Documents", "lock", "queues.txt"])
def test_a_directory_with_other_entries_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"not a daemon's: it contains .*: name an empty directory"):
        RunDirectory.claim(tmp_path)
    assert names(tmp_path) == {"a file", name}


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a directory"):
        RunDirectory.claim(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"File exists|Not a directory"):
        RunDirectory.claim(tmp_path / "file" / "run")


def test_entries_added_while_a_daemon_runs_block_no_later_daemon_and_stay(
    tmp_path: Path,
) -> None:
    first = RunDirectory.claim(tmp_path / "run")
    first.prepare(None)
    mine = [first.path / "backend.pid", first.devices / "notes", first.queues / "notes"]
    for each in mine:
        each.touch()
    os.close(first._lock)
    second = RunDirectory.claim(tmp_path / "run")
    second.prepare(None)
    second.remove()
    assert all(each.exists() for each in mine)


def test_the_next_daemon_removes_a_directory_that_a_killed_daemon_made_but_no_other(
    tmp_path: Path,
) -> None:
    made, found = tmp_path / "made", tmp_path / "found"
    found.mkdir()
    for each in (made, found):
        os.close(RunDirectory.claim(each)._lock)
        RunDirectory.claim(each).remove()
    assert not made.exists() and found.exists()


def test_an_older_versions_empty_lock_file_counts_as_made_by_a_daemon(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    for name in ("queues", "devices"):
        (path / name).mkdir()
    (path / "lock").touch()
    RunDirectory.claim(path).remove()
    assert not path.exists()


def test_only_one_daemon_claims_it_and_nothing_is_removed_before_the_lock(tmp_path: Path) -> None:
    first = RunDirectory.claim(tmp_path / "run")
    first.prepare(None)
    with pytest.raises(DaemonRuns, match="another daemon is running here"):
        RunDirectory.claim(tmp_path / "run")
    assert first.queues.exists()
    first.remove()


def test_a_daemon_that_begins_while_another_ends_gets_a_lock_that_the_next_one_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock file that was opened before the ending daemon removed it and locked after does not count as a lock."""
    path = tmp_path / "run"
    first = RunDirectory.claim(path)
    first.prepare(None)
    opened: list[int] = []
    really = fcntl.flock

    def flock(fd: int, how: int) -> None:
        if not opened:
            opened.append(fd)
            first.remove()
        really(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = RunDirectory.claim(path)
    second.prepare(None)
    assert opened and second.queues.exists()
    with pytest.raises(DaemonRuns):
        RunDirectory.claim(path)
    second.remove()


def test_replacing_waits_for_the_daemon_that_runs_there(tmp_path: Path) -> None:
    async def run() -> None:
        first = RunDirectory.claim(tmp_path / "run")
        asked: list[str] = []

        def ask() -> None:
            asked.append("leave")
            asyncio.get_running_loop().call_soon(os.close, first._lock)

        second = await RunDirectory.replace(tmp_path / "run", ask)
        assert asked == ["leave"]
        second.remove()

    asyncio.run(run())


@needs_root
def test_a_group_can_enter_what_was_made_and_what_systemd_made_for_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for_us = tmp_path / "for us"
    for_us.mkdir(mode=0o750)
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"/elsewhere:{for_us}")
    for path in (tmp_path / "made", for_us):
        directory = RunDirectory.claim(path)
        directory.prepare(NOBODY)
        for each in (path, directory.queues):
            assert (each.stat().st_gid, mode(each)) == (NOBODY, 0o750)
        assert mode(directory.devices) == 0o700
        directory.remove()


@needs_root
def test_an_existing_directory_must_let_the_group_in_and_is_not_changed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    directory = RunDirectory.claim(tmp_path)
    directory.prepare(NOBODY)
    assert (tmp_path.stat().st_gid, mode(tmp_path)) == (os.getegid(), 0o755)
    assert (directory.queues.stat().st_gid, mode(directory.queues)) == (NOBODY, 0o750)
    directory.remove()
    tmp_path.chmod(0o700)
    directory = RunDirectory.claim(tmp_path)
    with pytest.raises(ConfigError, match=rf"group {NOBODY} of the config cannot enter.*chgrp {NOBODY} "):
        directory.prepare(NOBODY)
    directory.remove()
    assert mode(tmp_path) == 0o700


@needs_root
@pytest.mark.parametrize(("group", "found", "meant"), [(NOBODY, 0o600, 0o660), (None, 0o660, 0o600)])
def test_the_sockets_of_living_workers_get_back_their_owner_and_mode(
    tmp_path: Path, group: int | None, found: int, meant: int
) -> None:
    RunDirectory.claim(tmp_path / "run").prepare(None)
    queues = tmp_path / "run" / "queues"
    sockets = [queues / "0.0", queues / "0.0.ring", queues / "12.3"]
    outside = tmp_path / "outside"
    outside.touch(mode=0o644)
    (queues / "0.1").symlink_to(outside)
    listeners = []
    for each in sockets:
        listeners.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listeners[-1].bind(str(each))
        os.chown(each, NOBODY, 0)
        each.chmod(found)
    RunDirectory(tmp_path / "run", -1, True).prepare(group)
    for each in sockets:
        about = each.stat()
        assert (about.st_uid, about.st_gid, mode(each)) == (os.geteuid(), group or 0, meant)
    assert mode(outside) == 0o644 and outside.stat().st_gid != NOBODY
    for listener in listeners:
        listener.close()


@needs_root
def test_queue_sockets_that_a_service_manager_took_go_back_to_the_group(tmp_path: Path) -> None:
    first = RunDirectory.claim(tmp_path / "run")
    first.prepare(NOBODY)
    os.chown(first.queues, 0, 0)
    first.queues.chmod(0o700)
    first.prepare(NOBODY)
    assert (first.queues.stat().st_gid, mode(first.queues)) == (NOBODY, 0o750)
    first.remove()


@pytest.mark.parametrize("name", ["queues", "devices"])
def test_an_entry_of_another_type_is_named_and_left(tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(elsewhere)
    directory = RunDirectory.claim(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"run/{name}: Not a directory"):
        directory.prepare(None)
    directory.remove()
    assert mode(elsewhere) == 0o755


def test_a_socket_replaces_a_socket_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    for _ in range(2):
        listen(path, socket.SOCK_STREAM).close()
        assert mode(path) == 0o600
    path.unlink()
    path.write_text("a user's")
    with pytest.raises(DaemonError, match=r"admin.sock: in the way, and not a socket"):
        listen(path, socket.SOCK_STREAM)
    with pytest.raises(DaemonError):
        remove_socket(path)
    assert path.read_text() == "a user's"
    remove_socket(tmp_path / "none")


def group_for_sockets() -> int:
    """A group that this process may give files to; another than its own if it is root."""
    return NOBODY if os.geteuid() == 0 else os.getegid()


@pytest.mark.parametrize("umask_before", [0, 0o022, 0o777])
def test_a_socket_is_for_its_user_and_group_whatever_the_umask(tmp_path: Path, umask_before: int) -> None:
    group = group_for_sockets()
    os.umask(umask_before)
    listen(tmp_path / "own.sock", socket.SOCK_STREAM).close()
    listen(tmp_path / "shared.sock", socket.SOCK_STREAM, group).close()
    assert os.umask(0o022) == umask_before
    assert mode(tmp_path / "own.sock") == 0o600
    assert mode(tmp_path / "shared.sock") == 0o660
    assert (tmp_path / "shared.sock").stat().st_gid == group


def test_a_link_put_in_the_place_of_a_new_socket_gives_no_other_file_to_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, secret = tmp_path / "metrics.sock", tmp_path / "secret"
    secret.touch(0o600)
    before = secret.stat()
    bind = socket.socket.bind

    def bind_and_swap(listener: socket.socket, address: str) -> None:
        bind(listener, address)
        path.unlink()
        path.symlink_to(secret)

    monkeypatch.setattr(socket.socket, "bind", bind_and_swap)
    listen(path, socket.SOCK_STREAM, group_for_sockets()).close()
    after = secret.stat()
    assert (after.st_mode, after.st_gid, path.is_symlink()) == (before.st_mode, before.st_gid, True)


def test_the_umask_is_as_before_when_a_socket_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="cannot listen"):
        listen(tmp_path / "none" / "x.sock", socket.SOCK_STREAM, os.getegid())
    assert os.umask(0o022) == 0o022


@pytest.mark.parametrize("given", ["", ".", "./"])
@pytest.mark.parametrize("command", [["serve"], ["list"]])
def test_the_current_directory_is_no_run_directory(tmp_path: Path, given: str, command: list[str]) -> None:
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "ublkpool.daemon", *command, "--run-dir", given],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == STATUS_USAGE
    assert "'--run-dir': names the current directory" in done.stderr and done.stderr.count("\n") == 1
    assert mode(tmp_path) == 0o755 and names(tmp_path) == set()


def test_a_workers_directory_that_was_removed_is_made_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    restore_queues(run_dir, os.getgid())
    about = (run_dir / "queues").stat()
    assert (stat.S_IMODE(about.st_mode), about.st_gid) == (0o750, os.getgid())
    (run_dir / "queues" / "3.0").touch()
    restore_queues(run_dir, None)
    assert (run_dir / "queues" / "3.0").exists(), "one that is there stays as it is"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize("name", ["queues", "devices"])
def test_an_entry_of_another_user_is_refused_and_stays_as_it_is(tmp_path: Path, name: str) -> None:
    entry = tmp_path / "run" / name
    entry.parent.mkdir(0o700)
    entry.mkdir()
    entry.chmod(0o777)
    os.chown(entry, 65534, 65534)
    directory = RunDirectory.claim(entry.parent)
    with pytest.raises(ConfigError, match="belongs to user 65534"):
        directory.prepare(None)
    assert stat.S_IMODE(entry.stat().st_mode) == 0o777
    directory.remove()


@pytest.mark.parametrize(("group", "wanted"), [(None, 0o701), (os.getgid(), 0o751)])
def test_workers_of_another_user_may_pass_the_directory_and_nothing_in_it(
    tmp_path: Path, group: int | None, wanted: int
) -> None:
    run_dir = tmp_path / "run"
    directory = RunDirectory.claim(run_dir)
    directory.prepare(group, workers_enter=True)
    assert mode(run_dir) == wanted
    assert not (mode(directory.queues) | mode(directory.devices)) & 0o007
    # Another program has removed it.
    shutil.rmtree(run_dir)
    restore_queues(run_dir, group, workers_enter=True)
    assert mode(run_dir) == wanted
    assert not mode(directory.queues) & 0o007


def test_an_operator_s_directory_is_not_opened_to_workers(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    directory = RunDirectory.claim(tmp_path)
    directory.prepare(None, workers_enter=True)
    assert mode(tmp_path) == 0o700
    directory.remove()
