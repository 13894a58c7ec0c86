"""The state directory: its files are whole and durable, whichever step fails or process dies."""

import asyncio
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fakes.states import DirectRunner
from ublkpool.bufpool import wire
from ublkpool.daemon.device import state as module
from ublkpool.daemon.device.binding import Binding
from ublkpool.daemon.device.state import DeviceState, StateDirectory, Store, candidates
from ublkpool.daemon.device.state_file import ROOM_FILES, Write
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import control_process
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.processes.children import Child
from ublkpool.workers.process import fork_child

STORE = Store(kind="file", size_bytes=4096, identity=wire.Identity(value="file:1", store="/x/a.img"))
FIRST = DeviceState(name="vol0", generation=1, store=STORE)
SECOND = msgspec.structs.replace(FIRST, generation=2)


def opened(path: Path) -> StateDirectory:
    return StateDirectory(path, DirectRunner())


def save(states: StateDirectory, state: DeviceState) -> None:
    asyncio.run(states.save(state))


def states_in(directory: Path) -> list[str]:
    """The names there but those of the reserve."""
    return [each.name for each in directory.iterdir() if not each.name.startswith(".room-")]


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
        shutil.rmtree(tmp_path)
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
    assert states_in(tmp_path) == ["vol0.json"]
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
    assert states_in(tmp_path) == ["vol0.json"], "what was begun is removed"


