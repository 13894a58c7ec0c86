"""When users are told `live`: a backend has greeted every queue, at the first start as after a takeover."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ublkpool.bufpool import wire
from ublkpool.daemon.device.attachment import Attachment
from ublkpool.daemon.device.lifecycle import Lifecycle
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.workers import messages

DEADLINE_S = 20


class FakeTeam:
    """Workers that are greeted when the test says so, or end."""

    def __init__(self, queues: int = 2) -> None:
        self.workers: list[Any] = []
        self.missing = list(range(queues))
        self._changed = asyncio.Event()
        self._has_ended = False
        kernel = SimpleNamespace(node="/dev/null")
        self.plan = SimpleNamespace(
            arena=SimpleNamespace(data_fd=-1), descriptors=lambda: nullcontext([]), kernel=kernel
        )

    def unlinked(self) -> list[int]:
        return list(self.missing)

    async def linked(self) -> None:
        while self.missing and not self._has_ended:
            self._changed.clear()
            await self._changed.wait()
        if self._has_ended:
            raise DaemonError("queue 0: its worker ended")

    async def expect(self, *_: object, **__: object) -> None:
        """It does."""

    async def lost(self) -> None:
        """It takes back what there was."""

    def attached(self, _session: object) -> None:
        """See `expect`."""

    def greeted(self, *queues: int) -> None:
        self.missing = [each for each in self.missing if each not in queues]
        self._changed.set()

    def ends(self) -> None:
        self._has_ended = True
        self._changed.set()


class FakeSession:
    """A backend."""

    segment_fd = None

    def __init__(self, kind: str = "file") -> None:
        self.attach = wire.Attach(v=1, device="vol", kind=kind)
        self.pid, self.segment = 1, 0
        self._gone = asyncio.get_running_loop().create_future()

    @property
    def is_gone(self) -> bool:
        return self._gone.done()

    async def gone(self) -> None:
        await asyncio.shield(self._gone)

    def dies(self) -> None:
        self._gone.set_result(None)

    def say(self, *_: object) -> None:
        """Nobody listens."""

    def entrust(self, *_: object) -> None:
        """It is given nothing."""

    def close(self) -> None:
        """Nothing is open."""

    def fileno(self) -> int:
        return -1


class World:
    """A device that the kernel has live, and its backend's place."""

    def __init__(self) -> None:
        self.team = FakeTeam()
        self.life = Lifecycle("vol", lambda: None)
        holder = SimpleNamespace(hold=lambda *_: None, drop=lambda *_: None)
        self.place = Attachment(
            DeviceConfig(name="vol"),
            self.life,
            cast(Any, holder),
            Background("vol"),
            lambda: cast(Any, self.team),
        )
        self.life.enter("live")

    async def attach(self, session: FakeSession) -> None:
        await self.place.introduce(cast(Any, self.team), cast(Any, session))

    @property
    def told(self) -> tuple[str, str]:
        """State and reason as `list` has them."""
        return self.life.shown, self.place.due_greetings()


async def turn() -> None:
    """Let every task of the loop do what it can."""
    for _ in range(20):
        await asyncio.sleep(0)


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
async def test_after_a_takeover_nobody_is_told_live_before_a_backend_serves(world: World) -> None:
    world.place.await_first()
    assert world.told == ("recovering", "")
    waiting = asyncio.ensure_future(world.life.live())
    first = FakeSession()
    await world.attach(first)
    first.dies()
    await turn()
    assert world.told == ("recovering", ""), "that one never served"
    assert not waiting.done()
    await world.attach(second := FakeSession("memory"))
    world.team.greeted(0, 1)
    await waiting
    assert world.told == ("live", "")
    second.dies()
    await turn()
    assert world.told == ("live", ""), "its requests wait, as of any device whose backend died"


@in_a_world
async def test_a_backend_of_an_earlier_daemon_that_serves_makes_the_device_live(world: World) -> None:
    world.place.await_first()
    world.team.greeted(0, 1)
    world.place.session = cast(Any, FakeSession())
    world.place.adopt(cast(Any, world.place.session), cast(Any, world.team))
    assert world.told == ("live", "")


@in_a_world
async def test_a_worker_that_ends_while_greetings_are_due_leaves_it_to_the_next_ones(world: World) -> None:
    await world.attach(FakeSession())
    world.team.ends()
    await turn()
    assert world.told[0] == "recovering"
    world.team = FakeTeam()
    world.team.greeted(0, 1)
    world.place.await_greetings(cast(Any, world.team))
    assert world.told == ("live", "")


@in_a_world
async def test_a_device_that_fails_meanwhile_says_so_to_who_waits(world: World) -> None:
    world.place.await_first()
    waiting = asyncio.ensure_future(world.life.live())
    await turn()
    world.life.reason = "broken"
    world.life.enter("failed")
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
def test_what_a_worker_says_of_its_backend_is_of_the_present_one(
    monkeypatch: pytest.MonkeyPatch, words: list[messages.FromWorker], linked: bool
) -> None:
    async def run() -> None:
        worker = FakeWorker(monkeypatch)
        await worker.says(*words)
        assert worker.process.is_linked is linked
        worker.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))
