"""Which size a device has: of stores that grow by themselves, on record against the config, after a rebind."""

import asyncio
from typing import Any

import pytest

from support.fakes.device_parts import SIZE_BYTES, FakeSession, turn
from support.fakes.growing import (
    BIG,
    BIGGER,
    GrowingSession,
    World,
    bound,
    daemon_on,
    grown,
    in_loop,
    without_feature,
)
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.daemon.device import resize as module
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.disk import Disk, check_fits, disk_of
from ublkpool.daemon.device.introduction import watch_backend
from ublkpool.daemon.errors import DaemonError


def test_a_store_that_grows_by_itself_takes_the_device_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANNOUNCE_PAUSE_S", 0.0)
    world = World()

    async def run() -> None:
        session = GrowingSession(world)
        device = daemon_on(world)
        await bound(device, world)
        await device.attach(session)
        world.steps.clear()
        world.store_bytes = BIGGER + 100
        session.on_grown(BIG)
        session.on_grown(BIGGER + 100)
        await turn()
        assert world.disk_bytes == BIGGER and world.steps == ["state", "record", "disk"]
        session.on_grown(BIG)
        await turn()
        assert world.disk_bytes == BIGGER, "a smaller size is no news"
        world.check()

    in_loop(run)


@pytest.mark.parametrize("announced_bytes", [0, BIG])
def test_an_announcement_from_before_the_takeover_of_its_device_is_followed(announced_bytes: int) -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world)
        await bound(device, world)
        # An adopted session reads before its device watches it.
        session = device.parts.backend.session = GrowingSession(world)
        session.grown_bytes = announced_bytes
        world.steps.clear()
        watch_backend(device.parts, session, device._fail)
        await turn()
        assert world.disk_bytes == (announced_bytes or SIZE_BYTES)
        assert world.steps == (["state", "record", "disk"] if announced_bytes else [])
        # The announcement pauses, and must not outlive the loop.
        device.parts.background.cancel()

    in_loop(run)


@pytest.mark.parametrize("has_successor", [True, False])
def test_the_announcement_of_a_dead_backend_grows_no_device(
    has_successor: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "ANNOUNCE_PAUSE_S", 0.0)
    world = World()

    async def run() -> None:
        device = daemon_on(world)
        await bound(device, world)
        dead = GrowingSession(world)
        await device.attach(dead)
        world.steps.clear()
        # The announcement is followed when the device is live, or when it has its turn.
        device.parts.life.state = "recovering" if has_successor else "live"
        async with device.parts.life.turn:
            dead.on_grown(BIGGER)
            await turn()
            dead.dies()
            await turn()
        if has_successor:
            await device.attach(GrowingSession(world))
            device.parts.enter("live")
        await turn()
        store = device.parts.binding.store
        assert store is not None and store.size_bytes == SIZE_BYTES == world.disk_bytes
        assert "disk" not in world.steps and device.status().size_bytes == SIZE_BYTES

    in_loop(run)
    assert caplog.text.count("the backend whose store grew is gone") == 1


def test_a_backend_that_dies_when_its_store_has_grown_leaves_the_old_size() -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world)
        await bound(device, world)
        session = GrowingSession(world)
        await device.attach(session)
        world.steps.clear()
        async with device.parts.life.turn:
            resizing = asyncio.ensure_future(device.resize(BIG, False))
            await turn()
            assert world.steps == ["store"]
            session.dies()
            await turn()
        with pytest.raises(DaemonError, match="the backend whose store grew is gone: try again"):
            await resizing
        await device.attach(GrowingSession(world))
        assert (await device.resize(BIG, False)).after_bytes == BIG
        world.check()

    in_loop(run)


def test_an_announcement_that_cannot_be_followed_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "ANNOUNCE_PAUSE_S", 0.0)
    world = World()

    async def run() -> None:
        device = daemon_on(world)
        await bound(device, world)
        without_feature(device, world)
        session = GrowingSession(world)
        await device.attach(session)
        session.on_grown(BIG)
        await turn()
        assert world.disk_bytes == SIZE_BYTES

    in_loop(run)
    assert caplog.text.count("has no UPDATE_SIZE") == 1


