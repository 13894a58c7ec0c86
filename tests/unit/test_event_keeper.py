"""Writing events costs the daemon nothing, whatever the state directory's disk does."""

import asyncio
import logging
import os
import random
import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.fakes.device_parts import turn
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events import keeper as module
from ublkpool.daemon.events.event import Event
from ublkpool.daemon.events.event_file import NAME, load
from ublkpool.daemon.events.keeper import EventKeeper, earlier_events, has_died
from ublkpool.daemon.events.kinds import BackendDied, DaemonStarted, DaemonStopped
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.events_kept import EventsKept
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.plain_call import Call

DIED = BackendDied(kind="file", pid=7, was_cut_off=False)
BYTES_MAX = 64 << 10


class FakeRunner:
    """Writes at once, fails with `trouble`, or hangs until it is let go."""

    def __init__(self) -> None:
        self.trouble = ""
        self.hangs: asyncio.Event | None = None
        self.writes = 0

    async def look(
        self,
        owner: str,
        what: str,
        work: Call,
        result: type[None],
        deadline_s: float = 0.0,
        *,
        title: str = "",
    ) -> None:
        self.writes += 1
        if self.hangs is not None:
            await self.hangs.wait()
        if self.trouble:
            raise DaemonError(self.trouble)
        work()


def in_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(120):
            await work()

    asyncio.run(run())


def texts(directory: Path) -> list[str]:
    return [each.text for each in load(directory, BYTES_MAX)]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GATHER_S", "PAUSE_S", "RETRY_MAX_S"):
        monkeypatch.setattr(module, name, 0.0)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_events_reach_the_file_in_batches(tmp_path: Path) -> None:
    async def run() -> None:
        events, runner = Events(), FakeRunner()
        keeper = EventKeeper(events, tmp_path, runner, BYTES_MAX)
        task = asyncio.create_task(keeper.keep())
        await turn()
        assert runner.writes == 0, "nothing has happened"
        for number in range(100):
            events.record(DIED, f"event {number}", device=f"vol{number}")
        await until(lambda: not events.unwritten())
        assert texts(tmp_path) == [f"event {number}" for number in range(100)]
        assert 1 <= runner.writes <= 5
        events.record(DIED, "later")
        await until(lambda: not events.unwritten())
        assert texts(tmp_path)[-1] == "later"
        task.cancel()

    in_loop(run)


def test_a_thousand_devices_at_once_lose_no_event_on_a_healthy_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No second round: one must take all.
    monkeypatch.setattr(module, "PAUSE_S", 3600.0)

    async def run() -> None:
        bytes_max = 1 << 20
        events, runner = Events(bytes_max), FakeRunner()
        task = asyncio.create_task(EventKeeper(events, tmp_path, runner, bytes_max).keep())
        for number in range(2000):
            events.record(DIED, "gone", device=f"vol{number % 1000}")
        await until(lambda: not events.unwritten())
        assert len(load(tmp_path, bytes_max)) == 2000
        assert events.take_lost() == 0 and runner.writes <= 4
        task.cancel()

    in_loop(run)


def test_a_hanging_disk_holds_nobody_up_and_what_is_lost_is_counted(tmp_path: Path) -> None:
    async def run() -> None:
        events, runner = Events(BYTES_MAX), FakeRunner()
        runner.hangs = asyncio.Event()
        keeper = EventKeeper(events, tmp_path, runner, BYTES_MAX)
        task = asyncio.create_task(keeper.keep())
        for number in range(300):
            events.record(DIED, f"event {number}", device=f"vol{number}")
            await asyncio.sleep(0)
        lost = 300 - len(events.unwritten())
        assert lost > 0 and runner.writes <= 1
        runner.hangs.set()
        await until(lambda: texts(tmp_path)[-1:] == [f"{lost} events are in no file: they came too fast"])
        assert load(tmp_path, BYTES_MAX)[-1].details == {"count": lost, "reason": "they came too fast"}
        task.cancel()

    in_loop(run)


def test_a_disk_that_fails_is_told_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        events, runner = Events(), FakeRunner()
        runner.trouble = "No space left on device"
        task = asyncio.create_task(EventKeeper(events, tmp_path, runner, BYTES_MAX).keep())
        events.record(DIED, "event")
        await until(lambda: runner.writes > 5)
        said = [
            each.getMessage() for each in caplog.records if "events cannot be written" in each.getMessage()
        ]
        assert said == [f"{tmp_path}: events cannot be written: No space left on device; trying again"]
        runner.trouble = ""
        await until(lambda: texts(tmp_path) == ["event"])
        task.cancel()

    logging.getLogger("ublkpool").propagate = True
    in_loop(run)


