"""`del` of a device: what it asks, in which order, and that a refusal changes nothing."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ublkpool.daemon.device import device as module
from ublkpool.daemon.device import teardown
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import disk_users as in_use
from ublkpool.daemon.kernel.disk_use import Users
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.supervisor import Supervisor


class Kernel:
    """A disk with users that a test sets, and a driver that counts openers or does not."""

    node = Path("/dev/ublkb0")

    def __init__(self, log: list[str], newer: bool) -> None:
        self._log, self.can_try_stop = log, newer
        self.seen = Users()
        self.openers = 0

    async def users(self, _deadline_s: float = 0) -> Users:
        await asyncio.sleep(0)
        self._log.append("look")
        return self.seen

    async def is_claimed(self, _deadline_s: float = 0) -> bool:
        self._log.append("open")
        return False

    async def mappers(self) -> Users:
        return Users()


class Scene:
    """A device in some state, with everything below it made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, newer: bool = True, state: str = "live") -> None:
        monkeypatch.setattr(in_use, "PATIENCE_S", -1.0)
        monkeypatch.setattr(module, "drop_kept", self._drop_kept)
        self.log: list[str] = []
        self.kernel = Kernel(self.log, newer)
        context = SimpleNamespace(
            run_dir=Path("/nonexistent"), runner=None, holder=None, records=None, states=None, boot_id=""
        )
        self.device = Device(DeviceConfig(name="vol", size_bytes=1 << 20), cast(DaemonContext, context))
        self.device.parts.save = lambda: None  # type: ignore[method-assign]
        self.device.parts.resources.kernel = cast(Any, self.kernel)
        self.device.parts.life.state = cast(Any, state)
        monkeypatch.setattr(self.device.parts.resources, "try_stop", self._try_stop)
        monkeypatch.setattr(teardown, "tear_down", self._tear_down)
        monkeypatch.setattr(teardown, "end_binding", self._end_binding)

    async def _try_stop(self) -> bool:
        assert self.device.parts.life.turn.locked() and not self.device.parts.life.is_stopping
        self.log.append("try")
        return not self.kernel.openers

    async def _tear_down(self, _parts: object, _keep: bool) -> None:
        assert self.device.parts.life.turn.locked() and self.device.parts.life.is_stopping
        self.log.append("tear down")

    async def _end_binding(self, _parts: object, _keep: bool, _forget: bool) -> None:
        """It has no store."""

    async def _drop_kept(self, _path: Path) -> None:
        """There is nothing kept."""

    async def refusal(self) -> str:
        with pytest.raises(DaemonError) as caught:
            await self.device.delete(force=False)
        life = self.device.parts.life
        assert not life.is_stopping and not life.turn.locked() and "tear down" not in self.log
        return str(caught.value)


def play(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def test_where_the_driver_counts_openers_it_stops_the_disk_before_anything_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        await scene.device.delete(force=False)
        assert scene.log == ["look", "open", "try", "tear down"]

    play(run)


def test_an_opener_whom_only_the_driver_sees_is_reason_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        scene.kernel.openers = 1
        assert "in use" in await scene.refusal()
        scene.kernel.openers = 0
        await scene.device.delete(force=False)

    play(run)


def test_a_user_who_is_seen_is_named_and_the_driver_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        scene.kernel.seen = Users(lasting=("mounted at /srv",))
        assert "mounted at /srv" in await scene.refusal()
        assert scene.log == ["look"]

    play(run)


def test_force_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch)
        scene.kernel.seen = Users(lasting=("mounted at /srv",))
        await scene.device.delete(force=True)
        assert scene.log == ["tear down"]

    play(run)


@pytest.mark.parametrize("state", ["recovering", "quiesced"])
def test_a_disk_that_is_being_recovered_is_in_use_like_any_other(
    monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    async def run() -> None:
        scene = Scene(monkeypatch, state=state)
        scene.kernel.seen = Users(openers=("process 7 (cat) has it open",))
        assert "process 7" in await scene.refusal()

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


def test_without_the_drivers_count_a_disk_is_looked_at_again_after_whatever_changed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recovery that takes its time has the turn meanwhile, and its disk may have got a user."""

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


class Table:
    """Devices that may have users: as a supervisor's, without anything below."""

    def __init__(self, seen: dict[str, str], told: dict[str, str]) -> None:
        self._seen, self._told = seen, told
        self.names = ["first", "second", "third"]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def devices(self) -> list[Any]:
        return [self.device(name) for name in self.names]

    def device(self, name: str) -> Any:
        async def check_unused() -> None:
            if name in self._seen:
                raise DaemonError(f"{name}: in use: {self._seen[name]}")

        return SimpleNamespace(config=SimpleNamespace(name=name), check_unused=check_unused)

    async def delete(self, name: str, force: bool, forget: bool) -> None:
        assert forget
        if not force and name in self._told:
            raise DaemonError(f"{name}: in use: {self._told[name]}")
        self.names.remove(name)


def all_deleted(table: Table, *, force: bool = False) -> list[str]:
    supervisor = Supervisor.__new__(Supervisor)
    supervisor._table = cast(Any, table)
    supervisor._context = cast(Any, SimpleNamespace(states=SimpleNamespace(knows=lambda _: False)))
    return list(asyncio.run(supervisor.delete(None, force)))


def test_all_devices_are_asked_before_one_goes_and_every_refusal_is_told() -> None:
    table = Table(seen={"second": "cat", "third": "a mount"}, told={})
    with pytest.raises(DaemonError) as caught:
        all_deleted(table)
    assert str(caught.value) == "nothing was deleted: second: in use: cat; third: in use: a mount"
    assert table.names == ["first", "second", "third"]
    assert all_deleted(table, force=True) == ["first", "second", "third"]


def test_what_went_before_another_was_refused_is_told() -> None:
    table = Table(seen={}, told={"second": "somebody"})
    with pytest.raises(DaemonError) as caught:
        all_deleted(table)
    assert str(caught.value) == "second: in use: somebody (deleted before that: first)"
    assert table.names == ["second", "third"]