def test_the_size_on_record_wins_over_the_config_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    world = World()
    grown(world)

    async def next_start() -> None:
        world.record = None
        device = daemon_on(world)
        device.parts.life.state = "waiting"
        device.parts.resources.disk = None
        described, status = device.describe(), device.status()
        assert (described.size_bytes, described.resized_bytes) == (BIG, BIG)
        assert (status.size_bytes, status.config_size_bytes) == (BIG, SIZE_BYTES)
        # The config's size may have been raised since.
        larger = daemon_on(world, size_bytes=BIGGER)
        larger.parts.resources.disk = None
        assert (larger.describe().size_bytes, larger.status().config_size_bytes) == (BIGGER, None)

    in_loop(next_start)

    async def taken_over() -> None:
        world.record = Disk(size_bytes=SIZE_BYTES, block_bytes=512, volatile_cache=False, read_only=False)
        device = daemon_on(world)
        device.parts.tell_size()
        assert device.status().config_size_bytes == SIZE_BYTES

    in_loop(taken_over)
    assert (
        f"its size on record, {BIG} bytes, is used, and not the config's {SIZE_BYTES}: it was resized"
        in caplog.text
    )


def test_a_backend_with_less_than_the_size_on_record_is_refused() -> None:
    world = World()
    grown(world)

    async def run() -> None:
        device = daemon_on(world)
        small = FakeSession()
        small.attach = wire.Attach(v=1, device="vol", kind="file", size_bytes=SIZE_BYTES)
        with pytest.raises(Exception, match=f"device vol has {BIG} bytes, this backend only {SIZE_BYTES}"):
            await device.attach(small)

    in_loop(run)


def _cold(world: World, **config: Any) -> Device:
    """A daemon that starts with nothing but the state directory."""
    world.record = None
    device = daemon_on(world, **config)
    device.parts.life.state = "waiting"
    device.parts.resources.disk = device.parts.resources.team = None
    return device


def test_a_copy_that_rebind_accepts_is_served_with_the_size_on_record() -> None:
    world = World()
    grown(world)

    async def run() -> None:
        device = _cold(world)
        await device.rebind()
        described = device.describe()
        assert (described.takes_next, described.resized_bytes) == (True, BIG)
        assert device.status().size_bytes == BIG
        copy = wire.Attach(
            v=1, device="vol", kind="file", size_bytes=BIG, identity=wire.Identity(value="file:copy")
        )
        await device._bind(copy)
        store = world.states.get("vol").store
        assert store is not None and (store.size_bytes, store.resized_bytes) == (BIG, BIG)
        assert disk_of(device.config, copy, device.parts.binding.resized_bytes).size_bytes == BIG

    in_loop(run)


@pytest.mark.parametrize("offered_bytes", [SIZE_BYTES, SIZE_BYTES + 4096])
def test_rebind_accepts_a_store_that_a_resize_has_not_reached(offered_bytes: int) -> None:
    world = World()
    grown(world)

    async def run() -> None:
        device = _cold(world)
        await device.rebind()
        assert device.describe().size_bytes == SIZE_BYTES
        earlier = wire.Attach(v=1, device="vol", kind="file", size_bytes=offered_bytes)
        check_fits(device.config, None, earlier, device.parts.binding.resized_for(earlier))
        await device._bind(earlier)
        store = world.states.get("vol").store
        assert store is not None and (store.size_bytes, store.resized_bytes) == (offered_bytes,) * 2

    in_loop(run)


def test_a_store_below_the_configs_size_is_refused_after_rebind_too() -> None:
    world = World()
    grown(world)

    async def run() -> None:
        device = _cold(world)
        await device.rebind()
        small = FakeSession()
        small.attach = wire.Attach(v=1, device="vol", kind="file", size_bytes=SIZE_BYTES - 4096)
        with pytest.raises(AttachRefused, match=f"has {SIZE_BYTES} bytes, this backend only"):
            await device.attach(small)

    in_loop(run)
