"""A live device that is drained, on made-up parts: its workers, its backends, and what becomes of them in order."""

import asyncio
from collections.abc import Awaitable, Callable

from support.fakes.device_parts import (
    SIZE_BYTES,
    FakeSession,
    FakeTeam,
    fake_device,
    turn,
)
from ublkpool.daemon.backends.managed_backend import ManagedBackend
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.left_behind import Process
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.workers.record_gate import RecordGate

DEADLINE_S = 60
CACHED = Disk(size_bytes=SIZE_BYTES, block_bytes=512, volatile_cache=True, read_only=False)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(run())


class HeldTeam(FakeTeam):
    """Workers that note what they are told; they are quiet once the test says so, or end."""

    def __init__(self, steps: list[str], quiet: bool = True) -> None:
        super().__init__()
        self.steps, self.heard = steps, steps
        self.result = 0
        self.knows = True
        self.is_quiet = asyncio.Event()
        if quiet:
            self.is_quiet.set()

    @property
    def can_hold(self) -> bool:
        return self.knows

    async def hold(self, on: bool, gate: RecordGate | None = None) -> None:
        if self._has_ended:
            raise DaemonError("queue 0: its worker ended")
        assert (gate is not None) == on, "a hold on its way ends with its daemon"
        self.steps.append(f"hold {on}")

    async def release(self) -> None:
        self.steps.append("release")

    async def quiet(self) -> None:
        await self.is_quiet.wait()
        if self._has_ended:
            raise DaemonError("queue 0: its worker ended")

    async def flush(self) -> int:
        self.steps.append("flush")
        return self.result

    def ends(self) -> None:
        super().ends()
        self.is_quiet.set()


class LeavingSession(FakeSession):
    """A backend that ends when it is told to."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self._steps = steps

    async def detach(self, reason: str, patience_s: float, keep: bool) -> None:
        self._steps.append(f"detach, keep {keep}")
        self.dies()


class SlowSession(LeavingSession):
    """A backend that was told to leave, and writes to its store until the test says that it is dead."""

    async def detach(self, reason: str, patience_s: float, keep: bool) -> None:
        self._steps.append(f"detach, keep {keep}")
        await self.gone()


class FakeManaged(ManagedBackend):
    """The daemon's own backend, which does nothing but note it."""

    def __init__(self, steps: list[str]) -> None:
        self._steps = steps

    def adopt_to_end(self, left: Process | None, stderr: int | None) -> None:
        """Its process was the earlier daemon's."""

    def let_end(self) -> None:
        self._steps.append("not started again")

    async def end(self) -> None:
        self._steps.append("process ended")

    def start(self) -> None:
        self._steps.append("started")

    @property
    def pid(self) -> int | None:
        return None

    @property
    def trouble(self) -> str:
        return ""

    def serves(self) -> None:
        """It attached."""


class Scene:
    """A live device with workers and a backend, and what becomes of them in order."""

    def __init__(self, managed: bool = False, attached: bool = True, quiet: bool = True) -> None:
        self.steps: list[str] = []
        self.attached = attached
        self.device: Device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES))
        self.parts = self.device.parts
        self.team = HeldTeam(self.steps, quiet)
        self.parts.resources.team = self.team
        self.parts.resources.disk = CACHED
        self.parts.save = self._save  # type: ignore[method-assign]
        if managed:
            self.parts.managed = FakeManaged(self.steps)

    def _save(self) -> None:
        gate = ", gate closed" if self.parts.resources.hold_gate is not None else ""
        self.steps.append(f"record {self.parts.drain or 'no drain'}{gate}")

    async def begin(self) -> "Scene":
        self.parts.life.state = "live"
        if self.attached:
            await self.device.attach(LeavingSession(self.steps))
        self.steps.clear()
        return self


async def leaving(scene: Scene) -> SlowSession:
    """The device's backend, which leaves for a drain whose client has gone."""
    session = SlowSession(scene.steps)
    await scene.device.attach(session)
    scene.steps.clear()
    draining = asyncio.ensure_future(scene.device.drain(True, None))
    await turn()
    assert scene.parts.drain == "drained" and scene.steps[-1] == "detach, keep True"
    draining.cancel()
    await asyncio.wait({draining})
    return session
