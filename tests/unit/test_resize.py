"""A live device grows: what is refused, in which order it is done, and what is true after a kill at each step."""

import asyncio
from collections.abc import Callable

import pytest

from support.fakes.device_parts import SIZE_BYTES, turn
from support.fakes.growing import (
    BIG,
    BIGGER,
    GrowingSession,
    Killed,
    World,
    bound,
    daemon_on,
    grown,
    in_loop,
    runs_inside,
    without_feature,
)
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.records import NotRecorded
from ublkpool.daemon.device.resize import follow_growth, repair_soon
from ublkpool.daemon.errors import ConfigError, DaemonError, status_of
from ublkpool.daemon.kernel import device_commands
from ublkpool.daemon.kernel.control_process import ControlFailed
from ublkpool.daemon.settings.config import DEVICE_BYTES_MAX
from ublkpool.daemon.status import ResizeResult
from ublkpool.ublk import control
from ublkpool.ublk.abi import DeviceInfo, DeviceState, Feature
from ublkpool.ublk.errors import UblkError


def test_store_state_record_and_disk_grow_in_this_order() -> None:
    world = World()
    assert grown(world) == ResizeResult(before_bytes=SIZE_BYTES, after_bytes=BIG)
    assert world.steps == ["store", "state", "record", "disk"]
    assert world.store_bytes == world.disk_bytes == BIG
    store = world.states.get("vol").store
    assert store is not None and (store.size_bytes, store.resized_bytes) == (BIG, BIG)


def test_workers_that_run_the_engine_know_the_size_before_it_is_on_record() -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world)
        runs_inside(device, world)
        await bound(device, world)
        assert (await device.resize(BIG, False)).after_bytes == BIG
        assert world.steps == ["store", "engines", "state", "record", "disk"]
        world.check()

    in_loop(run)


def test_a_worker_that_is_connected_to_its_store_has_that_grow_itself() -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world)
        team = runs_inside(device, world, connects=True)
        await bound(device, world)
        assert (await device.resize(BIG, False)).after_bytes == BIG
        assert world.steps == ["store", "state", "record", "disk"]
        world.check()
        team.can_grow = False
        with pytest.raises(DaemonError, match="vol: keeps its size: its workers run an earlier version"):
            await device.resize(BIGGER, False)

    in_loop(run)


def test_a_device_follows_a_store_that_grows_under_its_connected_worker() -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world)
        team = runs_inside(device, world, connects=True)
        await bound(device, world)
        follow_growth(device.parts)
        team.store_grows(BIG + 100)
        while world.disk_bytes < BIG:
            await asyncio.sleep(0)
        assert world.steps == ["state", "record", "disk"] and world.disk_bytes == BIG
        world.check()

    in_loop(run)


def test_a_store_that_grows_after_the_command_has_given_up_takes_the_device_with_it() -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world)
        team = runs_inside(device, world, connects=True)
        await bound(device, world)
        follow_growth(device.parts)
        world.fail_at = {"store": DaemonError("its store has not grown within 60 s")}
        with pytest.raises(DaemonError, match="vol: keeps its size: its store has not grown"):
            await device.resize(BIG, False)
        world.fail_at = {}
        team.store_grows(BIG)
        while world.disk_bytes < BIG:
            await asyncio.sleep(0)
        assert world.steps == ["store", "state", "record", "disk"]
        world.check()

    in_loop(run)


@pytest.mark.parametrize("connects", [False, True])
def test_only_a_store_that_is_a_connection_grows_by_itself(connects: bool) -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world)
        team = runs_inside(device, world, connects)
        follow_growth(device.parts)
        assert len(team.hear) == connects

    in_loop(run)


def test_growth_that_replaced_workers_told_leaves_the_size(caplog: pytest.LogCaptureFixture) -> None:
    world = World()

    async def run() -> None:
        device = daemon_on(world)
        dead = runs_inside(device, world, connects=True)
        await bound(device, world)
        follow_growth(device.parts)
        team = runs_inside(device, world, connects=True)
        dead.store_grows(BIG)
        while "are gone: try again" not in caplog.text:
            await asyncio.sleep(0)
        assert world.disk_bytes == SIZE_BYTES and world.steps == []
        follow_growth(device.parts)
        team.store_grows(BIG)
        while world.disk_bytes < BIG:
            await asyncio.sleep(0)
        world.check()

    in_loop(run)


def test_a_store_that_grew_for_workers_that_were_replaced_leaves_the_size() -> None:
    """The next epoch's workers were forked with the old size."""
    world = World()

    async def run() -> None:
        device = daemon_on(world)
        runs_inside(device, world)
        await bound(device, world)
        async with device.parts.life.turn:
            resize = asyncio.ensure_future(device.resize(BIG, False))
            await turn()
            assert world.steps == ["store", "engines"]
            runs_inside(device, world)
        with pytest.raises(DaemonError, match="vol: keeps its size: the workers whose store grew are gone"):
            await resize
        assert world.disk_bytes == SIZE_BYTES
        world.check()
        assert (await device.resize(BIG, False)).after_bytes == BIG

    in_loop(run)


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
            without_feature,
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
