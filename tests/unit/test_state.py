"""The state directory: its files are whole and durable, whichever step fails or process dies."""

import asyncio
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fakes.states import DirectRunner
from ublkpool.bufpool import wire
from ublkpool.daemon.device import state as module
from ublkpool.daemon.device.state import DeviceState, StateDirectory, Store, Write, candidates
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.workers.process import fork_child

STORE = Store(kind="file", size_bytes=4096, identity=wire.Identity(value="file:1", store="/x/a.img"))
FIRST = DeviceState(name="vol0", generation=1, store=STORE)
SECOND = msgspec.structs.replace(FIRST, generation=2)


def opened(path: Path) -> StateDirectory:
    return StateDirectory(path, DirectRunner())


def save(states: StateDirectory, state: DeviceState) -> None:
    asyncio.run(states.save(state))


def test_a_state_is_read_back_by_the_next_daemon(tmp_path: Path) -> None:
    save(opened(tmp_path), FIRST)
    assert opened(tmp_path).get("vol0") == FIRST
    assert (tmp_path / "vol0.json").stat().st_mode & 0o777 == 0o600
    assert opened(tmp_path).get("other") == DeviceState(name="other")


def test_a_separate_process_writes(tmp_path: Path) -> None:
    async def run() -> None:
        states = StateDirectory(tmp_path, ControlRunner())
        await states.save(FIRST)
        assert states.get("vol0") == FIRST
        (tmp_path / "vol0.json").unlink()
        tmp_path.rmdir()
        with pytest.raises(DaemonError, match=r"^state directory .*: cannot write vol0.json: No such file"):
            await states.save(SECOND)
        assert states.get("vol0") == FIRST

    asyncio.run(run())


STEPS = ("write", "fsync", "replace", "fsync")


class Disk:
    """Notes each step towards the disk, and fails, or ends the process, at one of them."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at: int = -1, end: Callable[[], None] | None = None
    ) -> None:
        self.steps: list[str] = []
        self._at, self._end = at, end
        write, fsync, replace = os.write, os.fsync, Path.replace

        def fake_write(fd: int, data: Any) -> int:
            self._step("write")
            return write(fd, bytes(data)[:100])

        def fake_fsync(fd: int) -> None:
            self._step("fsync")
            fsync(fd)

        def fake_replace(path: Path, target: Path) -> Path:
            self._step("replace")
            return replace(path, target)

        monkeypatch.setattr(os, "write", fake_write)
        monkeypatch.setattr(os, "fsync", fake_fsync)
        monkeypatch.setattr(Path, "replace", fake_replace)

    def _step(self, name: str) -> None:
        if self.steps and self.steps[-1] == name == "write":
            return
        if len(self.steps) == self._at:
            if self._end is not None:
                self._end()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.steps.append(name)


def test_the_file_is_synced_before_it_is_renamed_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, disk = opened(tmp_path), Disk(monkeypatch)
    save(states, FIRST)
    assert tuple(disk.steps) == STEPS
    assert opened(tmp_path).get("vol0") == FIRST


@pytest.mark.parametrize("at", range(len(STEPS)))
def test_a_step_that_fails_makes_save_fail_and_the_earlier_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    states = opened(tmp_path)
    save(states, FIRST)
    with monkeypatch.context() as context:
        Disk(context, at)
        with pytest.raises(DaemonError, match=r"cannot write vol0\.json: No space left on device$"):
            save(states, SECOND)
    assert states.get("vol0") == FIRST
    assert opened(tmp_path).get("vol0") == (FIRST if at < 3 else SECOND)
    assert [each.name for each in tmp_path.iterdir()] == ["vol0.json"]
    save(states, SECOND)
    assert opened(tmp_path).get("vol0") == SECOND


@pytest.mark.parametrize("at", range(len(STEPS)))
def test_a_process_that_dies_at_any_step_leaves_one_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    save(opened(tmp_path), FIRST)

    def die() -> int:
        Disk(monkeypatch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        Write(tmp_path / "vol0.json", msgspec.json.encode(SECOND))()
        return 0

    _, status = os.waitpid(fork_child(die, [], "dies"), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    left = opened(tmp_path)
    assert left.get("vol0") == (FIRST if at < 3 else SECOND)
    assert [each.name for each in tmp_path.iterdir()] == ["vol0.json"], "what was begun is removed"


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"name":"vol1"}', b'{"name":"vol0","v":2}', b"\xff\xfe", b"[]"]
)
def test_a_file_that_cannot_be_read_keeps_its_device_from_being_served_and_no_other(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "vol0.json").write_bytes(content)
    states = opened(tmp_path)
    with pytest.raises(DaemonError, match=r"vol0\.json: .*ublkpool rebind vol0$"):
        states.get("vol0")
    assert states.knows("vol0") and states.generation("vol0") == 0
    assert states.get("vol1").store is None


def test_two_daemons_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_PATIENCE_S", 0.0)

    async def run() -> None:
        first = await StateDirectory.open([tmp_path / "state"], DirectRunner())
        with pytest.raises(DaemonError, match=r"another daemon uses it: choose another with --state-dir$"):
            await StateDirectory.open([tmp_path / "state"], DirectRunner())
        first.close()
        (await StateDirectory.open([tmp_path / "state"], DirectRunner())).close()

    asyncio.run(run())
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


def test_each_run_directory_has_a_state_directory_of_its_own() -> None:
    assert candidates(Path("/run/ublkpool"), None) == [Path("/var/lib/ublkpool")]
    assert candidates(Path("/run/ublkpool"), Path("/x")) == candidates(Path("/y"), Path("/x")) == [Path("/x")]
    assert candidates(Path("/run/test"), None) == [
        Path("/var/lib/ublkpool/at/run/test"),
        Path("/run/test.state"),
    ]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_the_next_directory_is_taken_only_if_the_first_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    mkdir = Path.mkdir

    def refuse(path: Path, *arguments: Any, **more: Any) -> None:
        if path == first:
            raise OSError(code, os.strerror(code))
        mkdir(path, *arguments, **more)

    async def directory() -> Path:
        states = await StateDirectory.open([first, second], DirectRunner())
        states.close()
        return states.directory

    assert asyncio.run(directory()) == first
    first.chmod(0o777)
    with pytest.raises(DaemonError, match="other users may write to it"):
        asyncio.run(directory())
    (first / "lock").unlink()
    first.rmdir()
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert asyncio.run(directory()) == second


def test_a_directory_that_cannot_be_made_is_reported_in_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DaemonError) as failure:
        asyncio.run(StateDirectory.open([tmp_path / "no"], DirectRunner()))
    assert (
        str(failure.value)
        == f"state directory {tmp_path}/no: Read-only file system: choose another with --state-dir"
    )
