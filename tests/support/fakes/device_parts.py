"""The parts of a device, made up for unit tests: backends, workers and a kernel that do what the test says.

Subclasses of the real parts, so that mypy checks each against what it stands for.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from support.fakes.states import FakeStates
from ublkpool.bufpool import wire
from ublkpool.bufpool.pool import broker_commands
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.state import StateDirectory
from ublkpool.daemon.device.team import Plan, Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.kernel.device_commands import Created
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.processes.broker_process import BrokerProcess
from ublkpool.daemon.processes.channel import Channel
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.left_behind import Process, Role, identify
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk.abi import DeviceInfo, Feature

SIZE_BYTES = 1 << 20
DISK = Disk(size_bytes=SIZE_BYTES, block_bytes=512, volatile_cache=False, read_only=False)


class FakeHolder(Holder):
    """Notes the names of what it is given."""

    def __init__(self) -> None:
        self.held: set[str] = set()

    def hold(self, name: str, fd: int) -> None:
        self.held.add(name)

    def drop(self, name: str) -> None:
        self.held = {each for each in self.held if each != name and not each.startswith(f"{name}/")}


class FakeChild(Child):
    """A process that is never signalled; it ends when `ended` has its exit status, if that is given."""

    def __init__(self, pid: int = 0, ended: "asyncio.Future[int] | None" = None) -> None:
        self.pid, self._pidfd = pid, -1
        if ended is not None:
            self._exited = ended

    def identified(self, role: Role) -> Process | None:
        """The process that has its number now."""
        return identify(role, self.pid)


def ended_child(status: int) -> FakeChild:
    """A process that has ended."""
    ended = asyncio.get_running_loop().create_future()
    ended.set_result(status)
    return FakeChild(ended=ended)


class FakeWorkerProcess(WorkerProcess):
    """A worker without a socket."""

    def __init__(self, queue: int, child: Child) -> None:
        self.queue, self.child, self.fault, self.is_excluded = queue, child, "", False


class FakeBrokerChannel(Channel[broker_commands.Command, broker_commands.Reply]):
    """A broker's connection without a socket."""

    def __init__(self) -> None:
        """Nothing is opened."""

    def close(self) -> None:
        """Nothing is open."""


class FakeBroker(BrokerProcess):
    """A broker without a process."""

    def __init__(self) -> None:
        self.endpoint = "ipc://nowhere"
        self.child = FakeChild()

    async def be_reachable(self) -> None:
        """Its socket is there."""


class FakeSession(Session):
    """An attached backend, process 1 of user 33, that is gone when the test says so."""

    def __init__(self, kind: str = "file", token: bytes = b"\x01token") -> None:
        self.attach = wire.Attach(v=1, device="vol", kind=kind)
        self.pid, self.uid, self.segment, self.segment_fd = 1, 33, 0, None
        self.token = token
        self.leaving = self.was_cut_off = False
        self._gone = asyncio.get_running_loop().create_future()

    @property
    def is_leaving(self) -> bool:
        return self.leaving

    def dies(self) -> None:
        if not self._gone.done():
            self._gone.set_result(None)

    async def cut_off(self) -> None:
        self.was_cut_off = True
        self.dies()

    def say(self, message: wire.DaemonMessage, fds: list[int] | None = None) -> None:
        """Its connection leads nowhere."""

    def entrust(self, message: wire.DaemonMessage, fds: Sequence[int]) -> None:
        """It maps nothing."""

    def close(self, is_kept: bool = False) -> None:
        """It has no descriptor."""

    def fileno(self) -> int:
        return -1


class FakeKernel(BlockDevice):
    """Kernel device 3 with two queues.

    `io_timeouts_ms` are those that were set; `times_named`: how often udev was told of the disk.
    """

    def __init__(self) -> None:
        info = DeviceInfo(
            queues=2, depth=4, max_io_bytes=4096, device_number=3, server_pid=1, flags=Feature(0)
        )
        super().__init__(ControlRunner(), "vol", Created(info, [[0], [0]], Feature(0)))
        self.node = Path("/dev/null")
        self.is_started = True
        self.io_timeouts_ms: list[int] = []
        self.times_named = 0

    async def set_io_timeout(self, timeout_ms: int) -> None:
        self.io_timeouts_ms.append(timeout_ms)

    async def publish_name(self) -> None:
        self.times_named += 1

    async def stop(self, deadline_s: float) -> None:
        """STOP_DEV has nothing to wait for."""

    async def delete(self) -> None:
        """DEL_DEV succeeds."""


class FakeTeam(Team):
    """Workers that note what they are told.  `missing` are the queues that no backend has greeted."""

    def __init__(
        self, kernel: BlockDevice | None = None, epoch: int = 1, missing: Sequence[int] = ()
    ) -> None:
        made = kernel or FakeKernel()
        plan = FakePlan(
            DeviceConfig(name="vol"), made, cast(Arena, None), DISK, "", Path("/nonexistent"), None
        )
        super().__init__(plan, epoch, lambda *_: None)
        self.heard: list[str] = []
        self.missing = list(missing)
        self.kills_at_once = ""
        """The kind of backend that dies when the workers are told of it."""
        self._changed = asyncio.Event()
        self._has_ended = False

    def whole_check(self) -> Call:
        return Call(lambda _: None, fds=[-1])

    async def expect(self, session: Session, fence: bool) -> None:
        await asyncio.sleep(0)
        self.heard.append(f"expect {session.attach.kind}")
        if session.attach.kind == self.kills_at_once:
            cast(FakeSession, session).dies()

    async def lost(self) -> None:
        await asyncio.sleep(0)
        self.heard.append("lost")

    def attached(self, session: Session) -> wire.Attached:
        return cast(wire.Attached, None)

    def unlinked(self) -> list[int]:
        return list(self.missing)

    async def linked(self) -> None:
        while self.missing and not self._has_ended:
            self._changed.clear()
            await self._changed.wait()
        if self._has_ended:
            raise DaemonError("queue 0: its worker ended")

    async def ended(self) -> WorkerProcess:
        await asyncio.Event().wait()
        raise AssertionError

    def greeted(self, *queues: int) -> None:
        self.missing = [each for each in self.missing if each not in queues]
        self._changed.set()

    def ends(self) -> None:
        self._has_ended = True
        self._changed.set()


class FakePlan(Plan):
    """A plan whose pool has no descriptor."""

    @contextmanager
    def descriptors(self) -> Iterator[list[int]]:
        yield []


class FakeParts(DeviceParts):
    """The real parts, of which nothing is recorded."""

    def save(self) -> None:
        """There is no record."""


def fake_context(holder: Holder | None = None) -> DaemonContext:
    """A daemon that started nothing."""
    keeping = holder or FakeHolder()
    return DaemonContext(
        Path("/nonexistent"),
        "unit",
        None,
        ControlRunner(),
        FakeBroker(),
        keeping,
        cast(StateDirectory, FakeStates()),
    )


def fake_device(config: DeviceConfig | None = None) -> Device:
    """A device on a daemon that started nothing, without a record."""
    device = Device(config or DeviceConfig(name="vol", size_bytes=SIZE_BYTES), fake_context())
    device.parts.save = lambda: None  # type: ignore[method-assign]
    return device


async def turn() -> None:
    """Let every task of the loop do what it can."""
    for _ in range(50):
        await asyncio.sleep(0)
