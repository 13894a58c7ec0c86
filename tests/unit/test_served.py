"""When users are told `live`: a backend has greeted every queue, at the first start as after a takeover."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from support.fakes.device_parts import (
    FakeChild,
    FakeParts,
    FakeSession,
    FakeTeam,
    FakeWorkerProcess,
    fake_context,
    turn,
)
from ublkpool.daemon.device.introduction import introduce
from ublkpool.daemon.device.view import DeviceView
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.workers import messages

DEADLINE_S = 60


class World:
    """A device that the kernel has live, and its attached backend."""

    def __init__(self) -> None:
        self.parts = FakeParts(DeviceConfig(name="vol"), fake_context())
        self.life, self.backend = self.parts.life, self.parts.backend
        self.use(FakeTeam(missing=(0, 1)))
        self.parts.enter("live")

    def use(self, team: FakeTeam) -> None:
        """These are the workers from now on."""
        self.team = self.parts.resources.team = team

    async def attach(self, session: FakeSession) -> None:
        await introduce(self.parts, self.team, session, self._fail)

    async def _fail(self, reason: str) -> None:
        raise AssertionError(reason)

    @property
    def told(self) -> tuple[str, str]:
        """State and reason as `list` has them."""
        return self.life.shown, self.backend.due_greetings(self.team)


def in_a_world(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    async def run() -> None:
        await asyncio.wait_for(test(World()), DEADLINE_S)

    def plain() -> None:
        asyncio.run(run())

    return plain


@in_a_world
async def test_an_attached_backend_serves_when_it_has_greeted_every_queue(world: World) -> None:
    await world.attach(FakeSession())
    assert world.told == ("recovering", "backend file has attached and not said HELLO on queue 0, 1 yet")
    waiting = asyncio.ensure_future(world.life.live())
    world.team.greeted(1)
    await turn()
    assert world.told == ("recovering", "backend file has attached and not said HELLO on queue 0 yet")
    assert not waiting.done()
    world.team.greeted(0)
    assert world.told == ("recovering", "")
    await waiting
    assert world.told == ("live", "")


@in_a_world
async def test_after_a_takeover_no_client_is_told_live_before_a_backend_serves(world: World) -> None:
    world.backend.await_first()
    assert world.told == ("recovering", "")
    waiting = asyncio.ensure_future(world.life.live())
    first = FakeSession()
    await world.attach(first)
    first.dies()
    await turn()
    assert world.told == ("recovering", ""), "the first backend never served"
    assert not waiting.done()
    await world.attach(second := FakeSession("memory"))
    world.team.greeted(0, 1)
    await waiting
    assert world.told == ("live", "")
    second.dies()
    await turn()
    assert world.told == ("live", ""), "requests wait, as on any device whose backend died"


@in_a_world
async def test_a_backend_of_an_earlier_daemon_that_serves_makes_the_device_live(world: World) -> None:
    world.backend.await_first()
    world.team.greeted(0, 1)
    world.backend.session = FakeSession()
    world.backend.await_greetings(world.team)
    assert world.told == ("live", "")


@in_a_world
async def test_a_worker_that_ends_while_greetings_are_due_leaves_them_to_the_next_team(world: World) -> None:
    await world.attach(FakeSession())
    world.team.ends()
    await turn()
    assert world.told[0] == "recovering"
    world.use(FakeTeam())
    world.backend.await_greetings(world.team)
    assert world.told == ("live", "")


@in_a_world
async def test_a_device_that_fails_meanwhile_tells_those_that_wait(world: World) -> None:
    world.backend.await_first()
    waiting = asyncio.ensure_future(world.life.live())
    await turn()
    world.life.reason = "broken"
    world.parts.enter("failed")
    with pytest.raises(DaemonError, match=r"^vol: broken$"):
        await waiting


class FakeWorker:
    """The worker's end of a `WorkerProcess`; the process is this one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Immortal:
            def __init__(self, *_: object) -> None:
                """Never ends."""

            async def wait(self) -> int:
                await asyncio.Event().wait()
                return 0

        monkeypatch.setattr("ublkpool.daemon.processes.worker_process.Child", Immortal)
        ours, self.sock = messages.pair()
        self.process = WorkerProcess(0, None, 1, ours, lambda *_: None)

    async def says(self, *words: messages.FromWorker) -> None:
        for each in words:
            messages.send(self.sock, each)
        await turn()

    def close(self) -> None:
        self.process.close()
        self.sock.close()