@contextmanager
def small_file_system(directory: Path) -> Iterator[Path]:
    directory.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "small", str(directory)], check=False
    )
    if made.returncode:
        pytest.skip("needs the right to mount")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def fill(directory: Path) -> None:
    with suppress(OSError), (directory / "ballast").open("wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)):
            pass
    with suppress(OSError):
        for number in range(10_000):
            (directory / f"empty-{number}").touch()


def test_a_generation_rises_on_a_full_file_system_again_and_again(tmp_path: Path) -> None:
    """The name has a file already: its room, and with it the reserve, comes back each time."""
    with small_file_system(tmp_path / "state") as directory:
        states = opened(directory)
        save(states, FIRST)
        fill(directory)
        with pytest.raises(OSError, match="No space left"):
            (directory / "one more").write_bytes(bytes(100))
        for generation in range(2, 3 * ROOM_FILES):
            save(states, msgspec.structs.replace(FIRST, generation=generation))
            assert opened(directory).generation("vol0") == generation
        assert len(list(directory.glob(".room-*"))) >= ROOM_FILES - 1


def test_a_directory_without_reserve_on_a_full_file_system_says_so_until_there_is_room(
    tmp_path: Path,
) -> None:
    with small_file_system(tmp_path / "state") as directory:
        states = opened(directory)
        fill(directory)
        with pytest.raises(DaemonError, match=r"cannot write vol0\.json: No space left on device$"):
            save(states, FIRST)
        assert states_in(directory) and states.generation("vol0") == 0
        (directory / "ballast").unlink()
        save(states, FIRST)
        assert opened(directory).get("vol0") == FIRST


def test_new_names_use_up_the_reserve_and_no_state_is_lost(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "state") as directory:
        states = opened(directory)
        save(states, FIRST)
        fill(directory)
        names = [f"new{number}" for number in range(3 * ROOM_FILES)]
        saved = []
        for name in names:
            with suppress(DaemonError):
                save(states, DeviceState(name=name, generation=1, store=STORE))
                saved.append(name)
        assert 1 <= len(saved) < len(names)
        left = opened(directory)
        assert [name for name in names if left.knows(name)] == saved and left.get("vol0") == FIRST


def test_the_reserve_is_made_when_the_directory_is_opened(tmp_path: Path) -> None:
    async def run() -> None:
        (await StateDirectory.open([tmp_path / "state"], DirectRunner())).close()

    asyncio.run(run())
    rooms = list((tmp_path / "state").glob(".room-*"))
    assert len(rooms) == ROOM_FILES and all(each.stat().st_blocks * 512 >= 4096 for each in rooms)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"name":"vol1"}', b'{"name":"vol0","v":2}', b"\xff\xfe", b"[]", b'{"x":' + b"[" * 100_000],
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
    shutil.rmtree(first)
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


@pytest.mark.parametrize("what", ["a dangling link", "a directory", "a link to itself"])
def test_a_name_that_is_there_and_cannot_be_read_is_not_a_device_that_was_never_served(
    tmp_path: Path, what: str
) -> None:
    path = tmp_path / "vol0.json"
    if what == "a directory":
        path.mkdir()
    else:
        path.symlink_to(path if what == "a link to itself" else tmp_path / "elsewhere/vol0.json")
    states = opened(tmp_path)
    assert states.knows("vol0")
    with pytest.raises(DaemonError, match=r"ublkpool rebind vol0$"):
        states.get("vol0")


def test_a_directory_that_cannot_be_listed_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(opened(tmp_path), FIRST)

    def refuse(*_: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DaemonError, match="Permission denied"):
        opened(tmp_path)


@pytest.mark.parametrize("damage", ["another version", "cut short", "another name"])
def test_no_generation_comes_twice_after_a_rebind_of_a_state_that_cannot_be_read(
    tmp_path: Path, damage: str
) -> None:
    content = msgspec.json.encode(msgspec.structs.replace(FIRST, generation=41))
    content = {
        "another version": b'{"v": 2, "new": {"x": 1}, "generation": 41, "name": "vol0"}',
        "cut short": content[:-3],
        "another name": content.replace(b"vol0", b"vol1"),
    }[damage]
    (tmp_path / "vol0.json").write_bytes(content)
    states = opened(tmp_path)
    with pytest.raises(DaemonError) as refusal:
        states.get("vol0")
    assert "internal error" not in str(refusal.value)
    if damage == "another version":
        assert "it has version 2, and this daemon reads version 1" in str(refusal.value)
    binding = Binding("vol0", states, "boot")
    asyncio.run(binding.rebind())
    attach = wire.Attach(v=1, device="vol0", kind="file", identity=STORE.identity)
    assert asyncio.run(binding.bind(attach, 4096)) == 42


def test_a_generation_that_is_cut_short_is_not_taken_for_a_lower_one(tmp_path: Path) -> None:
    (tmp_path / "vol0.json").write_bytes(b'{"name": "vol0", "generation": 4')
    assert opened(tmp_path).generation("vol0") == 0


def test_only_unfinished_states_are_removed_from_the_directory(tmp_path: Path) -> None:
    others = [".bashrc.new", ".vol0.json.new", "vol0.new", ".config.json.7-1.new.bak", "notes"]
    for each in (*others, ".vol0.json.712-3.new"):
        (tmp_path / each).write_text("the operator's")
    opened(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(others)


def test_a_directory_with_files_that_are_not_a_daemon_s_is_refused_unless_a_daemon_used_it(
    tmp_path: Path,
) -> None:
    async def take() -> None:
        (await StateDirectory.open([tmp_path / "state"], DirectRunner())).close()

    (tmp_path / "state").mkdir(0o700)
    (tmp_path / "state/thesis.txt").write_text("")
    with pytest.raises(DaemonError, match=r"it contains thesis.txt: choose another with --state-dir$"):
        asyncio.run(take())
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["thesis.txt"]
    (tmp_path / "state/thesis.txt").unlink()
    (tmp_path / "state/vol0.json").write_bytes(msgspec.json.encode(FIRST))
    asyncio.run(take())
    (tmp_path / "state/vol0.json.bak").write_text("")
    asyncio.run(take())


def test_two_daemons_do_not_share_a_directory_that_was_emptied_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_PATIENCE_S", 0.0)

    async def run() -> None:
        first = await StateDirectory.open([tmp_path], DirectRunner())
        await first.save(FIRST)
        for each in tmp_path.iterdir():
            each.unlink()
        with pytest.raises(DaemonError, match="another daemon uses it"):
            await StateDirectory.open([tmp_path], DirectRunner())
        first.close()
        (await StateDirectory.open([tmp_path], DirectRunner())).close()

    asyncio.run(run())


def test_the_processes_that_hang_in_the_state_directory_are_bounded_for_each_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    class Stuck(Child):
        """A process that waits in the kernel: SIGKILL does not end it."""

        def __init__(self) -> None:
            self.pid = 0

        @property
        def exit_status(self) -> int | None:
            return None

        async def wait(self) -> int:
            await asyncio.Event().wait()
            raise AssertionError

        def send(self, number: signal.Signals) -> None:
            """Messages are dropped."""

    def start(*_: object) -> Any:
        started.append(1)
        reader, writer = os.pipe()
        os.close(writer)
        return control_process._Started(Stuck(), reader)

    monkeypatch.setattr(ControlRunner, "_start", start)
    monkeypatch.setattr(module, "SAVE_DEADLINE_S", 0.01)

    async def run() -> None:
        states = StateDirectory(tmp_path, ControlRunner())
        for each in range(3 * control_process.LOOKS_MAX):
            with pytest.raises(DaemonError) as error:
                await states.save(FIRST)
            assert ("not tried" in str(error.value)) is (each >= control_process.LOOKS_MAX)
        with pytest.raises(DaemonError, match="has hung"):
            await states.save(DeviceState(name="vol1"))

    asyncio.run(run())
    assert len(started) == control_process.LOOKS_MAX + 1
