"""New settings of a device that serves: on record first, then in every worker, or nothing at all."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from support.fakes.device_parts import DISK, SIZE_BYTES, FakeTeam, fake_device, turn
from ublkpool.daemon.device import live_changes
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.records import NotRecorded, Record
from ublkpool.daemon.errors import ConfigError, DaemonError
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.daemon.status import Setting

DEADLINE_S = 60


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(run())


class ToldTeam(FakeTeam):
    """Workers that note their deadlines with what else happens."""

    knows = True

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps

    @property
    def can_set_deadlines(self) -> bool:
        return self.knows

    async def set_deadlines(self, config: DeviceConfig) -> None:
        self.steps.append(f"workers: {config.io_timeout_s:g} {config.on_timeout}")


def live_device(steps: list[str], **config: object) -> Device:
    """A device with workers, whose record notes its deadlines in `steps`."""
    device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES, **config))  # type: ignore[arg-type]
    device.parts.resources.team = ToldTeam(steps)
    device.parts.life.state = "live"
    device.parts.save = (  # type: ignore[method-assign]
        lambda: steps.append(f"record: {device.config.io_timeout_s:g} {device.config.on_timeout}")
    )
    return device


def setting(device: Device, key: str) -> Setting:
    return next(each for each in device.settings() if each.key == key)


def test_new_settings_are_on_record_before_a_worker_has_them() -> None:
    async def run() -> None:
        steps: list[str] = []
        device = live_device(steps)
        await device.set({"io_timeout": 5, "on_timeout": "fail"})
        assert steps == ["record: 5 fail", "workers: 5 fail"]
        parts = device.parts
        assert parts.config is parts.backend.config is parts.resources.config is device.config
        assert parts.added.io_timeout_s == 30.0
        assert setting(device, "io_timeout") == Setting(
            key="io_timeout", value="5", configured="30", applies="now"
        )
        assert device.status().differs == ("io_timeout=5 (config: 30)", "on_timeout=fail (config: wait)")

    in_loop(run)


def test_what_is_set_already_is_not_recorded_again() -> None:
    async def run() -> None:
        steps: list[str] = []
        device = live_device(steps)
        await device.set({"io_timeout": 30})
        assert steps == [] and device.status().differs == ()

    in_loop(run)


@pytest.mark.parametrize("error", [NotRecorded("no room"), OSError("no room"), asyncio.CancelledError()])
def test_settings_that_cannot_be_recorded_are_not_used(error: BaseException) -> None:
    async def run() -> None:
        steps: list[str] = []
        device = live_device(steps, backend=BackendConfig(kind="memory"))
        before = device.config

        def save() -> None:
            raise error

        device.parts.save = save  # type: ignore[method-assign]
        with pytest.raises(type(error)):
            await device.set({"io_timeout": 5, "backend.x": "1"})
        parts = device.parts
        assert steps == [] and parts.config is parts.backend.config is parts.resources.config is before

    in_loop(run)


def test_a_mistake_is_told_at_once_and_nothing_is_changed() -> None:
    """A recovery, which has the turn, may last."""

    async def run() -> None:
        steps: list[str] = []
        device = live_device(steps)
        async with device.parts.life.turn:
            with pytest.raises(ConfigError, match="on_timeout"):
                await device.set({"io_timeout": 5, "on_timeout": "never"})
        assert steps == [] and device.config.io_timeout_s == 30.0

    in_loop(run)


def test_a_change_waits_for_a_recovery_to_end() -> None:
    async def run() -> None:
        steps: list[str] = []
        device = live_device(steps)
        async with device.parts.life.turn:
            setting = asyncio.ensure_future(device.set({"io_timeout": 5}))
            await turn()
            assert not setting.done() and steps == []
            device.parts.resources.team = next_team = ToldTeam(steps)
        await setting
        assert steps == ["record: 5 wait", "workers: 5 wait"] and next_team is device.parts.resources.team

    in_loop(run)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda parts: setattr(parts.life, "is_stopping", True), "vol: it is being deleted"),
        (lambda parts: setattr(parts.life, "state", "failed"), "vol: it has failed"),
        (
            lambda parts: setattr(parts, "left", Record(config=parts.config)),
            "vol: an earlier daemon left it, and it is being taken over",
        ),
        (
            lambda parts: setattr(parts.resources.team, "knows", False),
            "vol: its workers run an earlier version",
        ),
    ],
)
def test_a_device_that_cannot_be_changed_now_says_why(change: Callable[[object], None], reason: str) -> None:
    async def run() -> None:
        steps: list[str] = []
        device = live_device(steps)
        change(device.parts)
        with pytest.raises(DaemonError, match=reason):
            await device.set({"io_timeout": 5})
        assert steps == [] and device.config.io_timeout_s == 30.0

    in_loop(run)


def test_the_daemons_backend_gets_its_new_options_at_its_next_start() -> None:
    async def run() -> None:
        device = live_device([], backend=BackendConfig(kind="file", options={"path": "/a"}))
        await device.set({"backend.size": "2G"})
        managed = device.parts.managed
        assert managed is not None
        assert managed._process.config.options == {"path": "/a", "size": "2G"}

    in_loop(run)


def test_a_device_that_waits_for_its_first_backend_can_be_changed() -> None:
    async def run() -> None:
        device = fake_device()
        await device.set({"io_timeout": 5})
        assert device.config.io_timeout_s == 5.0

    in_loop(run)


def test_the_config_file_is_what_settings_are_compared_with_else_what_the_device_was_added_with() -> None:
    async def run() -> None:
        device = live_device([])
        await device.set({"io_timeout": 5})
        in_file = msgspec.structs.replace(device.parts.added, io_timeout_s=5.0, queues=4)
        device.parts.context.configured["vol"] = in_file
        assert device.status().differs == ("queues=1 (config: 4)",)

    in_loop(run)


def test_the_next_daemon_knows_what_the_device_was_added_with() -> None:
    async def run() -> None:
        first = live_device([])
        await first.set({"io_timeout": 5})
        record = Record(config=first.config, added=first.parts.added)
        again = msgspec.json.decode(msgspec.json.encode(record), type=Record)
        second = fake_device(again.config)
        second.await_takeover(again)
        assert second.status().differs == ("io_timeout=5 (config: 30)",)
        third = fake_device(again.config)
        third.await_takeover(Record(config=again.config))
        assert third.status().differs == (), "the record of an earlier version"

    in_loop(run)


def test_an_absence_is_logged_again_after_its_deadline_was_changed() -> None:
    async def run() -> None:
        device = live_device([])
        device.parts.backend._is_absence_logged = True
        await live_changes.apply(device.parts, {"on_absent": "fail"})
        assert not device.parts.backend.is_absent_too_long

    in_loop(run)


# The size


@pytest.mark.parametrize(
    ("added", "in_file", "shown", "differs", "overruled"),
    [
        (1, 1, (2, 1), False, 1),
        (1, 2, (2, 2), False, None),
        (1, 3, (2, 3), True, None),
        (1, None, (2, None), False, None),
        (None, None, (2, None), False, None),
        (3, 3, (3, 3), False, None),
        (3, 1, (3, 1), True, 1),
    ],
)
def test_the_size_that_a_resize_or_a_grown_store_gave_is_shown_and_does_not_differ_from_the_file(
    added: int | None,
    in_file: int | None,
    shown: tuple[int, int | None],
    differs: bool,
    overruled: int | None,
) -> None:
    def size(count: int | None) -> int | None:
        return None if count is None else count * SIZE_BYTES

    async def run() -> None:
        device = fake_device(DeviceConfig(name="vol", size_bytes=size(added)))
        device.parts.resources.disk = DISK
        device.parts.resources.grow(2 * SIZE_BYTES)
        device.parts.context.configured = {"vol": DeviceConfig(name="vol", size_bytes=size(in_file))}
        seen, status = setting(device, "size"), device.status()
        assert (seen.value, seen.configured) == tuple(str(size(each)) if each else "-" for each in shown)
        assert bool(status.differs) == differs
        assert status.config_size_bytes == size(overruled)

    in_loop(run)


def test_a_size_that_the_file_no_longer_has_differs_unless_the_device_was_grown() -> None:
    async def run() -> None:
        device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES))
        device.parts.resources.disk = DISK
        device.parts.context.configured = {"vol": DeviceConfig(name="vol")}
        assert device.status().differs == (f"size={SIZE_BYTES} (config: -)",)

    in_loop(run)


def test_an_option_of_a_grown_device_changes_without_its_size() -> None:
    async def run() -> None:
        steps: list[str] = []
        device = live_device(steps)
        device.parts.resources.disk = DISK
        device.parts.resources.grow(2 * SIZE_BYTES)
        await device.set({"io_timeout": 5})
        assert device.config.size_bytes == SIZE_BYTES, "the record keeps what the device was made with"
        assert setting(device, "size").value == str(2 * SIZE_BYTES)
        assert device.status().differs == ("io_timeout=5 (config: 30)",)

    in_loop(run)