@pytest.mark.parametrize(
    ("words", "linked"),
    [
        ([messages.Linked()], True),
        ([messages.Linked(), messages.Expecting()], False),
        ([messages.Linked(), messages.LetGo()], False),
        ([messages.Linked(), messages.Cut("x")], False),
        ([messages.Linked(), messages.HungUp()], False),
        ([messages.Expecting(), messages.Linked()], True),
        ([messages.Standing(True, "01", True)], True),
        ([messages.Standing(True, "01", False)], False),
        ([messages.Standing(True, "01")], True),
        ([messages.Standing(True, "")], False),
        ([messages.Linked(), messages.Standing(True, "01", False)], False),
        ([messages.Standing(True, "01", False), messages.Linked()], True),
    ],
)
def test_a_worker_s_words_are_taken_for_its_present_backend(
    monkeypatch: pytest.MonkeyPatch, words: list[messages.FromWorker], linked: bool
) -> None:
    async def run() -> None:
        worker = FakeWorker(monkeypatch)
        await worker.says(*words)
        assert worker.process.is_linked is linked
        worker.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_worker_has_its_store_grow_and_a_late_answer_is_growth_that_the_device_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        worker = FakeWorker(monkeypatch)
        heard: list[int] = []
        worker.process.on_grown = heard.append
        first = asyncio.ensure_future(worker.process.grow(100, DEADLINE_S))
        await turn()
        assert messages.receive_in_worker(worker.sock)[0] == messages.Grow(100)
        await worker.says(messages.Grown(50, is_asked=True), messages.Grown(60))
        assert not first.done() and heard == [50, 60], "another size, and growth by itself"
        await worker.says(messages.Grown(100, is_asked=True))
        await first
        assert heard == [50, 60], "the caller puts this size on record"
        refused = asyncio.ensure_future(worker.process.grow(200, DEADLINE_S))
        await turn()
        await worker.says(messages.Grown(200, is_asked=True, reason="full"))
        with pytest.raises(DaemonError, match=r"^full$"):
            await refused
        with pytest.raises(DaemonError, match=r"its store has not grown within 0.001 s"):
            await worker.process.grow(300, 0.001)
        await worker.says(messages.Grown(300, is_asked=True, reason="full"))
        assert heard == [50, 60]
        await worker.says(messages.Grown(300, is_asked=True), messages.Grown(250, is_asked=True))
        assert heard == [50, 60, 300] and worker.process.grown_bytes == 300
        worker.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_growth_that_the_earlier_daemon_was_told_is_known_after_a_takeover(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        worker = FakeWorker(monkeypatch)
        team = FakeTeam()
        team.workers = [worker.process]
        report = asyncio.ensure_future(worker.process.report())
        await turn()
        asked, _ = messages.receive_in_worker(worker.sock)
        assert isinstance(asked, messages.Report)
        standing = messages.Standing(True, "", True, asked.id, knows_grow=True, grown_bytes=100)
        await worker.says(standing)
        await report
        heard: list[int] = []
        team.follow_growth(heard.append)
        await worker.says(messages.Grown(200))
        assert heard == [100, 200] and team.can_grow
        worker.process.knows_grow = False
        assert not team.can_grow
        worker.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


@in_a_world
async def test_an_absence_that_a_worker_reports_while_the_session_still_ends_is_told(world: World) -> None:
    await world.attach(session := FakeSession())
    worker = FakeWorkerProcess(0, FakeChild())
    world.backend.hear(worker, messages.Absent())
    session.dies()
    await turn()
    assert world.backend.session is None
    assert DeviceView(world.parts).trouble.startswith("no backend is attached, requests fail")
    await world.attach(FakeSession("memory"))
    assert not world.backend.is_absent_too_long
