"""A daemon that takes prepared devices, on made-up parts, each of whose steps can fail."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from support.fakes.device_parts import FakeBroker, FakeChild, ended_child
from support.fakes.step_machine import SIZE_BYTES, Machine, StepKernel, StepTeam, a_context
from ublkpool.bufpool import wire
from ublkpool.daemon.device import adoption, resources
from ublkpool.daemon.device.build import prepare
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.prepared import PreparedParts, is_reserved
from ublkpool.daemon.device.records import Record, Records
from ublkpool.daemon.device.team import Plan
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig

DEADLINE_S = 60
NULL = BackendConfig(kind="null", options={"size": "1M"})
VOL = DeviceConfig(name="vol", size_bytes=SIZE_BYTES, backend=NULL, isolation="none")
ATTACH = wire.Attach(v=1, device="vol", kind="null")
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


def new_machine(tmp_path: Path) -> TakingMachine:
    TakenTeam.made = []
    return TakingMachine(tmp_path / "devices", "")


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
