"""A live device grows: what is refused, in which order it is done, and what is true after a kill at each step."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import pytest

from support.fakes.device_parts import SIZE_BYTES, FakeKernel, FakeSession, FakeTeam, fake_device, turn
from support.fakes.states import FakeStates
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.daemon.device import adoption
from ublkpool.daemon.device import resize as module
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.disk import Disk, check_fits, disk_of
from ublkpool.daemon.device.introduction import watch_backend
from ublkpool.daemon.device.records import NotRecorded, Record
from ublkpool.daemon.device.resize import repair_soon
from ublkpool.daemon.errors import ConfigError, DaemonError, status_of
from ublkpool.daemon.kernel import device_commands
from ublkpool.daemon.kernel.control_process import ControlFailed
from ublkpool.daemon.settings.config import DEVICE_BYTES_MAX, DeviceConfig
from ublkpool.daemon.status import ResizeResult
from ublkpool.ublk import control
from ublkpool.ublk.abi import DeviceInfo, DeviceState, Feature
from ublkpool.ublk.errors import UblkError

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


def test_store_state_record_and_disk_grow_in_this_order() -> None:
    world = World()
    assert grown(world) == ResizeResult(before_bytes=SIZE_BYTES, after_bytes=BIG)
    assert world.steps == ["store", "state", "record", "disk"]
    assert world.store_bytes == world.disk_bytes == BIG
    store = world.states.get("vol").store
    assert store is not None and (store.size_bytes, store.resized_bytes) == (BIG, BIG)


def test_a_relative_size_is_added() -> None:
    world = World()
    assert grown(world, SIZE_BYTES, is_relative=True).after_bytes == BIG
    assert world.disk_bytes == BIG


def test_the_present_size_changes_nothing() -> None:
    for size_bytes, is_relative in ((SIZE_BYTES, False), (0, True)):
        world = World()
        assert grown(world, size_bytes, is_relative) == ResizeResult(
            before_bytes=SIZE_BYTES, after_bytes=SIZE_BYTES
        )
        assert world.steps == []


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kill_at", ["store", "state", "record", "disk"])
def test_a_daemon_killed_at_any_step_leaves_one_size(kill_at: str, before: bool) -> None:
    world = World()
    world.kill_at, world.before = kill_at, before

    async def first() -> None:
        device = daemon_on(world, GrowingSession(world))
        await bound(device, world)
        with pytest.raises(Killed):
            await device.resize(BIG, False)

    async def next_life() -> None:
        device = daemon_on(world, GrowingSession(world))
        parts = device.parts
        repair_soon(parts)
        await turn()
        decided = kill_at in ("record", "disk") or (kill_at == "state" and not before)
        expected = BIG if decided else SIZE_BYTES
        assert parts.resources.disk is not None and parts.resources.disk.size_bytes == expected
        assert world.disk_bytes == expected == device.status().size_bytes
        assert device.describe().size_bytes == expected
        world.check()
        # A retry succeeds, whatever is done already.
        await bound(device, world)
        assert (await device.resize(BIG, False)).after_bytes == BIG
        assert world.disk_bytes == world.store_bytes == BIG
        world.check()

    in_loop(first)
    world.check()
    world.kill_at = ""
    in_loop(next_life)


@pytest.mark.parametrize(
    ("fail_at", "error", "reason"),
    [
        (
            "store",
            DaemonError("its backend file refuses: no space"),
            "vol: keeps its size: its backend file refuses: no space",
        ),
        ("state", DaemonError("state directory x: cannot write"), "state directory x: cannot write"),
        (
            "record",
            NotRecorded("y: cannot be written"),
            "are on record, and the disk has not been told: y: cannot",
        ),
        (
            "disk",
            ControlFailed("UPDATE_SIZE has hung", 0),
            "has not been told: UPDATE_SIZE has hung: try again with",
        ),
    ],
)
def test_a_step_that_fails_is_told_and_a_retry_succeeds(fail_at: str, error: Exception, reason: str) -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world, GrowingSession(world))
        await bound(device, world)
        world.fail_at = {fail_at: error}
        with pytest.raises(DaemonError, match=reason) as refused:
            await device.resize(BIG, False)
        assert "\n" not in str(refused.value)
        world.check()
        # A backend that attaches now is asked for what the record says.
        store = world.states.get("vol").store
        assert store is not None and device.describe().size_bytes == store.size_bytes
        world.fail_at = {}
        assert (await device.resize(BIG, False)) == ResizeResult(before_bytes=SIZE_BYTES, after_bytes=BIG)
        assert world.disk_bytes == BIG
        world.check()

    in_loop(run)


def test_a_resize_that_a_failed_one_left_waits_for_a_deletion_that_has_the_turn() -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world, GrowingSession(world))
        await bound(device, world)
        world.fail_at = {"disk": ControlFailed("UPDATE_SIZE has hung", 0)}
        with pytest.raises(DaemonError, match="has hung"):
            await device.resize(BIG, False)
        world.fail_at = {}
        world.steps.clear()
        async with device.parts.life.turn:
            again = asyncio.ensure_future(device.resize(BIG, False))
            await turn()
            assert not again.done()
            device.parts.life.is_stopping = True
        with pytest.raises(DaemonError, match="is being deleted"):
            await again
        assert world.steps == [] and world.disk_bytes == SIZE_BYTES

    in_loop(run)


@pytest.mark.parametrize("state", DeviceState)
def test_update_size_is_sent_only_for_a_disk(state: DeviceState, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    info = DeviceInfo(queues=1, depth=1, max_io_bytes=4096, device_number=3, server_pid=1, flags=Feature(0))
    monkeypatch.setattr(control, "disk_bytes", lambda number: SIZE_BYTES)
    monkeypatch.setattr(control, "device_info", lambda number: info._replace(state=state))
    monkeypatch.setattr(control, "update_size", lambda *sending: sent.append(sending))
    device_commands.grow(3, SIZE_BYTES)
    assert sent == []
    if state == DeviceState.DEAD:
        with pytest.raises(UblkError, match="UPDATE_SIZE of device 3: it has no disk any more"):
            device_commands.grow(3, BIG)
        assert sent == []
    else:
        device_commands.grow(3, BIG)
        assert sent == [(3, BIG)]


def test_a_backend_that_dies_while_its_store_grows_leaves_the_old_size() -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world, GrowingSession(world))
        await bound(device, world)
        world.fail_at = {"store": DaemonError("its backend file ended before it answered: try again")}
        with pytest.raises(DaemonError, match="ended before it answered: try again"):
            await device.resize(BIG, False)
        assert world.steps[-1] == "store" and world.disk_bytes == SIZE_BYTES

    in_loop(run)


def test_a_device_that_fails_while_its_store_grows_keeps_its_size() -> None:
    world = World()

    async def run() -> None:
        session = GrowingSession(world)
        device = daemon_on(world, session)
        await bound(device, world)

        async def fails(size_bytes: int, patience_s: float) -> None:
            device.parts.life.state = "recovering"

        session.resize = fails  # type: ignore[method-assign]
        with pytest.raises(DaemonError, match="is recovering: only a live one"):
            await device.resize(BIG, False)
        assert "state" not in world.steps and world.disk_bytes == SIZE_BYTES

    in_loop(run)


@pytest.mark.parametrize(
    ("size_bytes", "is_relative", "reason"),
    [
        (SIZE_BYTES - 512, False, "has 1M (1048576 bytes), and a device never shrinks"),
        (-4096, False, "never shrinks"),
        (-4096, True, "never shrinks"),
        (0, False, "never shrinks"),
        (SIZE_BYTES + 100, False, "1048676 bytes are no multiple of the device's block of 512 bytes"),
        (DEVICE_BYTES_MAX + 512, False, "more than a device can have"),
        (DEVICE_BYTES_MAX, True, "more than a device can have"),
    ],
)
def test_a_size_that_no_device_can_have_is_one_line_and_wrong_usage(
    size_bytes: int, is_relative: bool, reason: str
) -> None:
    world = World()
    with pytest.raises(ConfigError) as refused:
        grown(world, size_bytes, is_relative)
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    assert status_of(refused.value) == 2 and world.steps == []


def _without_feature(device: Device, world: World) -> None:
    device.parts.resources.kernel = GrowingKernel(world, Feature(0))


def _without_backend(device: Device, world: World) -> None:
    device.parts.backend.session = None


def _with_an_older_backend(device: Device, world: World) -> None:
    device.parts.backend.session = GrowingSession(world, resizes=False)


def _recovering(device: Device, world: World) -> None:
    device.parts.life.state = "recovering"


def _going(device: Device, world: World) -> None:
    device.parts.life.is_stopping = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            _without_feature,
            r"has no UPDATE_SIZE \(Linux 6.16 has\): unmount .* \(ublkpool del vol\), grow its store",
        ),
        (_without_backend, "no backend is attached whose store could grow: try again"),
        (
            _with_an_older_backend,
            r"its backend file cannot grow its store .*delete the device \(ublkpool del vol\)",
        ),
        (_recovering, "the device is recovering: only a live one is resized"),
        (_going, "the device is being deleted: only a live one"),
    ],
)
def test_what_is_missing_is_named_with_the_way_out(
    change: Callable[[Device, World], None], reason: str
) -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world, GrowingSession(world))
        await bound(device, world)
        world.steps.clear()
        change(device, world)
        with pytest.raises(DaemonError, match=reason) as refused:
            await device.resize(BIG, False)
        assert "\n" not in str(refused.value) and world.steps == []

    in_loop(run)


def test_workers_that_answer_need_no_store() -> None:
    world = World()
    world.store_bytes = BIG

    async def run() -> None:
        device = daemon_on(world, None, answers="worker")
        await bound(device, world)
        await device.resize(BIG, False)
        assert world.steps == ["state", "record", "disk"] and world.disk_bytes == BIG

    in_loop(run)


# Announcements


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
        _without_feature(device, world)
        session = GrowingSession(world)
        await device.attach(session)
        session.on_grown(BIG)
        await turn()
        assert world.disk_bytes == SIZE_BYTES

    in_loop(run)
    assert caplog.text.count("has no UPDATE_SIZE") == 1


# The record and the config


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
