"""An `add` that fails at any step leaves nothing: each step fails once, and the cleaning up does not depend on it."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from support.fakes.step_machine import ATTACH, Machine, StepHolder, StepKernel, a_device
from ublkpool.daemon.device import teardown
from ublkpool.daemon.device.build import build
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.table import DeviceTable
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import disk_users

DEADLINE_S = 60
STEPS = (
    "record before ADD_DEV",
    "ADD_DEV",
    "ADD_DEV after the kernel has made it",
    "record after ADD_DEV",
    "pool",
    "holding the pool",
    "client area",
    "registering the area",
    "holding the area",
    "leases",
    "record before the fork",
    "fork",
    "fork of a second worker",
    "record after the fork",
    "holding a worker",
    "ready",
)


async def start(device: Device) -> None:
    """Start the device as for a backend that attaches, up to its introduction to the workers."""
    async with device.parts.life.turn:
        await device._start(ATTACH, None)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))


@pytest.mark.parametrize("gives_up", [False, True])
@pytest.mark.parametrize("failing", STEPS)
def test_an_add_that_fails_at_any_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, gives_up: bool
) -> None:
    async def run() -> None:
        machine = Machine(tmp_path, failing, gives_up)
        device = a_device(machine, monkeypatch)
        with pytest.raises((DaemonError, OSError, asyncio.CancelledError)):
            await start(device)
        assert machine.passed[-1] == failing or failing in machine.passed
        assert machine.left() == []
        await device.delete(force=True)
        assert machine.left() == []

    in_loop(run)


def test_an_add_passes_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        machine = Machine(tmp_path, "none")
        device = a_device(machine, monkeypatch)

        async def go_live(_team: object) -> None:
            device.parts.enter("live")

        monkeypatch.setattr(device, "_go_live", go_live)
        await start(device)
        assert tuple(dict.fromkeys(machine.passed)) == STEPS
        await device.delete(force=True)
        assert machine.left() == []

    in_loop(run)


def test_a_kernel_device_that_stays_is_on_record_and_the_next_del_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        machine = Machine(tmp_path, "pool")
        machine.delete_failures = 2
        device = a_device(machine, monkeypatch)
        with pytest.raises(OSError):
            await start(device)
        assert device.state == "failed" and "its device is still there" in device.reason
        (record,) = machine.records.load()
        assert (record.device_number, record.device_mark) == (3, machine.kernel[3])
        with pytest.raises(DaemonError, match="DEL_DEV has hung"):
            await device.delete(force=True)
        assert machine.left() == ["kernel device 3", "vol"]
        await device.delete(force=True)
        assert machine.left() == []

    in_loop(run)


def test_what_a_daemon_that_was_killed_had_begun_to_add_is_found_by_its_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        machine = Machine(tmp_path, "record after ADD_DEV")
        killed = a_device(machine, monkeypatch)
        with pytest.raises(OSError):
            await build(killed.parts, ATTACH)
        assert machine.kernel
        machine.kernel[7] = 12345
        (record,) = machine.records.load()
        assert record.device_number is None
        machine.failing = ""
        adopted = a_device(machine, monkeypatch)
        adopted.await_takeover(record)
        assert not await adopted.recover_left(record, {})
        assert machine.left() == ["kernel device 7"], "another server's device stays"

    in_loop(run)


@pytest.mark.parametrize("left", ["a DEL_DEV that failed", "a takeover that failed"])
def test_an_add_over_a_failed_device_removes_what_the_kernel_has_of_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    async def run() -> None:
        machine = Machine(tmp_path, "pool")
        made = [a_device(machine, monkeypatch)]
        monkeypatch.setattr(teardown, "BlockDevice", StepKernel)
        monkeypatch.setattr(disk_users, "check_unused", no_user)
        table = DeviceTable(lambda _config: made[-1], lambda: None)
        if left == "a DEL_DEV that failed":
            machine.delete_failures = 2
            with pytest.raises(OSError):
                await start(made[0])
            table._enter(made[0].config, None)
        else:
            machine.failing = ""
            await build(made[0].parts, ATTACH)
            (record,) = machine.records.load()
            record = msgspec.structs.replace(record, processes=())
            made.append(a_device(machine, monkeypatch))

            async def fails(_show: object) -> bool:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

            await table.take_over(record, fails)
        assert table.device("vol").state == "failed" and list(machine.kernel) == [3]
        machine.failing = ""
        made.append(a_device(machine, monkeypatch))

        async def runs() -> None:
            await build(made[-1].parts, ATTACH)
            made[-1].parts.enter("live")

        monkeypatch.setattr(made[-1], "run", runs)
        if machine.delete_failures:
            with pytest.raises(DaemonError, match="the failed device of this name is still there: DEL_DEV"):
                await table.add(made[-1].config, lambda _: None)
            assert list(machine.kernel) == [3] == [each.device_number for each in machine.records.load()]
        await table.add(made[-1].config, lambda _: None)
        assert list(machine.kernel) == [each.device_number for each in machine.records.load()] == [3]
        await table.delete("vol", force=True)
        assert machine.left() == []

    in_loop(run)


async def no_user(*_: object, may_open: bool) -> None:
    """The disk is unused."""


def test_the_holder_lets_go_of_a_device_while_it_is_still_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that is killed in between would leave what no later daemon drops."""
    on_record: list[bool] = []

    async def run() -> None:
        machine = Machine(tmp_path, "", False)
        device = a_device(machine, monkeypatch)
        await start(device)
        drop = StepHolder.drop

        def noted(holder: StepHolder, name: str) -> None:
            if name == "vol":
                on_record.append(bool(device.parts.context.records.load()))
            drop(holder, name)

        monkeypatch.setattr(StepHolder, "drop", noted)
        await device.delete(force=True)
        assert device.parts.context.records.load() == [] and not machine.held

    in_loop(run)
    assert on_record == [True]
