"""Prepared devices: which device takes one, and a death at every step of that."""

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fakes.device_parts import fake_context
from support.fakes.prepared import (
    ATTACH,
    NULL,
    STEPS,
    VOL,
    Killed,
    TakenTeam,
    TakingMachine,
    a_device,
    context_on,
    in_loop,
    new_machine,
    prepared_on,
)
from support.fakes.step_machine import SIZE_BYTES
from ublkpool.daemon import takeover
from ublkpool.daemon.device.build import build
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.prepared import shape_of
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.doctor.daemon import DaemonAnswer, daemon_findings
from ublkpool.daemon.doctor.leftovers import Recorded, leftover_findings
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig, Prepare, PrepareTable, ServeConfig
from ublkpool.daemon.supervisor import Supervisor
from ublkpool.daemon.takeover import TakeOver

WANTED = Prepare.of(PrepareTable(count=2))


@pytest.fixture
def machine(tmp_path: Path) -> TakingMachine:
    return new_machine(tmp_path)


# Which device takes one


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "vm17"},
        {"backend": BackendConfig(kind="cow", options={"base": "/b", "overlay": "/o"})},
        {"backend": BackendConfig(kind="memory")},
        {"size_bytes": None, "read_only": True, "io_timeout_s": 5.0, "iops_max": 100, "rings": False},
        {"on_absent": "fail", "absent_timeout_s": 7.0, "bytes_per_s_max": 1 << 20, "burst_s": 1.0},
    ],
)
def test_a_device_of_the_shape_takes_one(changes: dict[str, Any]) -> None:
    assert shape_of(msgspec.structs.replace(VOL, **changes)) == shape_of(WANTED.shape)


@pytest.mark.parametrize(
    "changes",
    [
        {"queues": 2},
        {"depth": 64},
        {"max_io_bytes": 1 << 20},
        {"need_get_data": False},
        {"recovery": "fail"},
        {"partitions": False},
        {"spin_us": 5},
        {"pool_bytes": 1 << 20},
        {"huge_pages": "off"},
        {"affinity": "off"},
        {"id": 7},
        {"isolation": "process"},
        {"backend": BackendConfig(kind="rbd")},
        {"backend": BackendConfig(kind="memory"), "placement": "backend"},
        {"backend": BackendConfig(kind="file"), "zero_copy": True},
        {"isolation": "process", "answers": "worker", "backend": None},
        {"isolation": "process", "client_buffers_bytes": 1 << 20},
    ],
)
def test_a_device_of_another_shape_is_made_as_ever(changes: dict[str, Any]) -> None:
    assert shape_of(msgspec.structs.replace(VOL, **changes)) != shape_of(WANTED.shape)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backend": None},
        {
            "backend": BackendConfig(
                kind="/x.py", user="daemon", python="/usr/bin/python3", layers=("readonly",)
            )
        },
        {"on_timeout": "fail", "on_absent": "fail", "absent_timeout_s": 3.0},
    ],
)
def test_a_device_with_a_backends_process_takes_one_for_such_devices(changes: dict[str, Any]) -> None:
    device = DeviceConfig(name="vol", backend=NULL, size_bytes=SIZE_BYTES)
    wanted = Prepare.of(PrepareTable(count=1, isolation="process")).shape
    assert shape_of(msgspec.structs.replace(device, **changes)) == shape_of(wanted) != shape_of(WANTED.shape)
    for other in ({"rings": False}, {"placement": "backend"}):
        assert shape_of(msgspec.structs.replace(device, **other)) != shape_of(wanted)
        table = PrepareTable(count=1, isolation="process", **other)
        assert shape_of(msgspec.structs.replace(device, **other)) == shape_of(Prepare.of(table).shape)


def test_the_prepared_have_the_shape_that_is_wanted() -> None:
    table = PrepareTable(
        count=3, queues=2, depth=64, max_io_bytes=1 << 20, need_get_data=False, partitions=False
    )
    same = {each: getattr(table, each) for each in table.__struct_fields__ if each != "count"}
    assert shape_of(msgspec.structs.replace(VOL, **same)) == shape_of(Prepare.of(table).shape)


def test_their_names_are_refused_to_devices() -> None:
    async def run() -> None:
        supervisor = Supervisor(fake_context(), Background("the daemon"))
        with pytest.raises(DaemonError, match="those of prepared devices: choose another"):
            await supervisor.add(msgspec.structs.replace(VOL, name="_prepared.1"), lambda _: None)
        assert supervisor.list() == []

    in_loop(run)


def test_an_ordinary_users_daemon_prepares_none_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        context = fake_context()
        context.is_privileged = False
        config = ServeConfig(prepare=WANTED)
        assert Supervisor(context, Background("the daemon"), config).daemon().prepared_wanted == 0
        context.is_privileged = True
        assert Supervisor(context, Background("the daemon"), config).daemon().prepared_wanted == 2

    with caplog.at_level(logging.WARNING):
        in_loop(run)
    assert caplog.text.count("no devices are prepared") == 1


