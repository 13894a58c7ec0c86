"""A machine on which an `add` takes steps that can fail: it counts kernel devices, pools, workers and records."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from support.fakes.device_parts import FakeChild, FakeHolder, FakeKernel, FakeTeam, fake_context
from ublkpool.bufpool import wire
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.control import Control, Limits
from ublkpool.daemon.device import resources
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.memory import pool_of
from ublkpool.daemon.device.records import Record, Records
from ublkpool.daemon.device.resources import DeviceResources
from ublkpool.daemon.device.team import Plan
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.client_area import AreaRecord, ClientArea
from ublkpool.daemon.kernel.control_process import ControlFailed
from ublkpool.daemon.processes.broker_process import Leases
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.ublk.abi import Feature

SIZE_BYTES = 1 << 20
ATTACH = wire.Attach(v=1, device="vol", kind="memory")


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

    def __init__(self, machine: Machine, config: DeviceConfig) -> None:
        machine.step("pool")
        machine.parts.add("pool")
        self._machine = machine
        self.data_fd = self.control_fd = -1
        self.control = StepControl()
        self.queues = config.queues
        self.geometry, _ = pool_of(config, config.queues, config.depth, config.max_io_bytes)

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


def a_context(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> DaemonContext:
    """A daemon on this machine."""
    StepKernel.machine = StepTeam.machine = StepArea.machine = StepLeases.machine = machine
    for name, step in (
        ("BlockDevice", StepKernel),
        ("Team", StepTeam),
        ("ClientArea", StepArea),
        ("Leases", StepLeases),
    ):
        monkeypatch.setattr(resources, name, step)

    async def make_arena(made: DeviceResources, _kernel: object) -> StepArena:
        return StepArena(machine, made.config)

    monkeypatch.setattr(DeviceResources, "_make_arena", make_arena)
    context = fake_context(StepHolder(machine))
    context.records = StepRecords(machine)
    return context


def a_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device on this machine, for a backend that attaches."""
    config = DeviceConfig(
        name="vol",
        size_bytes=SIZE_BYTES,
        client_buffers_bytes=8 * 4096,
        backend=BackendConfig(kind="memory"),
    )
    return Device(config, a_context(machine, monkeypatch))