def test_the_daemons_end_does_not_wait_for_a_hanging_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.05)

    async def run() -> None:
        runner = FakeRunner()
        runner.hangs = asyncio.Event()
        kept = EventsKept(tmp_path, runner, BYTES_MAX)
        await kept.end(leaves=False)
        assert runner.writes <= 2 and not load(tmp_path, BYTES_MAX)

    in_loop(run)


def test_a_suppressed_flood_is_counted_without_a_further_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        now_s = [0.0]
        events = Events(clock=lambda: now_s[0])
        task = asyncio.create_task(EventKeeper(events, tmp_path, FakeRunner(), BYTES_MAX).keep())
        for _ in range(30):
            events.record(DIED, "gone", device="vol0")
        await until(lambda: not events.unwritten())
        # Its window has ended when the keeper next looks.
        monkeypatch.setattr(Events, "suppressed_due_s", lambda self: 0.0)
        events.stirred.set()
        now_s[0] += 3600.0
        await until(lambda: texts(tmp_path)[-1:] == ["10 more events backend-died were not recorded"])
        task.cancel()

    in_loop(run)


def started(after_death: bool) -> DaemonStarted:
    return DaemonStarted(version="1", pid=1, after_death=after_death)


def test_a_daemon_knows_whether_the_one_before_was_killed(tmp_path: Path) -> None:
    async def life(is_killed: bool) -> Event:
        kept = EventsKept(tmp_path, FakeRunner(), BYTES_MAX)
        events = kept.events
        await until(lambda: not events.unwritten())
        if is_killed:
            await kept._keeper.flush()
            kept._background.cancel()
        else:
            await kept.end(leaves=True)
        return [each for each in load(tmp_path, BYTES_MAX) if each.code == DaemonStarted.code][-1]

    async def run() -> None:
        rng, was_killed = random.Random(3), False
        for _ in range(12):
            is_killed = rng.random() < 0.5
            assert (await life(is_killed)).details["after_death"] == was_killed
            was_killed = is_killed

    in_loop(run)
    assert not has_died([])
    assert load(tmp_path, BYTES_MAX)[-1].code in (DaemonStarted.code, DaemonStopped.code)


@pytest.mark.parametrize("kind", ["directory", "fifo", "no directory"])
def test_a_file_that_cannot_be_read_costs_earlier_events_only(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "state"
    if kind != "no directory":
        directory.mkdir()
        {"directory": (directory / NAME).mkdir, "fifo": lambda: os.mkfifo(directory / NAME)}[kind]()
    assert earlier_events(directory, BYTES_MAX) == ([] if kind == "no directory" else ())


def test_processes_of_their_own_write_and_a_kill_of_all_leaves_a_readable_file(tmp_path: Path) -> None:
    """The real runner; a daemon is killed at random moments of a stream of events."""

    def daemon(ready: int) -> None:
        async def run() -> None:
            kept = EventsKept(tmp_path, ControlRunner(), BYTES_MAX)
            os.write(ready, b"x")
            for number in range(100_000):
                kept.events.record(DIED, f"event {number}", device=f"vol{number}")
                await asyncio.sleep(0.0005)

        asyncio.run(run())

    rng, seen = random.Random(5), 0
    for _ in range(4):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            try:
                daemon(writer)
            finally:
                os._exit(1)
        os.close(writer)
        assert os.read(reader, 1)
        os.close(reader)
        _wait_for_growth(tmp_path, rng.randrange(2000, 12000))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kept = [each.seq for each in load(tmp_path, BYTES_MAX)]
        assert kept == sorted(set(kept)) and kept[-1] > seen
        seen = kept[-1]
    codes = [each.code for each in load(tmp_path, BYTES_MAX)]
    assert codes.count(DaemonStarted.code) >= 1


def _wait_for_growth(directory: Path, size: int) -> None:
    """Return when so many more bytes of events were written, or a file was put out."""
    path = directory / NAME

    def facts() -> tuple[int, int]:
        # Between two files there is none for a moment.
        with suppress(FileNotFoundError):
            about = path.stat()
            return about.st_size, about.st_ino
        return 0, 0

    first, inode = facts()
    while True:
        now, same = facts()
        if now >= first + size or (inode and same != inode):
            return
        os.sched_yield()