def test_the_doctor_tells_how_many_wait(tmp_path: Path) -> None:
    found = daemon_findings(tmp_path, DaemonAnswer("answers", prepared=1, prepared_wanted=3))
    assert [each.says for each in found][1:] == ["1 of 3 prepared devices wait for an add"]
    assert len(daemon_findings(tmp_path, DaemonAnswer("answers"))) == 1


def test_the_doctor_counts_none_among_devices_whose_requests_wait(tmp_path: Path) -> None:
    records = [Record(config=DeviceConfig(name=each), device_number=3) for each in ("_prepared.1", "vol")]
    answer, recorded = DaemonAnswer("dead"), Recorded(records)
    (found,) = leftover_findings(tmp_path, answer, recorded, lambda _: False)
    assert "vol" in found.says and "_prepared" not in found.says


# Taking one


@pytest.mark.parametrize("failing", ["", *STEPS])
def test_a_device_is_made_although_taking_a_prepared_one_fails(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    async def run() -> None:
        context = context_on(machine, monkeypatch)
        prepared = await prepared_on(context)
        assert [each.config.name for each in context.records.load()] == [prepared.config.name]
        assert not machine.held & {"vol/pool"} and not any("worker" in each for each in machine.held)
        machine.failing, machine.passed = failing, []
        device = a_device(context, prepared)
        attempts = 0

        def step(name: str) -> None:
            # Each step fails once: the attempt after it succeeds.
            nonlocal attempts
            machine.passed.append(name)
            if name == failing and not attempts:
                attempts += 1
                raise OSError(24, os.strerror(24))

        monkeypatch.setattr(machine, "step", step)
        async with device.parts.life.turn:
            team = await build(device.parts, ATTACH, device._take_prepared)
        assert team is TakenTeam.made[-1] and len(TakenTeam.made) == (2 if failing else 1)
        assert [each.config.name for each in context.records.load()] == ["vol"]
        assert len(machine.kernel) == 1
        assert {"vol/pool", "vol/worker/0", "vol/worker/1"} == machine.held
        if not failing:
            assert tuple(each for each in machine.passed if each in STEPS) == STEPS
        await device.delete(force=True)
        assert machine.left() == []

    in_loop(run)


@pytest.mark.parametrize("failing", STEPS)
def test_whatever_ends_the_daemon_while_it_takes_one_the_next_finds_all_of_it(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    async def run() -> None:
        context = context_on(machine, monkeypatch)
        prepared = await prepared_on(context)
        machine.failing, machine.kills = failing, True
        device = a_device(context, prepared)
        with pytest.raises(Killed):
            await build(device.parts, ATTACH, device._take_prepared)
        device.parts.background.cancel()
        on_record = {each.device_mark for each in machine.records.load()}
        assert set(machine.kernel.values()) <= on_record, "a kernel device that no record tells of"
        machine.crash()
        machine.kills, machine.failing = False, ""
        await _next_daemon(machine, monkeypatch)
        assert machine.left() == []

    in_loop(run)


async def _next_daemon(machine: TakingMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes over, and finds each kernel device on one record."""
    context = context_on(machine, monkeypatch)
    context.holder.held = set(machine.held)  # type: ignore[attr-defined]

    async def end_left(records: Sequence[Record], spare: object) -> None:
        machine.parts -= {each for each in machine.parts if each.startswith("worker")}

    monkeypatch.setattr(takeover, "end_left", end_left)
    left = TakeOver(context, machine.records.load(), {}, [])
    await left.clear()
    marks = [each.device_mark for each in [*left.records, *left.prepared]]
    assert len(marks) == len(set(marks)), "two records for one kernel device would remove its successor"
    for record in left.prepared:
        await left.remove_prepared(record)
    for record in left.records:
        assert not await left.device(record, lambda _: None)


def test_a_cancelled_add_removes_what_it_has_taken(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        context = context_on(machine, monkeypatch)
        device = a_device(context, await prepared_on(context))
        machine.failing, machine.gives_up = "the workers were told", True
        with pytest.raises(asyncio.CancelledError):
            async with device.parts.life.turn:
                await device._start(ATTACH, None)
        assert machine.left() == []

    in_loop(run)


def test_one_whose_worker_has_ended_and_one_for_other_blocks_are_not_taken(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        prepared = await prepared_on(context_on(machine, monkeypatch))
        disk = Disk(size_bytes=SIZE_BYTES, block_bytes=512, volatile_cache=False, read_only=False)
        assert prepared.fits(VOL, disk)
        assert not prepared.fits(VOL, msgspec.structs.replace(disk, block_bytes=4096))
        TakenTeam.made[-1].dies()
        assert not prepared.fits(VOL, disk)

    in_loop(run)
