"""The backend that the daemon runs for a device, with its process made up."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from ublkpool.daemon.backends import managed_backend
from ublkpool.daemon.backends.managed_backend import ManagedBackend
from ublkpool.daemon.errors import STATUS_USAGE, DaemonError
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.settings.config import BackendConfig

DEADLINE_S = 20


class FakeChild:
    """Ends when it is told to, or when `exits` says so."""

    pid = 77

    def __init__(self) -> None:
        self.exit_status: int | None = None
        self._ended = asyncio.Event()

    def exits(self, status: int) -> None:
        self.exit_status = status
        self._ended.set()

    async def wait(self) -> int:
        await self._ended.wait()
        return self.exit_status or 0

    async def end(self, _patience_s: float) -> None:
        self.exits(0)


class FakeProcess:
    """One that can be started, or cannot; counts how often."""

    def __init__(self, fails: bool) -> None:
        self.starts = 0
        self.is_started = False
        self._fails = fails

    def start(self) -> None:
        if self._fails:
            raise FileNotFoundError(2, "No such file or directory", "/gone")
        self.starts += 1
        self.is_started = True
        self.child = FakeChild()

    async def start_surely(self) -> None:
        while self._fails:
            await asyncio.sleep(0)
        self.start()

    async def keep_running(self) -> None:
        while True:
            await self.child.wait()
            self.start()

    def obituary(self) -> str:
        return "backend null ended: status 2"


def managed(fails: bool = False) -> tuple[ManagedBackend, FakeProcess]:
    holder = cast(Holder, None)
    made = ManagedBackend(
        "vol", BackendConfig(kind="null"), Path("/nonexistent"), holder, None, Background("vol")
    )
    process = FakeProcess(fails)
    made._process = cast(Any, process)
    return made, process


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(run())


async def never() -> None:
    await asyncio.Event().wait()


def test_a_backend_that_could_not_be_started_has_no_pid_and_can_be_ended() -> None:
    async def run() -> None:
        made, _ = managed(fails=True)
        with pytest.raises(FileNotFoundError):
            await made.run(never, lambda: "")
        assert made.pid is None
        made.let_end()
        await made.end()

    in_loop(run)


@pytest.mark.parametrize(
    ("reason", "said"), [("", "vol: backend null ended: status 2"), ("no such size", "vol: no such size")]
)
def test_the_end_of_a_backend_before_its_device_is_live_raises_the_first_cause(reason: str, said: str) -> None:
    async def run() -> None:
        made, process = managed()
        running = asyncio.ensure_future(made.run(never, lambda: reason))
        while not process.starts:
            await asyncio.sleep(0)
        process.child.exits(STATUS_USAGE)
        with pytest.raises(DaemonError) as raised:
            await running
        assert (str(raised.value), raised.value.status) == (said, STATUS_USAGE)

    in_loop(run)


def test_a_backend_is_started_again_until_let_end() -> None:
    async def run() -> None:
        made, process = managed()
        made.start()
        process.child.exits(1)
        while process.starts < 2:
            await asyncio.sleep(0)
        made.let_end()
        await made.end()
        assert made._supervision is not None
        await asyncio.wait({made._supervision})
        assert process.starts == 2

    in_loop(run)


def test_a_backend_that_does_not_die_of_sigkill_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(managed_backend, "END_PATIENCE_S", 0.0)
    monkeypatch.setattr(managed_backend, "DEATH_PATIENCE_S", 0.01)

    async def run() -> None:
        backend, process = managed()
        backend.start()

        async def end(_patience_s: float) -> None:
            await asyncio.Event().wait()

        process.child.end = end  # type: ignore[method-assign]
        await backend.end()
        backend.let_end()
        assert "process 77, was killed and waits in the kernel" in caplog.text

    in_loop(run)


def test_a_backend_that_cannot_be_started_yet_is_started_later_and_supervised() -> None:
    async def run() -> None:
        backend, process = managed(fails=True)
        backend.start()
        assert backend.pid is None
        process._fails = False
        while not process.starts:
            await asyncio.sleep(0)
        process.child.exits(1)
        while process.starts < 2:
            await asyncio.sleep(0)
        backend.let_end()
        await backend.end()

    in_loop(run)
