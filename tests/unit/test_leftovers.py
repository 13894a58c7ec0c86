"""An `add` that fails at any step leaves nothing: each step fails once, and what cleans up does not depend on it."""

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from support.fakes.states import FakeStates
from ublkpool.bufpool import wire
from ublkpool.daemon.device import resources as resources
from ublkpool.daemon.device.build import build
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.records import Records
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.control_process import ControlFailed
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.ublk.abi import Feature

DEADLINE_S = 20
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
    """What an `add` makes, and the step at which it fails; `gives_up` cancels it there instead."""

    def __init__(self, directory: Path, failing: str, gives_up: bool = False) -> None:
        self.failing, self.gives_up = failing, gives_up
        self.passed: list[str] = []
        self.kernel: dict[int, int] = {}
        """Marks of the kernel's devices, by their numbers."""
        self.held: set[str] = set()
        self.parts: set[str] = set()
        self.delete_failures = 0
        self.records = Records(directory)
        self.saves = 0

    def step(self, name: str) -> None:
        self.passed.append(name)
        if name == self.failing:
            if self.gives_up:
                raise asyncio.CancelledError
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def left(self) -> list[str]:
        """What is there, in words."""
        found = [f"kernel device {number}" for number in self.kernel]
        return found + sorted(self.held | self.parts) + [each.config.name for each in self.records.load()]


class FakeKernel:
    """A kernel device whose commands reach a `Machine`."""

    machine: Machine

    def __init__(self, number: int) -> None:
        self.number, self.mark = number, self.machine.kernel[number]
        self.node = Path("/nonexistent")
        self.info = SimpleNamespace(
            queues=2, depth=4, max_io_bytes=4096, flags=Feature.SHMEM_ZC, device_number=number
        )

    @classmethod
    async def create(cls, _runner: object, _config: object, _disk: object, mark: int) -> "FakeKernel":
        machine = cls.machine
        machine.step("ADD_DEV")
        machine.kernel[3] = mark
        machine.step("ADD_DEV after the kernel has made it")
        return cls(3)

    @classmethod
    async def find_marked(cls, _runner: object, _name: str, mark: int) -> "FakeKernel | None":
        return next((cls(number) for number, each in cls.machine.kernel.items() if each == mark), None)

    async def register(self, _area: object) -> bool:
        self.machine.step("registering the area")
        return True

    async def stop(self, _deadline_s: float) -> None:
        """Its workers end."""

    async def delete(self) -> None:
        if self.machine.delete_failures:
            self.machine.delete_failures -= 1
            raise ControlFailed("vol: DEL_DEV has hung for 60 s", 0)
        if self.machine.kernel.pop(self.number, None) is None:
            raise ControlFailed("vol: no such device", errno.ENODEV)


class Part:
    """A pool, an area, leases: there until it is closed."""

    def __init__(self, machine: Machine, name: str) -> None:
        self._machine, self._name = machine, name
        machine.parts.add(name)
        self.files = {0: -1}
        self.control_fd = self.data_fd = -1
        self.slice_bytes = 4096

    def record(self) -> None:
        return None

    def unlink(self) -> None:
        """Its name goes."""

    def close(self) -> Any:
        self._machine.parts.discard(self._name)


class FakeLeases(Part):
    """What the broker knows."""

    async def register(self, _epoch: int) -> None:
        self._machine.step("leases")

    async def close(self) -> None:
        super().close()


class FakeTeam:
    """Two workers that are there from their fork until they are ended."""

    machine: Machine

    def __init__(self, plan: object, epoch: int, *_: object) -> None:
        self.plan, self.epoch = plan, epoch
        self.workers: list[Any] = []

    async def fork(self) -> None:
        for queue, step in enumerate(("fork", "fork of a second worker")):
            self.machine.step(step)
            self.machine.parts.add(f"worker {queue}")
            self.workers.append(SimpleNamespace(queue=queue, fileno=lambda: -1, child=SimpleNamespace(pid=0)))

    async def ready(self) -> None:
        self.machine.step("ready")

    async def ended(self) -> None:
        await asyncio.Event().wait()

    async def end(self, _patience_s: float) -> None:
        for worker in self.workers:
            self.machine.parts.discard(f"worker {worker.queue}")

    kill = end

    def give_up(self) -> None:
        """Nothing waits."""

    async def lost(self) -> None:
        """Nothing was lent."""


def a_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Device:
    def hold(name: str, _fd: int) -> None:
        what = {"pool": "the pool", "slice": "the area", "worker": "a worker"}[name.split("/")[1]]
        machine.step(f"holding {what}")
        machine.held.add(name)

    def drop(name: str) -> None:
        machine.held = {each for each in machine.held if not each.startswith(name)}

    def make(step: str, name: str) -> Callable[..., Part]:
        def made(*_: object) -> Part:
            machine.step(step)
            return Part(machine, name)

        return made

    def save(record: Any) -> None:
        # Only what stands before a step that makes something has to be on record.
        steps = (
            "record before ADD_DEV",
            "record after ADD_DEV",
            "record before the fork",
            "record after the fork",
        )
        if not record.going and machine.saves < len(steps):
            machine.saves += 1
            machine.step(steps[machine.saves - 1])
        Records.save(machine.records, record)

    FakeKernel.machine = FakeTeam.machine = machine
    monkeypatch.setattr(resources, "BlockDevice", FakeKernel)
    monkeypatch.setattr(resources, "Team", FakeTeam)
    monkeypatch.setattr(resources, "ClientArea", SimpleNamespace(create=make("client area", "area")))
    monkeypatch.setattr(resources, "Leases", lambda *_: FakeLeases(machine, "leases"))
    context = SimpleNamespace(
        run_dir=Path("/nonexistent"),
        instance="unit",
        queue_dir=Path("/nonexistent"),
        group=None,
        build="",
        live_mounts=None,
        states=FakeStates(),
        boot_id="this boot",
        runner=None,
        broker=SimpleNamespace(endpoint="", child=SimpleNamespace(pid=0)),
        holder=SimpleNamespace(hold=hold, drop=drop),
        records=SimpleNamespace(save=save, forget=machine.records.forget),
    )
    device = Device(
        DeviceConfig(
            name="vol",
            size_bytes=SIZE_BYTES,
            client_buffers_bytes=8 * 4096,
            backend=BackendConfig(kind="memory"),
        ),
        cast(DaemonContext, context),
    )
    monkeypatch.setattr(device.parts.resources, "_make_arena", make("pool", "pool"))
    return device


async def start(device: Device) -> None:
    """What a backend that attaches brings about, up to its introduction to the workers."""
    async with device.parts.life.turn:
        await device._start(ATTACH, None)


def in_loop(test: Callable[[], Any]) -> None:
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


def test_every_step_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
