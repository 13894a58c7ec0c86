"""A device whose record cannot be written: it goes on, and the record is written as soon as that can be."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from support.fakes.device_parts import DISK, FakeKernel, FakeTeam, fake_context
from ublkpool.daemon import takeover
from ublkpool.daemon.device import adoption, parts
from ublkpool.daemon.device import device as device_module
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.records import NotRecorded, Record, Records
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.takeover import TakeOver

DEADLINE_S = 60
CONFIG = DeviceConfig(name="vol", size_bytes=DISK.size_bytes)
RECORD = Record(config=CONFIG, device_number=3, disk=DISK, live=True)


class FullRecords(Records):
    """Records on a file system that is full, or broken, while `code` is not 0."""

    def __init__(self, directory: Path, code: int = 0) -> None:
        super().__init__(directory)
        self.code = code
        self.refusals = 0

    def save(self, record: Record) -> None:
        if self.code:
            self.refusals += 1
            raise NotRecorded("vol.json: cannot be written") from OSError(self.code, os.strerror(self.code))
        super().save(record)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SAVE_PAUSE_S", 0.0)
    monkeypatch.setattr(parts, "SAVE_PAUSE_MAX_S", 0.0)
    monkeypatch.setattr(device_module, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setattr(device_module, "SHORTAGE_PAUSE_MAX_S", 0.0)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await asyncio.sleep(0.001)


def served_parts(records: Records) -> DeviceParts:
    made = fake_context()
    made.records = records
    found = DeviceParts(CONFIG, made)
    found.resources.kernel, found.resources.disk = FakeKernel(), DISK
    return found


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_state_that_cannot_be_recorded_holds_and_is_recorded_later(
    tmp_path: Path, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        records = FullRecords(tmp_path / "devices", code)
        device = served_parts(records)
        device.enter("live")
        assert device.life.state == "live"
        await until(lambda: records.refusals > 3)
        assert records.load() == [] and caplog.text.count("is tried again") == 1
        records.code = 0
        await until(lambda: bool(records.load()))
        assert [each.config.name for each in records.load()] == ["vol"]
        device.background.cancel()

    in_loop(run)


def test_a_device_that_is_gone_gets_no_record_any_more(tmp_path: Path) -> None:
    async def run() -> None:
        records = FullRecords(tmp_path / "devices", errno.ENOSPC)
        device = served_parts(records)
        device.enter("live")
        await until(lambda: records.refusals > 3)
        device.forget()
        records.code = 0
        await until(lambda: not device.background.tasks)
        assert records.load() == []

    in_loop(run)


def test_a_device_that_was_recovered_is_taken_over_though_that_cannot_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recovered(Device):
        """A device whose recovery succeeds."""

        async def recover_left(self, record: Record, held: Mapping[str, int]) -> bool:
            self.parts.resources.kernel, self.parts.resources.disk = FakeKernel(), DISK
            return True

    async def run() -> None:
        made = fake_context()
        made.records, made.queue_dir = FullRecords(tmp_path / "devices", errno.EIO), tmp_path
        monkeypatch.setattr(takeover, "Device", Recovered)
        shown: list[Device] = []
        assert await TakeOver(made, [RECORD], {}, []).device(RECORD, shown.append)
        shown[-1].parts.background.cancel()

    in_loop(run)


def test_a_device_whose_workers_live_goes_on_though_that_cannot_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go_on(found: DeviceParts, *_: object) -> Team:
        found.resources.kernel, found.resources.disk = FakeKernel(), DISK
        return FakeTeam(found.resources.kernel)

    async def learn(*_: object) -> None:
        """The store is known."""

    monkeypatch.setattr(adoption, "go_on", go_on)
    monkeypatch.setattr(adoption, "learn", learn)

    async def run() -> None:
        made = fake_context()
        made.records = records = FullRecords(tmp_path / "devices", errno.ENOSPC)
        device = Device(CONFIG, made)
        device.await_takeover(RECORD)
        await device.go_on(RECORD, {})
        assert device.state == "live" and records.refusals
        records.code = 0
        await until(lambda: bool(records.load()))
        device.parts.background.cancel()

    in_loop(run)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_recovery_waits_until_its_epoch_can_be_recorded(
    monkeypatch: pytest.MonkeyPatch, code: int, tmp_path: Path
) -> None:
    """An epoch that is not on record could be begun again by the next daemon."""
    refusals: list[int] = []

    async def next_epoch(found: DeviceParts) -> Team:
        if len(refusals) < 20:
            refusals.append(code)
            raise NotRecorded("vol.json: cannot be written") from OSError(code, os.strerror(code))
        return FakeTeam(found.resources.kernel, epoch=2)

    monkeypatch.setattr(device_module, "next_epoch", next_epoch)

    async def run() -> None:
        made = fake_context()
        made.records = Records(tmp_path / "devices")
        device = Device(CONFIG, made)
        device.parts.resources.kernel, device.parts.resources.disk = FakeKernel(), DISK
        device._is_open = True
        await device._recover("a worker ended")
        assert device.state == "live" and len(refusals) == 20
        device.parts.background.cancel()

    in_loop(run)
