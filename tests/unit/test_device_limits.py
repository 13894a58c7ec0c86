"""A device's limits in the daemon: from the config to the control segment, and lifted when the disk goes."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from support.fakes.device_parts import FakeKernel, fake_device
from ublkpool.bufpool.pool.arena import Arena, unlink_arena
from ublkpool.bufpool.pool.control import Limits
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.daemon.device import resources
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.limits import limits_of
from ublkpool.daemon.device.records import NotRecorded
from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.config import DeviceConfig

CONFIG = DeviceConfig(name="vol", size_bytes=1 << 20, iops_max=500, burst_s=0.25)
HELD = Limits(500, 0, 250_000_000)


@pytest.fixture
def arena() -> Iterator[Arena]:
    name = f"/ublkpool-limits{os.getpid()}-3"
    with Arena.create(name, Geometry.build([(4096, 2)]), queues=1, device_number=3, reserve=(1,)) as made:
        yield made
    unlink_arena(name)


def limited(arena: Arena) -> Device:
    """A device that serves from this pool."""
    device = fake_device(CONFIG)
    device.parts.resources.pool.begin(arena)
    device.parts.resources.set_limits(limits_of(CONFIG))
    return device


def test_a_config_without_limits_has_none_and_one_limit_brings_the_burst() -> None:
    assert limits_of(DeviceConfig(name="vol")) == Limits()
    assert limits_of(DeviceConfig(name="vol", bytes_per_s_max=1 << 20)) == Limits(0, 1 << 20, 100_000_000)
    assert limits_of(CONFIG) == HELD


def test_list_shows_the_limits_that_hold(arena: Arena) -> None:
    async def scenario() -> None:
        waiting = fake_device(CONFIG).status()
        assert (waiting.iops_max, waiting.bytes_per_s_max, waiting.burst_s) == (500, 0, 0.25)
        device = limited(arena)
        device.parts.resources.set_limits(Limits(7, 1 << 20, 10**9))
        shown = device.status()
        assert (shown.iops_max, shown.bytes_per_s_max, shown.burst_s) == (7, 1 << 20, 1.0)

    asyncio.run(scenario())


def test_the_machines_shutdown_lifts_the_limits(arena: Arena) -> None:
    async def run() -> None:
        device = limited(arena)
        device.lift_limits()
        assert arena.control.limits == Limits()

    asyncio.run(run())


def test_set_changes_the_limits_once_they_are_on_record(arena: Arena) -> None:
    async def scenario() -> None:
        device = limited(arena)
        device.parts.life.state = "live"
        recorded: list[Limits] = []

        def record() -> None:
            assert arena.control.limits == HELD
            recorded.append(limits_of(device.config))

        device.parts.save = record  # type: ignore[method-assign]
        await device.set({"iops_max": 0, "bytes_per_s_max": "1M"})
        assert recorded == [arena.control.limits] == [Limits(0, 1 << 20, HELD.burst_ns)]
        with pytest.raises(ConfigError, match="bytes_per_s_max: expected at least 65536"):
            await device.set({"bytes_per_s_max": 1})
        assert arena.control.limits == recorded[0]

    asyncio.run(scenario())


def test_what_cannot_be_recorded_leaves_the_limits_as_they_are(arena: Arena) -> None:
    async def scenario() -> None:
        device = limited(arena)
        device.parts.life.state = "live"

        def fail() -> None:
            raise NotRecorded("no room")

        device.parts.save = fail  # type: ignore[method-assign]
        with pytest.raises(NotRecorded):
            await device.set({"iops_max": 7})
        assert arena.control.limits == HELD

    asyncio.run(scenario())


class Stopping(FakeKernel):
    """A kernel device that notes the limits of the moment at which it is stopped."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena = arena
        self.during: list[Limits] = []
        self.goes = True

    async def stop(self, deadline_s: float) -> None:
        self.during.append(self.arena.control.limits)

    async def has_gone(self) -> bool:
        return self.goes

    async def try_stop(self, deadline_s: float) -> bool:
        while self.goes and self.arena.control.limits != Limits():
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        self.during.append(self.arena.control.limits)
        return self.goes


class Ending:
    """A team that ends at once."""

    def give_up(self) -> None:
        """There is no worker."""

    async def lost(self) -> None:
        """There is no worker."""

    async def end(self, patience_s: float) -> None:
        """There is no worker."""


def stopping(arena: Arena, goes: bool = True) -> tuple[Device, Stopping]:
    device, kernel = limited(arena), Stopping(arena)
    kernel.goes = goes
    device.parts.resources.kernel = kernel
    device.parts.resources.team = Ending()  # type: ignore[assignment]
    return device, kernel


def test_the_disk_is_stopped_without_limits(arena: Arena) -> None:
    async def scenario() -> None:
        device, kernel = stopping(arena)
        await device.parts.resources.stop()
        assert kernel.during == [Limits()]

    asyncio.run(scenario())


@pytest.mark.parametrize("goes", [True, False])
def test_a_disk_that_the_driver_may_refuse_to_stop_loses_its_limits_only_when_it_goes(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, goes: bool
) -> None:
    monkeypatch.setattr(resources, "GOING_POLL_S", 0)

    async def scenario() -> None:
        device, kernel = stopping(arena, goes)
        assert await device.parts.resources.try_stop() is goes
        assert kernel.during == [Limits() if goes else HELD]

    asyncio.run(scenario())
