"""The order of a recovery's steps, its fence and its deadlines, with made-up kernel, workers and backend."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from support.fakes.device_parts import (
    FakeKernel,
    FakeParts,
    FakeSession,
    FakeTeam,
    FakeWorkerProcess,
    ended_child,
    fake_context,
    turn,
)
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device import recovery
from ublkpool.daemon.device.recovery import RESTARTS_MAX, STEADY_S, RestartLimit, next_epoch, retire
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.control_process import ControlFailed
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.processes.broker_process import Leases
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings.config import DeviceConfig

EPOCH = 4
DEADLINE_S = 60
AFTER_THE_FENCE = ["reclaim", "end recovery", f"register {EPOCH + 1}", "ready", "recovery command over"]
"""Workers fetch once they are registered: by then END_USER_RECOVERY must be in the kernel."""
BEFORE_THE_FENCE = ["drain", "kill", "quiesced", "start recovery", "fork"]


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_workers_that_die_soon_again_and_again_are_given_up() -> None:
    limit = RestartLimit(Clock())
    limit.live()
    assert [limit.died() for _ in range(RESTARTS_MAX + 1)] == [False] * RESTARTS_MAX + [True]


def test_a_steady_life_resets_the_count() -> None:
    clock = Clock()
    limit = RestartLimit(clock)
    for _ in range(3 * RESTARTS_MAX):
        assert not limit.died()
        limit.live()
        clock.now_s += STEADY_S
    for _ in range(RESTARTS_MAX - 1):
        limit.live()
        clock.now_s += STEADY_S / 2
        assert not limit.died()
    limit.live()
    assert limit.died()


def test_a_failed_recovery_counts_although_the_workers_had_lived_long() -> None:
    clock = Clock()
    limit = RestartLimit(clock)
    limit.live()
    clock.now_s += 100 * STEADY_S
    assert not any(limit.died() for _ in range(RESTARTS_MAX))
    clock.now_s += 100 * STEADY_S
    assert limit.died()


class Scene:
    """A device in recovery; `steps` is what was done, in order."""

    def __init__(self, parts: "SceneParts") -> None:
        self.parts = parts
        self.steps: list[str] = []
        self.fenced, self.backend_gone = self._future(), self._future()
        self.worker_ended, self.ended_recovery = self._future(), self._future()
        self.ended_recovery.set_result(None)
        self.kernel = SceneKernel(self)
        self.session = SceneSession(self)
        parts.resources.kernel, parts.resources.leases = self.kernel, SceneLeases(self)
        parts.resources.team, parts.resources.epoch = SceneTeam(self, EPOCH), EPOCH

    @staticmethod
    def _future() -> "asyncio.Future[None]":
        return asyncio.get_running_loop().create_future()

    async def step(self, name: str) -> None:
        self.steps.append(name)
        await asyncio.sleep(0)

    def recover(self, backend: bool = True) -> "asyncio.Task[Team]":
        self.parts.backend.session = self.session if backend else None
        return asyncio.get_running_loop().create_task(next_epoch(self.parts))


class SceneKernel(FakeKernel):
    """A kernel device that is QUIESCED, and ends its recovery when the test says so."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.tears = False
        self._scene = scene

    @property
    def tears_siblings(self) -> bool:
        return self.tears

    async def wait_quiesced(self, deadline_s: float) -> None:
        await self._scene.step("quiesced")

    async def start_recovery(self, deadline_s: float) -> None:
        await self._scene.step("start recovery")

    async def end_recovery(self, deadline_s: float, begun: asyncio.Event, check: Call | None = None) -> None:
        await asyncio.sleep(0)
        if check is not None:
            check()
        self._scene.steps.append("end recovery")
        begun.set()
        try:
            await self._scene.ended_recovery
        finally:
            # The command's process takes a moment to end.
            await turn()
            self._scene.steps.append("recovery command over")


class SceneTeam(FakeTeam):
    """Workers whose steps are noted."""

    def __init__(self, scene: Scene, epoch: int) -> None:
        super().__init__(scene.kernel, epoch)
        self._scene = scene

    async def drain(self, patience_s: float) -> None:
        await self._scene.step("drain")

    async def kill(self) -> None:
        await self._scene.step("kill")

    async def ready(self) -> None:
        await self._scene.step("ready")

    async def expect(self, session: Session, fence: bool) -> None:
        assert session is self._scene.session and fence
        self._scene.steps.append("expect")

    async def linked(self) -> None:
        scene = self._scene
        await asyncio.wait({scene.fenced, scene.worker_ended}, return_when=asyncio.FIRST_COMPLETED)
        if not scene.fenced.done():
            raise DaemonError("a worker ended in the fence")

    async def ended(self) -> WorkerProcess:
        await asyncio.shield(self._scene.worker_ended)
        return FakeWorkerProcess(1, ended_child(0))

    def whole_check(self) -> Call:
        return Call(lambda _: self._scene.steps.append("check"), fds=[-1])


