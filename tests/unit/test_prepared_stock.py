"""The stock of prepared devices: how many there are, what ends and replaces them, and when others are made."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from support.fakes.device_parts import turn
from support.fakes.prepared import (
    DEADLINE_S,
    VOL,
    TakenTeam,
    TakingMachine,
    context_on,
    in_loop,
    new_machine,
    prepared_on,
)
from support.fakes.step_machine import SIZE_BYTES
from ublkpool.daemon import prepared_stock
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.memory import MemoryBudget, memory_of
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.prepared_stock import Adds, PreparedStock
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.settings.config import DeviceConfig, Prepare, PrepareTable, ServeConfig
from ublkpool.daemon.supervisor import Supervisor
from ublkpool.daemon.takeover import TakeOver

WANTED = Prepare.of(PrepareTable(count=2))


@pytest.fixture
def machine(tmp_path: Path) -> TakingMachine:
    return new_machine(tmp_path)


def a_stock(
    machine: TakingMachine,
    monkeypatch: pytest.MonkeyPatch,
    wanted: Prepare | None = WANTED,
    adds: Adds = lambda: (),
    pause_s: float = 0.001,
) -> PreparedStock:
    monkeypatch.setattr(prepared_stock, "RETRY_PAUSE_S", pause_s)
    return PreparedStock(context_on(machine, monkeypatch), wanted, adds)


async def no_removal(_record: Record) -> None:
    raise AssertionError("nothing was left")


async def until(check: Callable[[], bool]) -> None:
    while not check():
        await asyncio.sleep(0.001)


DISK = Disk(size_bytes=SIZE_BYTES, block_bytes=512, volatile_cache=False, read_only=False)


def test_the_stock_is_filled_again_when_a_device_has_taken_one(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        stock = a_stock(machine, monkeypatch)
        stock.begin([], no_removal)
        await until(lambda: stock.ready_count == 2)
        await turn()
        assert len(machine.kernel) == 2 and stock.marks == set(machine.kernel.values())
        assert stock.memory_bytes == 2 * memory_of(WANTED.shape, 0) > 0
        other = msgspec.structs.replace(VOL, depth=64)
        assert stock.take(other, DISK) is None and stock.ready_count == 2
        taken = stock.take(VOL, DISK)
        assert taken is not None and taken.resources.mark not in stock.marks and stock.ready_count == 1
        await until(lambda: stock.ready_count == 2)
        # Its death is the device's business now.
        assert taken.resources.team is TakenTeam.made[0]
        TakenTeam.made[0].dies()
        await turn()
        assert len(machine.kernel) == 3 and stock.ready_count == 2 and not caplog.records
        await stock.end()
        assert set(machine.kernel.values()) == {taken.resources.mark}

    in_loop(run)


def test_one_whose_worker_ends_is_removed_and_replaced_after_a_pause(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        stock = a_stock(machine, monkeypatch, pause_s=DEADLINE_S)
        stock.begin([], no_removal)
        await until(lambda: stock.ready_count == 2)
        first = TakenTeam.made[0]
        first.dies()
        await until(lambda: len(machine.kernel) == 1)
        await turn()
        assert stock.ready_count == 1 and len(TakenTeam.made) == 2, "replaced at once"
        assert "SIGKILL; another takes its place" in caplog.text
        await stock.end()
        assert machine.left() == []

    with caplog.at_level(logging.WARNING):
        in_loop(run)


def test_what_cannot_be_made_is_said_once_and_tried_again(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        stock = a_stock(machine, monkeypatch)
        machine.failing = "ADD_DEV after the kernel has made it"
        stock.begin([], no_removal)
        await until(lambda: machine.passed.count(machine.failing) == 3)
        assert stock.ready_count == 0
        machine.failing = ""
        await until(lambda: stock.ready_count == 2)
        await until(lambda: len(machine.kernel) == 2)
        await stock.end()
        assert machine.left() == []

    with caplog.at_level(logging.INFO):
        in_loop(run)
    said = [each.message for each in caplog.records if each.name == "ublkpool.prepared"]
    first, second = said
    assert first.startswith("0 of 2 prepared devices: Too many open files") and first.endswith(
        "; trying again"
    )
    assert second == "devices are prepared again"


async def wait_for(event: asyncio.Event) -> None:
    await event.wait()


async def turns() -> None:
    """Let every task run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_none_is_made_while_a_device_is_added(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        over = asyncio.Event()
        first, adds = asyncio.ensure_future(wait_for(over)), [asyncio.ensure_future(wait_for(over))]
        stock = a_stock(machine, monkeypatch, adds=lambda: [each for each in adds if not each.done()])
        stock.begin([], no_removal)
        await turns()
        adds.append(asyncio.ensure_future(wait_for(asyncio.Event())))
        over.set()
        await first
        await turns()
        assert machine.passed == [], "another add began meanwhile"
        adds[1].cancel()
        await until(lambda: stock.ready_count == 2)
        monkeypatch.setattr(prepared_stock, "ADD_PATIENCE_S", 0.0)
        adds.append(asyncio.ensure_future(wait_for(asyncio.Event())))
        assert stock.take(VOL, DISK) is not None
        # An add that hangs does not end them for ever.
        await until(lambda: stock.ready_count == 2)
        adds[2].cancel()
        await stock.end()

    in_loop(run)


class Counted:
    """A device that has this memory."""

    name = "other"

    def __init__(self) -> None:
        self.memory_bytes = 0


def test_they_have_what_devices_leave_of_the_memory_budget(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    each_bytes = memory_of(WANTED.shape, 0)

    async def run() -> None:
        other = Counted()
        stock = a_stock(machine, monkeypatch)
        budget: MemoryBudget = stock._context.budget
        budget.max_bytes, budget.devices = 2 * each_bytes - 1, lambda: [other]
        stock.begin([], no_removal)
        await until(lambda: "memory_max leaves less than" in caplog.text)
        assert stock.ready_count == 1 and budget.used_bytes == each_bytes
        # A device is never refused for the sake of a prepared one, which gives way.
        assert budget.refusal("vol", 2 * each_bytes - 1) == ""
        other.memory_bytes = 2 * each_bytes - 1
        await until(lambda: stock.ready_count == 0 and not machine.kernel)
        other.memory_bytes = 0
        budget.max_bytes = 0
        await until(lambda: stock.ready_count == 2)
        await stock.end()
        assert machine.left() == []

    with caplog.at_level(logging.WARNING):
        in_loop(run)


def test_a_full_stock_gives_way_to_a_device_that_is_added(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        supervisor = Supervisor(
            context_on(machine, monkeypatch), Background("the daemon"), ServeConfig(prepare=WANTED)
        )
        stock, budget = supervisor.prepared, supervisor._context.budget
        stock.begin([], no_removal)
        await until(lambda: stock.ready_count == 2)
        budget.max_bytes = budget.used_bytes
        waiting = DeviceConfig(name="waits", size_bytes=SIZE_BYTES, depth=1, max_io_bytes=4096)
        await supervisor.add(waiting, lambda _: None)
        await until(lambda: stock.ready_count == 1)
        assert budget.used_bytes <= budget.max_bytes
        await stock.end()
        await supervisor.delete(None, force=True)

    in_loop(run)


@pytest.mark.parametrize("failing", ["ADD_DEV after the kernel has made it", "ready"])
def test_the_end_removes_also_the_one_that_is_being_made(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    async def run() -> None:
        stock = a_stock(machine, monkeypatch)
        machine.failing, machine.gives_up = failing, True
        stock.begin([], no_removal)
        await until(lambda: failing in machine.passed)
        await turn()
        machine.failing = ""
        await stock.end()
        assert machine.left() == []

    in_loop(run)


def test_those_of_an_earlier_daemon_go_before_others_are_made(
    machine: TakingMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        await prepared_on(context_on(machine, monkeypatch))
        machine.crash()
        (record,) = machine.records.load()
        stock = a_stock(machine, monkeypatch)
        left = TakeOver(stock._context, [record], {}, [])
        removed: list[Record] = []

        async def remove(each: Record) -> None:
            assert stock.marks == {record.device_mark} and stock.ready_count == 0
            await left.remove_prepared(each)
            removed.append(each)
            assert not machine.kernel

        stock.begin(left.prepared, remove)
        await until(lambda: stock.ready_count == 2)
        assert removed == [record] and record.device_mark not in stock.marks
        await stock.end()
        assert machine.left() == []

    in_loop(run)
