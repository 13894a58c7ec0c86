"""The backend that the daemon runs for a device, with a fake process."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from support.fakes.device_parts import FakeHolder
from ublkpool.daemon.backends import backend_process, managed_backend
from ublkpool.daemon.backends.backend_process import BackendProcess
from ublkpool.daemon.backends.managed_backend import ManagedBackend
from ublkpool.daemon.backends.template_process import BackendTemplate
from ublkpool.daemon.errors import STATUS_USAGE, DaemonError
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.left_behind import identify
from ublkpool.daemon.settings.config import BackendConfig

DEADLINE_S = 60
CONFIG = BackendConfig(kind="null")


class FakeChild(Child):
    """Ends when it is told to, or when `exits` is called."""

    def __init__(self) -> None:
        self.pid = 77
        self._exited = asyncio.get_running_loop().create_future()

    def exits(self, status: int) -> None:
        self._exited.set_result(status)

    async def end(self, patience_s: float) -> int:
        if not self._exited.done():
            self.exits(0)
        return await self.wait()


class FakeProcess(BackendProcess):
    """A backend whose starts succeed, or fail while `fails` is set; counts them."""

    child: FakeChild

    def __init__(self, fails: bool) -> None:
        super().__init__("vol", CONFIG, Path("/nonexistent"), lambda _fd: None)
        self.starts = 0
        self.fails = fails
        self.prepared_before: list[int] = []
        """How many starts there had been, at each call of `prepare`."""

    async def prepare(self) -> None:
        await asyncio.sleep(0)
        self.prepared_before.append(self.starts)

    def _start(self) -> None:
        if self.fails:
            raise FileNotFoundError(2, "No such file or directory", "/gone")
        self.starts += 1
        self.child = FakeChild()

    def obituary(self) -> str:
        return "backend null ended: status 2"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_process, "RESTART_MIN_S", 0.0)


def managed(fails: bool = False) -> tuple[ManagedBackend, FakeProcess]:
    made = ManagedBackend("vol", CONFIG, Path("/nonexistent"), FakeHolder(), None, Background("vol"))
    made._process = process = FakeProcess(fails)
    return made, process


class NoTemplate(BackendTemplate):
    """A template that is never asked."""


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
def test_the_end_of_a_backend_before_its_device_is_live_raises_the_first_cause(
    reason: str, said: str
) -> None:
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

        async def end(patience_s: float) -> int:
            await asyncio.Event().wait()
            return 0

        monkeypatch.setattr(process.child, "end", end)
        await backend.end()
        backend.let_end()
        assert "process 77, was killed and waits in the kernel" in caplog.text

    in_loop(run)


def test_a_backend_that_cannot_be_started_yet_is_started_later_and_supervised() -> None:
    async def run() -> None:
        backend, process = managed(fails=True)
        backend.start()
        assert backend.pid is None
        process.fails = False
        while not process.starts:
            await asyncio.sleep(0)
        process.child.exits(1)
        while process.starts < 2:
            await asyncio.sleep(0)
        backend.let_end()
        await backend.end()

    in_loop(run)


def test_the_template_is_asked_before_each_start_and_the_loop_goes_on_meanwhile() -> None:
    async def run() -> None:
        made = ManagedBackend(
            "vol", CONFIG, Path("/nonexistent"), FakeHolder(), None, Background("vol"), template=NoTemplate()
        )
        made._process = process = FakeProcess(fails=False)
        made.start()
        assert process.starts == 0 and made.pid is None
        for starts in (1, 2, 3):
            while process.starts < starts:
                await asyncio.sleep(0)
            assert process.prepared_before == list(range(starts))
            process.child.exits(1)
        running = asyncio.ensure_future(made.run(never, lambda: ""))
        while process.starts < 4:
            await asyncio.sleep(0)
        assert len(process.prepared_before) >= 4
        running.cancel()
        made.let_end()

    in_loop(run)


def test_a_backend_that_is_told_to_end_while_the_template_is_asked_is_not_started() -> None:
    async def run() -> None:
        made = ManagedBackend(
            "vol", CONFIG, Path("/nonexistent"), FakeHolder(), None, Background("vol"), template=NoTemplate()
        )
        made._process = process = FakeProcess(fails=False)
        made.start()
        made.let_end()
        for _ in range(10):
            await asyncio.sleep(0)
        await made.end()
        assert process.starts == 0

    in_loop(run)


def test_the_template_is_ready_for_the_successor_of_an_earlier_daemons_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Begun(NoTemplate):
        begun = 0

        def begin(self) -> None:
            self.begun += 1

    async def run() -> None:
        template = Begun()
        made = ManagedBackend(
            "vol", CONFIG, Path("/nonexistent"), FakeHolder(), None, Background("vol"), template=template
        )
        made._process = process = FakeProcess(fails=False)

        def adopt(*_: object) -> None:
            process.child = FakeChild()

        monkeypatch.setattr(process, "adopt", adopt)
        made.go_on(identify("backend", os.getpid()), 2)
        assert template.begun == 1 and process.starts == 0
        made.let_end()

    in_loop(run)
