"""A device that grows, and what outlives its daemon: a kill at any step of a resize leaves it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec

from support.fakes.device_parts import SIZE_BYTES, FakeKernel, FakeSession, FakeTeam, fake_device
from support.fakes.states import FakeStates
from ublkpool.bufpool.wire import Identity
from ublkpool.daemon.device import adoption
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import ResizeResult
from ublkpool.ublk.abi import Feature

DEADLINE_S = 60
BIG = 2 * SIZE_BYTES
BIGGER = 3 * SIZE_BYTES


class Killed(BaseException):
    """The daemon is killed here."""


class World:
    """What outlives a daemon: the store, the state directory, the record, the kernel's disk.

    `kill_at` is the effect at which the daemon is killed: before it if `before`, else after it.
    """

    def __init__(self) -> None:
        self.states = FakeStates()
        self.store_bytes = self.disk_bytes = SIZE_BYTES
        self.record: Disk | None = Disk(
            size_bytes=SIZE_BYTES, block_bytes=512, volatile_cache=False, read_only=False
        )
        self.steps: list[str] = []
        self.kill_at, self.before = "", False
        self.fail_at: dict[str, Exception] = {}

    def step(self, name: str, effect: Callable[[], None]) -> None:
        self.steps.append(name)
        if name in self.fail_at:
            raise self.fail_at[name]
        if self.kill_at == name and self.before:
            raise Killed
        effect()
        if self.kill_at == name:
            raise Killed

    def check(self) -> None:
        """The promise, at any time: no size is larger than the one before it in the order."""
        store = self.states.get("vol").store
        assert store is not None and self.record is not None
        assert self.disk_bytes <= max(store.size_bytes, self.record.size_bytes) <= self.store_bytes
        assert self.record.size_bytes <= store.size_bytes


class GrowingSession(FakeSession):
    """A backend whose store is the world's."""

    def __init__(self, world: World, resizes: bool = True) -> None:
        super().__init__()
        self.world = world
        self.attach = msgspec.structs.replace(self.attach, resizes=resizes)

    async def resize(self, size_bytes: int, patience_s: float) -> None:
        await asyncio.sleep(0)
        self.world.step("store", lambda: setattr(self.world, "store_bytes", size_bytes))


class GrowingStore:
    """The same of a device whose workers run its engine themselves, or are connected to it."""

    def __init__(self, world: World, connects: bool = False) -> None:
        self.world, self.connects = world, connects

    async def grow(self, bound: Identity, served_bytes: int, wanted_bytes: int) -> None:
        await asyncio.sleep(0)
        assert not self.connects, "only the worker has the store's lock"
        self.world.step("store", lambda: setattr(self.world, "store_bytes", wanted_bytes))


class GrowingTeam(FakeTeam):
    """Workers whose engines learn the size, or whose one is connected to the store."""

    can_resize = can_grow = True

    def __init__(self, world: World, kernel: FakeKernel) -> None:
        super().__init__(kernel)
        self.world = world
        self.hear: list[Callable[[int], None]] = []

    async def grow(self, size_bytes: int, patience_s: float) -> None:
        await asyncio.sleep(0)
        self.world.step("store", lambda: setattr(self.world, "store_bytes", size_bytes))

    def follow_growth(self, hear: Callable[[int], None]) -> None:
        self.hear.append(hear)

    def store_grows(self, size_bytes: int) -> None:
        """The store has grown by itself."""
        self.world.store_bytes = size_bytes
        self.hear[-1](size_bytes)

    async def resize(self, size_bytes: int) -> None:
        await asyncio.sleep(0)
        self.world.step("engines", lambda: None)


class GrowingKernel(FakeKernel):
    """A kernel's device whose disk is the world's."""

    def __init__(self, world: World, features: Feature = Feature.UPDATE_SIZE) -> None:
        super().__init__()
        self.world, self._features, self.size_bytes = world, features, world.disk_bytes

    async def update_size(self, size_bytes: int, deadline_s: float) -> None:
        await asyncio.sleep(0)
        self.world.step("disk", lambda: setattr(self.world, "disk_bytes", size_bytes))
        self.size_bytes = size_bytes


class SavingStates:
    """The world's state directory, each write a step."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world.states, name)

    async def save(self, state: Any) -> None:
        await asyncio.sleep(0)
        self._world.step("state", lambda: self._world.states.states.update(vol=state))


def daemon_on(world: World, session: FakeSession | None = None, **config: Any) -> Device:
    """A daemon's live device on what the one before left, as a takeover makes it."""
    config = {"size_bytes": SIZE_BYTES, **config}
    device = fake_device(DeviceConfig(name="vol", **config))
    parts = device.parts
    parts.binding._states = cast(Any, world.states)
    record = Record(config=device.config, device_number=3, disk=world.record)
    kernel = GrowingKernel(world)
    parts.resources.kernel = kernel
    parts.resources.disk = adoption._disk_of(parts, record)
    parts.resources.team = FakeTeam(kernel)
    parts.life.state = "live"
    parts.backend.session = session
    parts.save = lambda: world.step(  # type: ignore[method-assign]
        "record", lambda: setattr(world, "record", parts.resources.disk)
    )
    return device


def runs_inside(device: Device, world: World, connects: bool = False) -> GrowingTeam:
    """Let the device's workers run its engine themselves; with `connects` on a store that is a connection."""
    parts = device.parts
    parts.inside = cast(Any, GrowingStore(world, connects))
    parts.resources.team = team = GrowingTeam(world, cast(Any, parts.resources.kernel))
    return team


async def bound(device: Device, world: World) -> None:
    """The store that served the device first is on record."""
    await device.parts.binding.learn(None, SIZE_BYTES, "file", 1)
    device.parts.binding._states = cast(Any, SavingStates(world))


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(run())


def grown(world: World, size_bytes: int = BIG, is_relative: bool = False, **more: Any) -> ResizeResult:
    """The result of one resize of a device on this world.  Raises what it raises."""
    results: list[ResizeResult] = []

    async def run() -> None:
        device = daemon_on(world, GrowingSession(world), **more)
        await bound(device, world)
        world.steps.clear()
        results.append(await device.resize(size_bytes, is_relative))

    in_loop(run)
    return results[0]


def without_feature(device: Device, world: World) -> None:
    """Let the driver have no UPDATE_SIZE."""
    device.parts.resources.kernel = GrowingKernel(world, Feature(0))
