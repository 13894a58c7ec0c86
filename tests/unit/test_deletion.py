"""`del` of a device: the order of its checks, and that a refusal changes nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar

import pytest

from support.fakes.device_parts import FakeKernel, fake_context, fake_device
from ublkpool.daemon.device import device as module
from ublkpool.daemon.device import teardown
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.device.table import DeviceTable
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import disk_users as in_use
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import ControlFailed
from ublkpool.daemon.kernel.disk_use import Users
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import Drain, State
from ublkpool.daemon.supervisor import Supervisor


class Kernel(FakeKernel):
    """A disk with users that a test sets, and a driver that counts openers or does not."""

    def __init__(self, log: list[str], newer: bool) -> None:
        super().__init__()
        self._log, self._newer = log, newer
        self.seen = Users()
        self.openers = 0

    @property
    def can_try_stop(self) -> bool:
        return self._newer

    async def users(self, deadline_s: float = 0) -> Users:
        await asyncio.sleep(0)
        self._log.append("look")
        return self.seen

    async def is_claimed(self, deadline_s: float = 0) -> bool:
        self._log.append("open")
        return False

    async def mappers(self) -> Users:
        return Users()

    async def try_stop(self, deadline_s: float) -> bool:
        self._log.append("try")
        return not self.openers


class Scene:
    """A device in some state, with everything below it made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, newer: bool = True, state: State = "live") -> None:
        monkeypatch.setattr(in_use, "PATIENCE_S", -1.0)
        monkeypatch.setattr(module, "drop_kept", self._drop_kept)
        monkeypatch.setattr(teardown, "tear_down", self._tear_down)
        self.log: list[str] = []
        self.kernel = Kernel(self.log, newer)
        self.device = fake_device()
        self.device.parts.resources.kernel = self.kernel
        self.device.parts.life.state = state
        monkeypatch.setattr(self.device.parts.resources, "try_stop", self._try_stop)

    async def _try_stop(self) -> bool:
        assert self.device.parts.life.turn.locked() and not self.device.parts.life.is_stopping
        self.log.append("try")
        return not self.kernel.openers

    async def _tear_down(self, _parts: object, _keep: bool) -> None:
        assert self.device.parts.life.turn.locked() and self.device.parts.life.is_stopping
        self.log.append("tear down")

    async def _drop_kept(self, _path: Path) -> None:
        """No memory is kept."""

    async def refusal(self) -> str:
        with pytest.raises(DaemonError) as caught:
            await self.device.delete(force=False)
        life = self.device.parts.life
        assert not life.is_stopping and not life.turn.locked() and "tear down" not in self.log
        return str(caught.value)


