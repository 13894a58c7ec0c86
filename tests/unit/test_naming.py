"""When udev is told of a disk that an earlier daemon left: once its requests are answered, however long that takes."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from support.fakes.device_parts import DISK, SIZE_BYTES, FakeKernel, FakeSession, FakeTeam, fake_device, turn
from ublkpool.bufpool import wire
from ublkpool.daemon.device import adoption, device
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.settings.config import DeviceConfig

DEADLINE_S = 60
LEFT = Record(config=DeviceConfig(name="vol"), device_number=3, disk=DISK, epoch=7, live=True)


class Obedient(FakeSession):
    """A backend that leaves when it is told to."""

    async def detach(self, reason: str, patience_s: float, keep: bool) -> None:
        self.dies()


class World:
    """A device whose workers an earlier daemon left, and which has been taken over."""

    def __init__(self, patch: pytest.MonkeyPatch, config: DeviceConfig | None = None) -> None:
        self.device = fake_device(config)
        self.parts = self.device.parts
        self.kernel = FakeKernel()
        self.team = FakeTeam(self.kernel, missing=(0, 1))

        async def go_on(parts: DeviceParts, *_: object) -> Team:
            parts.resources.team, parts.resources.kernel = self.team, self.kernel
            return self.team

        async def find(parts: DeviceParts, *_: object) -> bool:
            parts.resources.kernel = self.kernel
            return True

        async def learn(*_: object) -> None:
            """The store is known."""

        async def next_epoch(parts: DeviceParts) -> Team:
            parts.resources.team = self.team
            return self.team

        patch.setattr(adoption, "go_on", go_on)
        patch.setattr(adoption, "find", find)
        patch.setattr(adoption, "learn", learn)
        patch.setattr(device, "next_epoch", next_epoch)

    async def take_over(self, is_recovered: bool = False, drained: bool = False) -> None:
        record = msgspec.structs.replace(LEFT, config=self.device.config, drained=drained)
        self.device.await_takeover(record)
        if is_recovered:
            assert await self.device.recover_left(record, {})
        else:
            await self.device.go_on(record, {})
        await turn()
        assert self.device.state == "live"

    async def attach(self) -> FakeSession:
        session = FakeSession()
        session.attach = wire.Attach(v=1, device="vol", kind="file", size_bytes=SIZE_BYTES)
        await self.device.attach(session)
        await turn()
        return session

    async def greets(self, *queues: int) -> None:
        self.team.greeted(*queues)
        await turn()


@pytest.fixture
def in_world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(test: Callable[[World], Awaitable[None]], config: DeviceConfig | None = None) -> None:
        async def main() -> None:
            await asyncio.wait_for(test(World(monkeypatch, config)), DEADLINE_S)

        asyncio.run(main())

    return run


@pytest.mark.parametrize("is_recovered", [False, True])
def test_udev_is_told_once_the_backend_has_greeted_every_queue(
    in_world: Callable[..., None], is_recovered: bool
) -> None:
    async def run(world: World) -> None:
        await world.take_over(is_recovered)
        assert world.kernel.times_named == 0, "no backend is attached"
        await world.attach()
        await world.greets(0)
        assert world.kernel.times_named == 0, "queue 1 is served by no backend"
        await world.greets(1)
        assert world.kernel.times_named == 1

    in_world(run)


def test_a_backend_that_dies_before_it_serves_leaves_it_to_the_next(in_world: Callable[..., None]) -> None:
    async def run(world: World) -> None:
        await world.take_over()
        first = await world.attach()
        await world.greets(0)
        first.dies()
        await turn()
        assert world.kernel.times_named == 0
        await world.attach()
        await world.greets(1)
        assert world.kernel.times_named == 1

    in_world(run)


def test_udev_is_not_told_of_a_drained_disk_before_its_next_backend_serves(
    in_world: Callable[..., None],
) -> None:
    async def run(world: World) -> None:
        world.team.greeted(0, 1)
        # The earlier daemon died before the backend of the drained device had left.
        world.parts.backend.session = Obedient()
        await world.take_over(drained=True)
        assert world.parts.backend.session is None
        assert world.kernel.times_named == 0, "its requests are held"
        await world.device.resume()
        await turn()
        assert world.kernel.times_named == 0, "no backend is attached"
        await world.attach()
        assert world.kernel.times_named == 1

    in_world(run)


def test_udev_is_told_at_once_of_a_disk_whose_workers_answer(in_world: Callable[..., None]) -> None:
    async def run(world: World) -> None:
        await world.take_over()
        assert world.kernel.times_named == 1

    in_world(run, DeviceConfig(name="vol", size_bytes=SIZE_BYTES, answers="worker"))


@pytest.mark.parametrize("end", ["deleted", "failed"])
def test_udev_is_never_told_of_a_disk_that_ends_before(in_world: Callable[..., None], end: str) -> None:
    async def run(world: World) -> None:
        await world.take_over()
        before = len(asyncio.all_tasks())
        if end == "deleted":
            world.device._begin_to_end()
        else:
            world.device.note_failure("broken")
        await turn()
        assert world.kernel.times_named == 0
        assert len(asyncio.all_tasks()) < before, "the task that waited is over"

    in_world(run)
