"""Taking over what an earlier daemon left, with the broker made up."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon import takeover
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.takeover import TakeOver


class FakeDevice:
    """Cannot go on, but can be recovered."""

    def __init__(self, *_: object) -> None:
        self.recovered = False

    def await_takeover(self, _record: Record) -> None:
        """Nothing is listed."""

    def save(self) -> None:
        """Nothing is written."""

    async def go_on(self, *_: object) -> None:
        raise DaemonError("a worker has ended")

    def abandon(self) -> None:
        """Nothing was begun."""

    async def recover_left(self, _record: Record, _held: object) -> bool:
        self.recovered = True
        return True


async def _gone(_numbers: object) -> None:
    raise PoolError("the pool broker is gone")


def test_a_device_is_recovered_although_the_broker_dies_just_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = SimpleNamespace(
        broker=SimpleNamespace(forget=_gone),
        holder=SimpleNamespace(drop=lambda _: None),
        queue_dir=tmp_path,
        instance="unit",
    )
    monkeypatch.setattr(takeover, "may_go_on", lambda *_: True)
    monkeypatch.setattr(takeover, "Device", FakeDevice)
    record = Record(config=DeviceConfig(name="vol", size_bytes=4096), device_number=3)
    found: list[Any] = []
    assert asyncio.run(TakeOver(cast(DaemonContext, context), [record], {}, []).device(record, found.append))
    assert [each.recovered for each in found] == [False, True]


def test_what_is_recovered_is_not_reached_through_what_led_to_the_dead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps: list[str] = []

    class Recovered(FakeDevice):
        async def recover_left(self, record: Record, _held: object) -> bool:
            steps.append(f"recover {record.config.name}")
            return True

    context = SimpleNamespace(
        holder=SimpleNamespace(drop=lambda name: steps.append(f"drop {name}")),
        queue_dir=tmp_path,
        instance="unit",
    )
    monkeypatch.setattr(takeover, "Device", Recovered)
    record = Record(config=DeviceConfig(name="vol", size_bytes=4096), device_number=3)
    asyncio.run(TakeOver(cast(DaemonContext, context), [record], {}, []).device(record, lambda _: None))
    assert steps == ["drop vol", "recover vol"]


def test_a_device_is_not_recovered_before_a_process_that_waits_in_the_kernel_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = Record(config=DeviceConfig(name="vol", size_bytes=4096), device_number=3)
    steps: list[str] = []

    async def end_left(*_: object) -> None:
        steps.append("end")
        if len(steps) < 4:
            raise DaemonError("backend process 7 has not ended 60 s after SIGKILL")

    class Recovered(FakeDevice):
        async def recover_left(self, _record: Record, _held: object) -> bool:
            steps.append("recover")
            return True

    context = SimpleNamespace(
        holder=SimpleNamespace(drop=lambda _name: None), queue_dir=tmp_path, instance="unit"
    )
    monkeypatch.setattr(takeover, "Device", Recovered)
    monkeypatch.setattr(takeover, "end_left", end_left)
    asyncio.run(TakeOver(cast(DaemonContext, context), [record], {}, []).device(record, lambda _: None))
    assert steps == ["end"] * 4 + ["recover"]
    assert caplog.text.count("process 7 has not ended") == 1
