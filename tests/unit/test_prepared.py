"""Prepared devices: which device takes one, a death at every step of that, the stock that makes and removes them."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fakes.device_parts import FakeBroker, FakeChild, ended_child, fake_context, turn
from support.fakes.step_machine import SIZE_BYTES, Machine, StepKernel, StepTeam, a_context
from ublkpool.bufpool import wire
from ublkpool.daemon import prepared_stock, takeover
from ublkpool.daemon.device import adoption, resources
from ublkpool.daemon.device.build import build, prepare
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.memory import MemoryBudget, memory_of
from ublkpool.daemon.device.prepared import PreparedParts, is_reserved, shape_of
from ublkpool.daemon.device.records import Record, Records
from ublkpool.daemon.device.team import Plan
from ublkpool.daemon.doctor.daemon import DaemonAnswer, daemon_findings
from ublkpool.daemon.doctor.leftovers import Recorded, leftover_findings
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.prepared_stock import Adds, PreparedStock
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig, Prepare, PrepareTable, ServeConfig
from ublkpool.daemon.supervisor import Supervisor
from ublkpool.daemon.takeover import TakeOver

DEADLINE_S = 60
NULL = BackendConfig(kind="null", options={"size": "1M"})
VOL = DeviceConfig(name="vol", size_bytes=SIZE_BYTES, backend=NULL, isolation="none")
ATTACH = wire.Attach(v=1, device="vol", kind="null")
WANTED = Prepare.of(PrepareTable(count=2))
STEPS = (
    "record of the device",
    "holding the pool",
    "forgetting the prepared one",
    "holding worker 0",
    "holding worker 1",
    "telling the workers",
    "the workers were told",
)


class Killed(BaseException):
    """The daemon is gone; nothing of it runs any more."""


class TakingMachine(Machine):
    """Its steps are those of taking a prepared device, once `failing` is set."""

    kills = False

    def step(self, name: str) -> None:
        if self.kills and name == self.failing:
            self.passed.append(name)
            raise Killed
        super().step(name)

    def crash(self) -> None:
        """SIGKILL: memory and leases go; so do workers that have not been told to go on, unless the holder has them."""
        held = {f"worker {name.rpartition('/')[2]}" for name in self.held if "/worker/" in name}
        self.parts &= held | {each for each in self.parts if self.is_told and each.startswith("worker")}

    is_told = False


class TakenKernel(StepKernel):
    """A kernel device that never had a disk."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.is_started = False

    async def stop(self, deadline_s: float) -> None:
        assert self.machine.kernel[self.number], "STOP_DEV for a device that is gone"


class TakenTeam(StepTeam):
    """Workers that end when the test says so, and are told which device they serve."""

    made: "list[TakenTeam]"
    machine: TakingMachine

    def __init__(self, plan: Plan, epoch: int, *_: object) -> None:
        super().__init__(plan, epoch)
        self.death = asyncio.get_running_loop().create_future()
        self.made.append(self)

    async def fork(self) -> None:
        await super().fork()
        for worker in self.workers:
            worker.child = FakeChild(ended=asyncio.get_running_loop().create_future())

    async def ended(self) -> Any:
        return await asyncio.shield(self.death)

    def dies(self) -> None:
        worker = self.workers[0]
        worker.fault = "queue 0: its worker ended: SIGKILL"
        worker.child = ended_child(137)
        self.death.set_result(worker)

    async def become(self) -> None:
        self.machine.step("telling the workers")
        assert self.plan.config.name == "vol" and self.plan.engine is not None and not self.plan.is_prepared
        self.machine.is_told = True
        await asyncio.sleep(0)
        self.machine.step("the workers were told")


class TakenRecords(Records):
    """The records of the daemon that takes one."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.directory)
        self._machine = machine

    def save(self, record: Record) -> None:
        if not is_reserved(record.config.name) and not record.going:
            self._machine.step("record of the device")
        super().save(record)

    def forget(self, name: str) -> None:
        if is_reserved(name):
            self._machine.step("forgetting the prepared one")
        super().forget(name)


class NextBroker(FakeBroker):
    """The next daemon's."""

    def start(self) -> None:
        """It runs."""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TakingMachine:
    made = TakingMachine(tmp_path / "devices", "")
    TakenTeam.made = []
    return made


def context_on(machine: TakingMachine, monkeypatch: pytest.MonkeyPatch) -> DaemonContext:
    context = a_context(machine, monkeypatch)
    for module in (resources, adoption):
        monkeypatch.setattr(module, "BlockDevice", TakenKernel)
    monkeypatch.setattr(resources, "Team", TakenTeam)
    context.records = TakenRecords(machine)
    context.broker = NextBroker()
    context.queue_dir = machine.directory.parent / "queues"
    context.queue_dir.mkdir(exist_ok=True)
    hold = context.holder.hold

    def noted(name: str, fd: int) -> None:
        if name.startswith("vol/worker"):
            machine.step(f"holding worker {name[-1]}")
        hold(name, fd)

    monkeypatch.setattr(context.holder, "hold", noted)
    return context


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))


async def prepared_on(context: DaemonContext) -> PreparedParts:
    parts = PreparedParts(VOL, context)
    await prepare(parts)
    return parts


def a_device(context: DaemonContext, prepared: PreparedParts) -> Device:
    def take(config: DeviceConfig, disk: Disk) -> PreparedParts | None:
        return prepared if prepared.fits(config, disk) else None

    return Device(VOL, context, take)


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


# The stock


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
