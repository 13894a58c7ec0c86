"""An `add` that fails at any step leaves nothing: each step fails once, and the cleaning up does not depend on it."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from support.fakes.device_parts import FakeChild, FakeHolder, FakeKernel, FakeTeam, fake_context
from ublkpool.bufpool import wire
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.control import Control, Limits
from ublkpool.daemon.device import resources, teardown
from ublkpool.daemon.device.build import build
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.records import Record, Records
from ublkpool.daemon.device.resources import DeviceResources
from ublkpool.daemon.device.table import DeviceTable
from ublkpool.daemon.device.team import Plan
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import disk_users
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.client_area import AreaRecord, ClientArea
from ublkpool.daemon.kernel.control_process import ControlFailed
from ublkpool.daemon.processes.broker_process import Leases
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.ublk.abi import Feature

DEADLINE_S = 60
SIZE_BYTES = 1 << 20
ATTACH = wire.Attach(v=1, device="vol", kind="memory")
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


class Machine:
    """What an `add` makes, and the step at which the add fails, or with `gives_up` is cancelled."""

    def __init__(self, directory: Path, failing: str, gives_up: bool = False) -> None:
        self.failing, self.gives_up = failing, gives_up
        self.passed: list[str] = []
        self.kernel: dict[int, int] = {}
        """Marks of the kernel's devices, by their numbers."""
        self.held: set[str] = set()
        self.parts: set[str] = set()
        self.delete_failures = 0
        self.directory = directory
        self.records = Records(directory)
        self.saves = 0

    def step(self, name: str) -> None:
        self.passed.append(name)
        if name == self.failing:
            if self.gives_up:
                raise asyncio.CancelledError
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def left(self) -> list[str]:
        """What exists, in words."""
        found = [f"kernel device {number}" for number in self.kernel]
        return found + sorted(self.held | self.parts) + [each.config.name for each in self.records.load()]


class StepKernel(FakeKernel):
    """A kernel device whose commands reach a `Machine`."""

    machine: Machine

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.info = self.info._replace(flags=Feature.SHMEM_ZC)

    @property
    def mark(self) -> int:
        return self.machine.kernel[self.number]

    @classmethod
    async def create(cls, *asked: object) -> BlockDevice:
        machine, mark = cls.machine, asked[-1]
        assert isinstance(mark, int)
        machine.step("ADD_DEV")
        number = max(machine.kernel, default=2) + 1
        machine.kernel[number] = mark
        machine.step("ADD_DEV after the kernel has made it")
        return cls(number)

    @classmethod
    async def find(cls, *asked: object) -> BlockDevice | None:
        number = asked[2]
        assert isinstance(number, int)
        return cls(number) if cls.machine.kernel.get(number) == asked[3] else None

    @classmethod
    async def find_marked(cls, *asked: object) -> BlockDevice | None:
        return next((cls(number) for number, each in cls.machine.kernel.items() if each == asked[-1]), None)

    async def register(self, area: ClientArea) -> bool:
        self.machine.step("registering the area")
        return True

    async def delete(self) -> None:
        if self.machine.delete_failures:
            self.machine.delete_failures -= 1
            raise ControlFailed("vol: DEL_DEV has hung for 60 s", 0)
        if self.machine.kernel.pop(self.number, None) is None:
            raise ControlFailed("vol: no such device", errno.ENODEV)


class StepControl(Control):
    """The control segment of a pool that has no memory."""

    def __init__(self) -> None:
        self._given = Limits()

    @property
    def limits(self) -> Limits:
        return self._given

    def set_limits(self, limits: Limits) -> None:
        self._given = limits


class StepArena(Arena):
    """A pool that exists until it is closed."""

    def __init__(self, machine: Machine) -> None:
        machine.step("pool")
        machine.parts.add("pool")
        self._machine = machine
        self.data_fd = self.control_fd = -1
        self.control = StepControl()

    def unlink(self) -> None:
        """It has no name."""

    def close(self) -> None:
        self._machine.parts.discard("pool")


class StepArea(ClientArea):
    """A client area that exists until it is closed."""

    machine: Machine

    def __init__(self) -> None:
        self.files = {0: -1}

    @classmethod
    async def create(cls, *_: object) -> "StepArea":
        cls.machine.step("client area")
        cls.machine.parts.add("area")
        return cls()

    def record(self) -> AreaRecord:
        return AreaRecord(4096, (None,))

    def close(self) -> None:
        self.machine.parts.discard("area")


class StepLeases(Leases):
    """Leases that the broker knows until they are closed."""

    machine: Machine

    def __init__(self, *_: object) -> None:
        self.machine.parts.add("leases")

    @property
    def are_told(self) -> bool:
        return True

    async def register(self, epoch: int) -> None:
        self.machine.step("leases")

    async def close(self) -> None:
        self.machine.parts.discard("leases")


class StepWorker(WorkerProcess):
    """A worker without a process."""

    def __init__(self, queue: int) -> None:
        self.queue, self.cpu, self.child = queue, None, FakeChild()

    def fileno(self) -> int:
        return -1


class StepTeam(FakeTeam):
    """Two workers that exist from their fork until they are ended."""

    machine: Machine

    def __init__(self, plan: Plan, epoch: int, *_: object) -> None:
        super().__init__(plan.kernel, epoch)

    async def fork(self) -> None:
        for queue, step in enumerate(("fork", "fork of a second worker")):
            self.machine.step(step)
            self.machine.parts.add(f"worker {queue}")
            self.workers.append(StepWorker(queue))

    async def ready(self) -> None:
        self.machine.step("ready")

    async def end(self, patience_s: float) -> None:
        await self.kill()

    async def kill(self) -> None:
        for worker in self.workers:
            self.machine.parts.discard(f"worker {worker.queue}")


class StepHolder(FakeHolder):
    """A holder whose every descriptor is a step."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def hold(self, name: str, fd: int) -> None:
        what = {"pool": "the pool", "slice": "the area", "worker": "a worker"}[name.split("/")[1]]
        self._machine.step(f"holding {what}")
        super().hold(name, fd)
        self._machine.held = self.held

    def drop(self, name: str) -> None:
        super().drop(name)
        self._machine.held = self.held


class StepRecords(Records):
    """Records that must be written before the steps which make something."""

    STEPS = (
        "record before ADD_DEV",
        "record after ADD_DEV",
        "record before the fork",
        "record after the fork",
    )

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.directory)
        self._machine = machine

    def save(self, record: Record) -> None:
        machine = self._machine
        if not record.going and machine.saves < len(self.STEPS):
            machine.saves += 1
            machine.step(self.STEPS[machine.saves - 1])
        super().save(record)


def a_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Device:
    StepKernel.machine = StepTeam.machine = StepArea.machine = StepLeases.machine = machine
    for name, step in (
        ("BlockDevice", StepKernel),
        ("Team", StepTeam),
        ("ClientArea", StepArea),
        ("Leases", StepLeases),
    ):
        monkeypatch.setattr(resources, name, step)

    async def make_arena(*_: object) -> StepArena:
        return StepArena(machine)

    monkeypatch.setattr(DeviceResources, "_make_arena", make_arena)
    context = fake_context(StepHolder(machine))
    context.records = StepRecords(machine)
    config = DeviceConfig(
        name="vol",
        size_bytes=SIZE_BYTES,
        client_buffers_bytes=8 * 4096,
        backend=BackendConfig(kind="memory"),
    )
    return Device(config, context)


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
