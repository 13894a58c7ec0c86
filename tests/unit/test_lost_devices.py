"""Kernel devices of this daemon's that no record tells of: named at the start, deleted by name, never by the daemon."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from support.fakes.device_parts import FakeKernel, fake_context
from ublkpool.daemon import lost_devices
from ublkpool.daemon.device import teardown
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import device_commands, disk_users
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import ControlFailed, ControlRunner
from ublkpool.daemon.kernel.device_commands import Owned, find_owned, new_mark
from ublkpool.daemon.kernel.disk_use import Users
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.supervisor import Supervisor
from ublkpool.ublk import control
from ublkpool.ublk.abi import DeviceInfo, DeviceState
from ublkpool.ublk.errors import UblkError

T = TypeVar("T")
DEADLINE_S = 60


def test_the_driver_s_devices_of_this_daemon_are_told_from_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marks = {0: new_mark("ours"), 1: new_mark("theirs"), 2: 0, 3: new_mark("ours"), 4: 2**63 - 1}

    def info(number: int) -> DeviceInfo:
        if number == 3:
            raise UblkError("just deleted", errno.ENODEV)
        return DeviceInfo(
            queues=1,
            depth=1,
            state=DeviceState.LIVE,
            max_io_bytes=4096,
            device_number=number,
            server_pid=7,
            server_flags=marks[number],
        )

    monkeypatch.setattr(control, "device_info", info)
    monkeypatch.setattr(Path, "glob", lambda *_: [Path(f"/dev/ublkc{each}") for each in (*marks, "-control")])
    assert find_owned("ours") == [Owned(0, marks[0], 7, DeviceState.LIVE)]
    assert device_commands.find_marked(marks[1]) == 1 and device_commands.find_marked(5) == -1


def test_a_mark_fits_the_driver_s_field_and_is_new_each_time() -> None:
    marks = {new_mark(instance) for instance in ("a", "b", "c") for _ in range(100)}
    assert len(marks) == 300 and all(0 < each < 1 << 63 for each in marks)


class Driver(ControlRunner):
    """Answers the look for owned devices."""

    def __init__(self, owned: list[Owned]) -> None:
        super().__init__()
        self.owned = owned
        self.looks = 0
        self.before_second: Callable[[], None] = lambda: None
        self.refuses = False

    async def run(self, what: str, command: Callable[[], Any], result: type[T], deadline_s: float = 0.0) -> T:
        self.looks += 1
        if self.looks == 2:
            self.before_second()
        if self.refuses:
            raise ControlFailed(f"{what} has hung for 60 s", 0)
        found: Any = list(self.owned)
        return found  # type: ignore[no-any-return]


class LeftKernel(FakeKernel):
    """The kernel's device 3."""

    users_of_it = Users()
    steps: list[str]

    @classmethod
    async def find(cls, *asked: object) -> BlockDevice:
        assert asked[2:] == (3, 77)
        return cls()

    @property
    def can_try_stop(self) -> bool:
        return True

    async def try_stop(self, deadline_s: float) -> bool:
        self.steps.append("try")
        return True

    async def users(self, deadline_s: float = 0) -> Users:
        return self.users_of_it

    async def is_claimed(self, deadline_s: float = 0) -> bool:
        return False

    async def stop(self, deadline_s: float) -> None:
        self.steps.append("stop")

    async def delete(self) -> None:
        self.steps.append("delete")


class Scene:
    """A daemon without devices, and a driver that has device 3 of it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: DeviceState = DeviceState.QUIESCED
    ) -> None:
        self.driver = Driver([Owned(3, 77, 4711, state)])
        self.steps: list[str] = []
        monkeypatch.setattr(LeftKernel, "steps", self.steps, raising=False)
        monkeypatch.setattr(teardown, "BlockDevice", LeftKernel)
        monkeypatch.setattr(disk_users, "PATIENCE_S", -1.0)
        context = fake_context()
        context.runner, context.run_dir = self.driver, tmp_path
        self.supervisor = Supervisor(context, Background("unit"))


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (DeviceState.DEAD, "it has no disk"),
        (DeviceState.LIVE, "unmount it"),
        (DeviceState.QUIESCED, "unmount it"),
        (DeviceState.FAIL_IO, "unmount it"),
    ],
)
def test_a_lost_device_is_named_with_the_way_out_and_left_alone(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    state: DeviceState,
    words: str,
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch, tmp_path, state)
        await scene.supervisor.lost.report()
        (said,) = [each.getMessage() for each in caplog.records]
        assert "kernel device 3" in said and "process 4711" in said and words in said
        assert "ublkpool del lost-3" in said
        assert await scene.supervisor.delete(None, force=False) == []
        await scene.supervisor.delete_all()
        assert scene.steps == [] and scene.supervisor.list() == []

    in_loop(run)


def test_a_device_that_this_daemon_has_or_has_just_removed_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch, tmp_path)
        scene.driver.before_second = scene.driver.owned.clear
        await scene.supervisor.lost.report()
        assert scene.driver.looks == 2
        scene = Scene(monkeypatch, tmp_path)
        lost = lost_devices.LostDevices(scene.supervisor._context, lambda: {77})
        await lost.report()
        assert caplog.text == ""

    in_loop(run)


def test_a_driver_that_does_not_answer_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch, tmp_path)
        scene.driver.refuses = True
        await scene.supervisor.lost.report()
        assert "has hung" in caplog.text

    in_loop(run)


def test_a_lost_device_is_deleted_by_its_name_unless_it_is_in_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch, tmp_path)
        with pytest.raises(DaemonError, match="no device 'lost-4'") as unknown:
            await scene.supervisor.delete(["lost-4"], force=False)
        assert unknown.value.code == "no-device"
        monkeypatch.setattr(LeftKernel, "users_of_it", Users(lasting=("mounted at /srv",)))
        with pytest.raises(DaemonError, match="mounted at /srv") as in_use:
            await scene.supervisor.delete(["lost-3"], force=False)
        assert in_use.value.code == "in-use"
        assert scene.steps == [] and scene.supervisor.list() == [], (
            "no later step of the daemon takes it away"
        )
        monkeypatch.setattr(LeftKernel, "users_of_it", Users())
        assert await scene.supervisor.delete(["lost-3"], force=False) == ["lost-3"]
        assert scene.steps == ["try", "stop", "delete"] and scene.supervisor.list() == []
        monkeypatch.setattr(LeftKernel, "users_of_it", Users(lasting=("mounted at /srv",)))
        await scene.supervisor.delete(["lost-3"], force=True)
        assert scene.steps[3:] == ["stop", "delete"]

    in_loop(run)


def test_the_mark_of_a_device_is_known_before_its_takeover(tmp_path: Path) -> None:
    async def run() -> None:
        record = Record(config=DeviceConfig(name="vol"), device_number=3, device_mark=77)
        device = Device(record.config, fake_context())
        assert device.mark == 0
        device.await_takeover(record)
        assert device.mark == 77
        device.parts.left = None
        device.parts.resources.mark = 78
        assert device.mark == 78

    in_loop(run)