class SceneSession(FakeSession):
    """A backend that is gone when the scene says so."""

    def __init__(self, scene: Scene) -> None:
        super().__init__("fake")
        self._scene = scene
        self._gone = scene.backend_gone

    async def cut_off(self) -> None:
        self._scene.steps.append("cut off")
        self.dies()


class SceneLeases(Leases):
    """Leases whose steps are noted."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    async def reclaim(self) -> None:
        await self._scene.step("reclaim")

    async def register(self, epoch: int) -> None:
        self._scene.steps.append(f"register {epoch}")


class SceneParts(FakeParts):
    """Parts whose fork is noted."""

    scene: Scene

    async def fork(self, epoch: int) -> Team:
        self.scene.steps.append("fork")
        return SceneTeam(self.scene, epoch)


def a_scene() -> Scene:
    parts = SceneParts(DeviceConfig(name="vol"), fake_context())
    parts.scene = Scene(parts)
    return parts.scene


def scene(test: Callable[[Scene], Awaitable[None]]) -> Callable[[], None]:
    """Run a test in a loop of its own."""

    async def run() -> None:
        await asyncio.wait_for(test(a_scene()), DEADLINE_S)

    def plain() -> None:
        asyncio.run(run())

    plain.__name__ = test.__name__
    return plain


@scene
async def test_no_buffer_of_dead_workers_is_reclaimed_before_the_backend_has_confirmed_the_fence(
    it: Scene,
) -> None:
    recovering = it.recover()
    await turn()
    assert it.steps == [*BEFORE_THE_FENCE, "expect"] and not recovering.done()
    it.fenced.set_result(None)
    team = await recovering
    assert it.steps == [*BEFORE_THE_FENCE, "expect", *AFTER_THE_FENCE]
    assert team.epoch == EPOCH + 1


@scene
async def test_a_device_without_a_backend_is_not_fenced(it: Scene) -> None:
    await it.recover(backend=False)
    assert it.steps == BEFORE_THE_FENCE + AFTER_THE_FENCE


@scene
async def test_a_backend_that_is_already_gone_is_not_fenced(it: Scene) -> None:
    it.session.dies()
    await it.recover()
    assert it.steps == BEFORE_THE_FENCE + AFTER_THE_FENCE


@scene
async def test_a_backend_that_dies_in_the_fence_counts_as_fenced(it: Scene) -> None:
    recovering = it.recover()
    await turn()
    it.backend_gone.set_result(None)
    await recovering
    assert it.steps == [*BEFORE_THE_FENCE, "expect", *AFTER_THE_FENCE]


@scene
async def test_a_worker_that_dies_in_the_fence_ends_the_attempt(it: Scene) -> None:
    recovering = it.recover()
    await turn()
    it.worker_ended.set_result(None)
    with pytest.raises(DaemonError, match="ended in the fence"):
        await recovering
    assert it.steps == [*BEFORE_THE_FENCE, "expect"]


@scene
async def test_a_worker_that_dies_while_its_tags_are_waited_for_ends_the_attempt(it: Scene) -> None:
    it.ended_recovery = asyncio.get_running_loop().create_future()
    it.fenced.set_result(None)
    recovering = it.recover()
    await turn()
    assert it.steps[-1] == "ready"
    it.worker_ended.set_result(None)
    with pytest.raises(DaemonError, match="its worker ended"):
        await recovering
    assert it.ended_recovery.cancelled() and it.steps[-1] == "recovery command over", (
        "a command that is still with the kernel could make the device live when its last workers are ended"
    )


@scene
async def test_where_a_death_tears_the_siblings_tags_end_user_recovery_comes_when_all_are_fetched(
    it: Scene,
) -> None:
    it.kernel.tears = True
    it.fenced.set_result(None)
    await it.recover()
    fetched = ["reclaim", f"register {EPOCH + 1}", "ready"]
    ended = ["check", "end recovery", "recovery command over"]
    assert it.steps == [*BEFORE_THE_FENCE, "expect", *fetched, *ended]


def test_a_backend_that_does_not_confirm_the_fence_is_cut_off_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery, "FENCE_DEADLINE_S", 0.0)

    @scene
    async def run(it: Scene) -> None:
        await it.recover()
        assert it.steps == [*BEFORE_THE_FENCE, "expect", "cut off", *AFTER_THE_FENCE]

    run()


@pytest.mark.parametrize(
    ("offered", "ended"), [(True, ["end"]), (False, []), (ControlFailed("QUIESCE_DEV: timed out", 110), [])]
)
def test_only_workers_of_a_quiesced_device_are_left_to_end_by_themselves(
    offered: bool | ControlFailed, ended: list[str]
) -> None:
    steps: list[str] = []

    class Kernel(FakeKernel):
        async def quiesce(self, deadline_s: float) -> bool:
            if isinstance(offered, ControlFailed):
                raise offered
            return offered

    class Retired(FakeTeam):
        async def end(self, patience_s: float) -> None:
            steps.append("end")

    async def run() -> None:
        await retire(Retired(Kernel()), "vol")

    asyncio.run(run())
    assert steps == ended