def play(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_where_the_driver_counts_openers_it_stops_the_disk_before_anything_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        await scene.device.delete(force=False)
        # No look at all processes, of which a thousand devices have thousands.
        assert scene.log == ["open", "try", "tear down"]
        scene = Scene(monkeypatch, newer=False)
        await scene.device.delete(force=False)
        assert scene.log == ["look", "open", "tear down"]

    play(run)


def test_an_opener_that_only_the_driver_sees_is_a_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        scene.kernel.openers = 1
        assert "in use" in await scene.refusal()
        assert scene.log == ["open", "try", "look", "open", "try", "look"]
        scene.kernel.openers = 0
        await scene.device.delete(force=False)

    play(run)


@pytest.mark.parametrize(("drain", "is_under_way"), [("", True), ("draining", True), ("drained", False)])
def test_a_drain_goes_on_if_the_deletion_is_refused(
    monkeypatch: pytest.MonkeyPatch, drain: Drain, is_under_way: bool
) -> None:
    async def run() -> None:
        scene, drained = Scene(monkeypatch), asyncio.Event()
        # A drain that waits for the device's turn is only a task.
        scene.device.parts.draining = asyncio.create_task(_set(drained))
        if not is_under_way:
            await scene.device.parts.draining
        scene.device.parts.hold(drain)
        scene.kernel.seen = Users(lasting=("mounted at /srv",))
        assert "mounted at /srv" in await scene.refusal()
        assert scene.log == ["look"]
        await asyncio.wait_for(drained.wait(), 60)

    play(run)


async def _set(event: asyncio.Event) -> None:
    for _ in range(100):
        await asyncio.sleep(0)
    event.set()


def test_a_disk_with_requests_in_flight_is_looked_at_first_because_the_driver_may_wait_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        monkeypatch.setattr(scene.device.parts.resources, "counted", {"in_flight": 1}.__getitem__)
        scene.kernel.seen = Users(openers=("process 7 (blockdev) has it open",))
        assert "process 7" in await scene.refusal()
        assert scene.log == ["look"]

    play(run)


def test_a_disk_that_does_not_answer_is_not_stopped_and_the_refusal_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRY_STOP_DEV would wait for the same mutex, and may stop the disk after its caller has given up."""

    async def run() -> None:
        scene = Scene(monkeypatch)

        async def hangs(deadline_s: float = 0) -> bool:
            raise ControlFailed("opening /dev/ublkb0 has hung for 20 s", 0)

        monkeypatch.setattr(scene.kernel, "is_claimed", hangs)
        said = await scene.refusal()
        assert "has hung" in said and said.endswith("use --force") and scene.log == []
        scene = Scene(monkeypatch)

        async def waits() -> bool:
            raise ControlFailed("TRY_STOP_DEV has hung for 60 s", 0)

        monkeypatch.setattr(scene.device.parts.resources, "try_stop", waits)
        said = await scene.refusal()
        assert "TRY_STOP_DEV has hung" in said and said.endswith("use --force")

    play(run)


def test_an_idle_device_that_changes_while_its_deletion_waits_for_the_turn_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        async with scene.device.parts.life.turn:
            deleting = asyncio.ensure_future(scene.refusal())
            while "open" not in scene.log:
                await asyncio.sleep(0)
            scene.device.parts.life.state = "recovering"
            scene.kernel.seen = Users(openers=("process 7 (cat) has it open",))
        assert "process 7" in await deleting
        assert "try" not in scene.log

    play(run)


def test_a_lent_buffer_counts_after_the_openers_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        scene.kernel.openers = 1
        names: list[str] = []
        monkeypatch.setattr(scene.device.parts.clients, "names", lambda: names)

        async def users(deadline_s: float = 0) -> Users:
            scene.kernel.openers = 0
            names.append("client 9")
            return Users()

        monkeypatch.setattr(scene.kernel, "users", users)
        assert "client buffers are in use: client 9" in await scene.refusal()
        assert scene.log == ["open", "try", "open"]

    play(run)


def test_a_user_that_the_driver_counts_is_looked_for_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        scene.kernel.openers, scene.kernel.seen = 1, Users(lasting=("mounted at /srv",))
        assert "mounted at /srv" in await scene.refusal()
        # The look has found a user, so the driver is not asked again.
        assert scene.log == ["open", "try", "look"]

    play(run)


def test_force_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        scene.kernel.seen = Users(lasting=("mounted at /srv",))
        await scene.device.delete(force=True)
        assert scene.log == ["tear down"]

    play(run)


@pytest.mark.parametrize("state", ["recovering", "quiesced"])
def test_a_disk_that_is_being_recovered_is_in_use_like_any_other(
    monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch, state=state)
        scene.kernel.seen = Users(openers=("process 7 (cat) has it open",))
        assert "process 7" in await scene.refusal()

    play(run)


class Found(BlockDevice):
    """The kernel has the disk of device 3, mounted at /srv or not, or it does not answer."""

    users_of_it = Users()
    answers = True
    newer = True
    openers = 0
    asked: ClassVar[list[str]] = []

    @classmethod
    async def find(cls, *asked: object) -> BlockDevice:
        assert asked[2:] == (3, 77)
        if not cls.answers:
            raise ControlFailed("vol: GET_DEV_INFO has hung for 60 s", 0)
        kernel = Kernel(cls.asked, cls.newer)
        kernel.seen, kernel.openers = cls.users_of_it, cls.openers
        return kernel


@pytest.mark.parametrize("failed", [False, True])
def test_a_disk_that_an_earlier_daemon_left_is_in_use_like_any_other(
    monkeypatch: pytest.MonkeyPatch, failed: bool
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        scene.device.parts.resources.kernel = None
        monkeypatch.setattr(teardown, "BlockDevice", Found)
        scene.device.await_takeover(Record(config=scene.device.config, device_number=3, device_mark=77))
        if failed:
            scene.device.note_failure("left by an earlier daemon: the pool needs 5 GiB")
        monkeypatch.setattr(Found, "users_of_it", Users(lasting=("mounted at /srv",)))
        assert "mounted at /srv" in await scene.refusal()
        monkeypatch.setattr(Found, "answers", False)
        refusal = await scene.refusal()
        assert "GET_DEV_INFO has hung" in refusal and "--force" in refusal
        await scene.device.delete(force=True)
        assert scene.log == ["tear down"]
        monkeypatch.setattr(Found, "answers", True)
        monkeypatch.setattr(Found, "users_of_it", Users())
        await scene.device.delete(force=False)
        assert scene.log == ["tear down"] * 2

    play(run)


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("newer", [False, True])
def test_the_driver_stops_a_disk_that_was_left_only_if_it_has_no_openers(
    monkeypatch: pytest.MonkeyPatch, newer: bool, failed: bool
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        scene.device.parts.resources.kernel = None
        monkeypatch.setattr(teardown, "BlockDevice", Found)
        monkeypatch.setattr(Found, "newer", newer)
        monkeypatch.setattr(Found, "openers", 1)
        monkeypatch.setattr(Found, "asked", [])
        scene.device.await_takeover(Record(config=scene.device.config, device_number=3, device_mark=77))
        if failed:
            scene.device.note_failure("left by an earlier daemon: the pool needs 5 GiB")
        if newer:
            assert "a user that neither /proc nor /sys shows" in await scene.refusal()
        monkeypatch.setattr(Found, "openers", 0)
        await scene.device.delete(force=False)
        assert scene.log == ["tear down"]
        assert Found.asked.count("try") == (2 if newer else 0)

    play(run)


def test_a_disk_that_is_not_live_yet_is_not_opened_and_a_failed_one_has_no_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch, state="waiting")
        await scene.device.delete(force=False)
        assert scene.log == ["look", "tear down"]
        scene = Scene(monkeypatch, state="failed")
        await scene.device.delete(force=False)
        assert scene.log == ["tear down"]

    play(run)


def test_without_the_driver_s_count_a_disk_is_checked_again_after_any_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recovery may have the turn meanwhile, and the disk may have got a user."""

    async def run() -> None:
        scene = Scene(monkeypatch, newer=False)
        async with scene.device.parts.life.turn:
            deleting = asyncio.ensure_future(scene.refusal())
            while "open" not in scene.log:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            scene.kernel.seen = Users(openers=("process 7 (cat) has it open",))
        assert "process 7" in await deleting

    play(run)


def test_a_device_whose_client_buffers_are_lent_is_not_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        monkeypatch.setattr(scene.device.parts.clients, "names", lambda: ["client process 77"])
        assert "client process 77" in await scene.refusal()

    play(run)


class Used(Device):
    """A device that may have a user."""

    def __init__(self, name: str, user: str) -> None:
        super().__init__(DeviceConfig(name=name), fake_context())
        self._user = user

    async def check_unused(self) -> None:
        if self._user:
            raise DaemonError(f"{self.name}: in use: {self._user}")


class Table(DeviceTable):
    """Three devices: `seen` are the users that a check finds, `counted` those that only a removal finds."""

    def __init__(self, seen: dict[str, str], counted: dict[str, str]) -> None:
        super().__init__(lambda config: Used(config.name, ""), lambda: None)
        self._counted = counted
        self.forgotten: dict[str, bool] = {}
        self.left = {name: Used(name, seen.get(name, "")) for name in ("first", "second", "third")}

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def devices(self) -> list[Device]:
        return list(self.left.values())

    def device(self, name: str) -> Device:
        return self.left[name]

    async def delete(self, name: str, force: bool, forget: bool = False) -> None:
        self.forgotten[name] = forget
        if not force and name in self._counted:
            raise DaemonError(f"{name}: in use: {self._counted[name]}")
        del self.left[name]


async def deletions(
    call: Callable[[Supervisor], Awaitable[object]], seen: dict[str, str], counted: dict[str, str]
) -> list[str]:
    """Call a supervisor of three devices; the devices that are left."""
    supervisor = Supervisor(fake_context(), Background("the daemon"))
    table = supervisor._table = Table(seen, counted)
    await call(supervisor)
    return list(table.left)


def refused(with_words: str) -> Callable[[Supervisor], Awaitable[None]]:
    async def call(supervisor: Supervisor) -> None:
        with pytest.raises(DaemonError) as caught:
            await supervisor.delete(None, force=False)
        assert str(caught.value) == with_words

    return call


def test_all_devices_are_checked_before_one_is_removed_and_every_refusal_is_reported() -> None:
    seen = {"second": "cat", "third": "a mount"}
    refusal = refused("nothing was deleted: second: in use: cat; third: in use: a mount")
    assert asyncio.run(deletions(refusal, seen=seen, counted={})) == ["first", "second", "third"]
    forced: list[object] = []

    async def force(supervisor: Supervisor) -> None:
        forced.append(await supervisor.delete(None, force=True))

    assert asyncio.run(deletions(force, seen=seen, counted={})) == []
    assert forced == [["first", "second", "third"]]


@pytest.mark.parametrize("forget", [True, False])
def test_a_deletion_forgets_the_stores_unless_it_is_told_to_keep_them(forget: bool) -> None:
    async def delete() -> dict[str, bool]:
        supervisor = Supervisor(fake_context(), Background("the daemon"))
        table = supervisor._table = Table({}, {})
        await supervisor.delete(None, force=False, forget=forget)
        return table.forgotten

    assert asyncio.run(delete()) == dict.fromkeys(("first", "second", "third"), forget)


def test_a_refusal_reports_the_devices_that_were_removed_before_it() -> None:
    refusal = refused("second: in use: cat (deleted before that: first)")
    assert asyncio.run(deletions(refusal, seen={}, counted={"second": "cat"})) == ["second", "third"]
