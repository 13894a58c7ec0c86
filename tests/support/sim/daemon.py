"""The supervisor's and the broker's processes in a simulation: the real `Device`, recovery, leases and broker.

What they stand on is made up here: control commands that reach a `SimKernel`, workers that are steps of the
simulation, a pool whose names nobody sees.  `Daemon` is one life of the supervisor.
"""

import asyncio
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

from support.fakes.device_parts import FakeBrokerChannel, FakeHolder
from support.fakes.queue_rig import DEVICE
from support.fakes.states import DirectRunner
from support.sim.backend import SimBackend, SimSession
from support.sim.control import ControlJob, SimControl, SimRunner
from support.sim.defects import REPLACED_BY, STATE_LOST, Replaced
from support.sim.kernel import SimKernel, Task
from support.sim.loop import Clock, SimLoop
from support.sim.wire import BrokerRouter, Killed, Life, PoolDealer
from support.sim.worker import PoolMemory, SimChild, SimWorker, SimWorkerProcess
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.huge_pages import HugePages
from ublkpool.bufpool.pool import broker_commands
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.broker import Broker
from ublkpool.bufpool.pool.control import ControlHeader, control_bytes
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.pool.memory import Data, make_data
from ublkpool.bufpool.sdk import doors, ring_links
from ublkpool.daemon.device import adoption, resources
from ublkpool.daemon.device import device as device_module
from ublkpool.daemon.device import parts as parts_module
from ublkpool.daemon.device.build import prepare
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.drain import NotDrained
from ublkpool.daemon.device.memory import MemoryBudget
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.prepared import PreparedParts
from ublkpool.daemon.device.records import Record, Records
from ublkpool.daemon.device.state import StateDirectory
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.kernel import block_device, device_commands
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.kernel.device_commands import Created
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.broker_process import BrokerProcess
from ublkpool.daemon.processes.held_names import session_names
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk.abi import DeviceState, Feature, Parameters

OPEN_PATIENCE_S = 30.0
_POLL_S = 0.02
_RUN_DIR = Path("/nonexistent/ublkpool")


class SimArena(Arena):
    """A pool in memory that has no name; the next supervisor opens the last one."""

    scenery: "Scenery"

    @classmethod
    def create(
        cls,
        prefix: str,
        geometry: Geometry,
        queues: int,
        device_number: int,
        reserve: Sequence[int],
        huge: HugePages = "off",
        data: Data | None = None,
    ) -> Self:
        size = control_bytes(queues, geometry.slot_count)
        control = os.memfd_create("sim", os.MFD_CLOEXEC)
        os.truncate(control, size)
        os.pwrite(control, ControlHeader(device_number, queues, geometry, tuple(reserve)).pack(), 0)
        data = make_data("the pool", geometry.total_bytes, "off") if data is None else data
        arena = cls(data.fd, control, prefix, "off")
        cls.scenery.pools.append(PoolMemory(arena, size))
        return arena

    @classmethod
    def open(cls, prefix: str, data_fd: int | None = None, huge: HugePages = "off") -> Self:
        last = cls.scenery.pools[-1].arena
        arena = cls(os.dup(last.data_fd), os.dup(last.control_fd), prefix, "off")
        cls.scenery.arenas.append(arena)
        return arena

    def replace_data(self, data: Data) -> None:
        super().replace_data(data)
        self.scenery.pools[-1].changed(self)

    def unlink(self) -> None:
        """The pool has no name to remove."""


class BrokerLife:
    """One life of the broker process: the real `Broker` on links in memory."""

    def __init__(self, dealers: list[PoolDealer], clock: Clock) -> None:
        self.life = Life()
        router = cast(Any, BrokerRouter(self.life, dealers))
        self.broker = Broker(router, cast(Any, None), False, clock)
        self.commands: deque[tuple[bytes, int | None, asyncio.Future[broker_commands.Reply]]] = deque()

    def turn(self, commands_first: bool) -> None:
        """Handle a command or the workers' messages, then ask the due questions.  Raises `Killed`."""
        if self.commands and commands_first:
            packet, fd, answer = self.commands[0]
            reply = self.broker._command(packet, [] if fd is None else [fd], 0)
            self.commands.popleft()
            if not answer.done() and reply is not None and not answer.get_loop().is_closed():
                answer.set_result(reply)
        else:
            self.broker._on_router()
        self.broker._ask()

    def end(self) -> None:
        """The process is gone."""
        self.life.alive = False
        self.broker.close()
        for _, _, answer in self.commands:
            if not answer.done() and not answer.get_loop().is_closed():
                answer.set_exception(PoolError("the pool broker is gone"))
        self.commands.clear()


class SimHolder(Holder):
    """Keeps sockets over a supervisor's death; in a simulation only a backend's could be closed."""

    def __init__(self, hold_backend: Callable[[int], None], drop_backend: Callable[[], None]) -> None:
        self._hold_backend, self._drop_backend = hold_backend, drop_backend

    def hold(self, name: str, fd: int) -> None:
        if name == session_names("sim")[0]:
            self._hold_backend(fd)

    def drop(self, name: str) -> None:
        if name == session_names("sim")[0]:
            self._drop_backend()


class LeftBehind(NamedTuple):
    """A supervisor's record for the next one; see `records.Record`."""

    config: DeviceConfig
    device_number: int
    device_mark: int
    disk: Disk
    epoch: int
    live: bool
    segments: int
    workers: "list[SimWorker]"
    backend: SimBackend | None
    segment: int
    broker: BrokerLife | None
    going: bool = False
    clients: None = None
    served: None = None
    processes: tuple[()] = ()
    data_lost: str = ""
    added: DeviceConfig | None = None
    drained: bool = False
    drain_is_open: bool = False
    managed: None = None

    @property
    def may_go_on(self) -> bool:
        """See `succession.may_go_on`."""
        return self.live and bool(self.workers) and all(each.life.alive for each in self.workers)


class SimAdoptedDevice:
    """What `succession.AdoptedDevice` finds."""

    def __init__(self, kernel: BlockDevice, left: LeftBehind) -> None:
        self.kernel, self._left = kernel, left
        self.workers = left.workers
        self.held: Mapping[str, int] = {}

    @classmethod
    async def of(cls, left: LeftBehind, _held: object, runner: ControlRunner) -> "SimAdoptedDevice":
        kernel = await SimBlockDevice.find(runner, left.config.name, left.device_number, left.device_mark)
        if kernel is None or kernel.info.state != DeviceState.LIVE:
            raise DaemonError("the kernel has no such device that is live")
        return cls(kernel, left)

    @property
    def record(self) -> LeftBehind:
        return self._left

    def session(self) -> SimSession | None:
        backend = self._left.backend
        if backend is None or not backend.is_held:
            return None
        session = backend.session = SimSession(backend, backend.attach)
        session.segment = self._left.segment
        if backend.ended:
            session.ended()
        return session


class SimBrokerProcess(BrokerProcess):
    """The real one, whose process is a step of the simulation."""

    def __init__(
        self, begin: Callable[[SimChild, BrokerLife | None], BrokerLife], end: Callable[[], None]
    ) -> None:
        self._begin, self._end = begin, end
        super().__init__("ipc:///nonexistent/ublkpool/broker", FakeHolder())

    def _start(self) -> None:
        self._be(None)

    def go_on_with(self, life: BrokerLife) -> None:
        """What `adopt` does with an earlier daemon's broker that answers."""
        self._be(life)
        self.adopted_generation = self.generation

    async def be_reachable(self) -> None:
        """It has no socket that could be removed."""

    def _be(self, life: BrokerLife | None) -> None:
        self._channel = FakeBrokerChannel()
        self.child = SimChild("pool broker", self._end)
        self.process = self._begin(self.child, life)
        self.generation += 1

    async def command(self, command: broker_commands.Command, fd: int | None = None) -> broker_commands.Reply:
        async with self._turn:
            if not self.process.life.alive:
                raise PoolError("the pool broker is gone")
            answer: asyncio.Future[broker_commands.Reply] = asyncio.get_running_loop().create_future()
            self.process.commands.append((broker_commands.encode(command), fd, answer))
            reply = await answer
        if isinstance(reply, broker_commands.Failed):
            raise PoolError(f"pool broker: {reply.reason}")
        return reply


class Scenery(NamedTuple):
    """The parts of the simulation that a daemon's parts need."""

    kernel: SimKernel
    clock: Clock
    rng: random.Random
    config: DeviceConfig
    pools: list[PoolMemory]
    arenas: list[Arena]
    begin_workers: Callable[[Team, list[Task]], list[SimWorker]]
    end_worker: Callable[[SimWorker], None]
    begin_broker: Callable[[SimChild, BrokerLife | None], BrokerLife]
    end_broker: Callable[[], None]
    end_backend: Callable[[], None]
    hold_backend: Callable[[int], None]
    drop_backend: Callable[[], None]
    save: Callable[[LeftBehind], None]
    jobs: list[ControlJob]
    defect: str
    queue_dir: Path
    state_dir: Path
    slow_state: bool


class SimTeam(Team):
    """The real one; `fork` makes processes of the simulation."""

    scenery: Scenery

    async def fork(self) -> None:
        until_s = asyncio.get_running_loop().time() + OPEN_PATIENCE_S
        tasks = [Task(queue, self.epoch) for queue in range(self.plan.kernel.info.queues)]
        while True:
            try:
                self.scenery.kernel.open(tasks)
                break
            except OSError as error:
                if asyncio.get_running_loop().time() > until_s:
                    raise DaemonError("/dev/ublkcN is held by somebody") from error
            await asyncio.sleep(_POLL_S)
        for worker in self.scenery.begin_workers(self, tasks):
            self.workers.append(SimWorkerProcess(worker, self.scenery.end_worker, self._on_news))

    def adopt(self, left: Sequence[Any]) -> None:
        for worker in left:
            if not worker.life.alive:
                raise ProcessLookupError
            self.workers.append(SimWorkerProcess(worker, self.scenery.end_worker, self._on_news))

    def worker_spec(self, queue: int) -> Any:
        return self._spec(queue, None)

    def hear(self) -> None:
        for each in self.workers:
            cast(SimWorkerProcess, each).hear()


class SimBlockDevice(BlockDevice):
    """The real one, without a node."""

    scenery: Scenery

    @classmethod
    def _made(cls, runner: ControlRunner, name: str) -> "SimBlockDevice":
        control = SimControl(cls.scenery.kernel)
        info = control.device_info(0)
        found: dict[str, Any] = {
            "info": info,
            "queue_cpus": [[0]] * info.queues,
            "features": Feature(control.get_features()),
            "size_bytes": control.disk_bytes(0),
        }
        return cls(runner, name, Created(**{name: found[name] for name in Created._fields}))

    @classmethod
    async def create(
        cls, runner: ControlRunner, config: DeviceConfig, disk: Parameters | None, mark: int | None = None
    ) -> "BlockDevice":
        if disk is not None:
            cls.scenery.kernel.size_bytes = disk.size_bytes
        return cls._made(runner, config.name)

    @classmethod
    async def find(cls, runner: ControlRunner, name: str, number: int, mark: int) -> "BlockDevice | None":
        return cls._made(runner, name)

    async def wait_for_node(self) -> None:
        """The disk has no node."""

    async def publish_name(self) -> None:
        """No udev runs in the simulation."""

    async def set_io_timeout(self, timeout_ms: int) -> None:
        """The simulation decides when the driver looks."""


class SimBackground(Background):
    """The real one; a task's failure fails the run."""

    def _finished(self, task: "asyncio.Task[None]") -> None:
        super()._finished(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Killed | NotDrained):
            cast(SimLoop, task.get_loop()).failures.append(repr(error))


class SimDeviceParts(DeviceParts):
    """The real ones, whose records are no files."""

    scenery: Scenery

    def save(self) -> None:
        team, disk, life = self.team, self.resources.disk, self.life
        if team is None or disk is None or life.state == "failed":
            return
        session = cast(SimSession | None, self.backend.session)
        self.scenery.save(
            LeftBehind(
                config=self.config,
                device_number=DEVICE,
                device_mark=0,
                disk=disk,
                epoch=team.epoch,
                live=life.state == "live" and not life.is_stopping,
                segments=self.backend.segments,
                workers=[cast(SimWorkerProcess, each).worker for each in team.workers],
                backend=session.backend if session else None,
                segment=session.segment if session else 0,
                broker=self._known_broker(),
                going=life.is_stopping,
                drained=self.drain == "drained",
                drain_is_open=self.drain == "drained" and self.resources.hold_gate is not None,
            )
        )

    def _known_broker(self) -> BrokerLife | None:
        if self._broker_pid() is None:
            return None
        return cast(SimBrokerProcess, self.context.broker).process

    @property
    def team(self) -> SimTeam | None:
        return cast(SimTeam | None, self.resources.team)


class SimDevice(Device):
    """The real one, as the simulation looks at it."""

    @property
    def team(self) -> SimTeam | None:
        return cast(SimDeviceParts, self.parts).team


class SimRecords(Records):
    """Records that `SimDeviceParts.save` keeps in memory."""

    def save(self, record: Record) -> None:
        """Of a prepared device: no supervisor dies before a device has taken it."""

    def forget(self, name: str) -> None:
        """The simulation never looks for the record of a device that is gone."""


class SimContext(DaemonContext):
    """A daemon in which only the directories of state and queues are real."""

    def __init__(self, scenery: Scenery, runner: SimRunner, broker: SimBrokerProcess) -> None:
        self.run_dir, self.queue_dir = _RUN_DIR, scenery.queue_dir
        self.instance, self.boot_id, self.build = "sim", "this boot", ""
        self.is_privileged, self.offered = True, -1
        self.group = self.live_mounts = self.account = self.template = None
        self.worker_template = None
        self.configured = {}
        self.runner, self.broker = runner, broker
        self.holder = SimHolder(scenery.hold_backend, scenery.drop_backend)
        self.states = StateDirectory(scenery.state_dir, runner if scenery.slow_state else DirectRunner())
        self.records = SimRecords(_RUN_DIR)
        self.events = Events()
        self.budget = MemoryBudget()


class SimTime:
    """Stands for the `time` module, with the simulation's clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def monotonic(self) -> float:
        return self._clock.now_s


class Daemon:
    """One life of the supervisor, with one device."""

    def __init__(self, scenery: Scenery, broker_life: BrokerLife | None = None) -> None:
        self.loop = SimLoop(scenery.clock)
        self.scenery = scenery
        self._broker_life = broker_life
        self._prepared: PreparedParts | None = None
        asyncio.set_event_loop(None)
        self._run_now(self._begin)

    def _begin(self) -> None:
        scenery = self.scenery
        self.broker = SimBrokerProcess(scenery.begin_broker, scenery.end_broker)
        if self._broker_life is None:
            self.broker.start()
        else:
            self.broker.go_on_with(self._broker_life)
        if scenery.defect == STATE_LOST:
            for file in scenery.state_dir.iterdir():
                file.unlink()
        runner = SimRunner(scenery.rng, scenery.jobs, scenery.defect)
        self._context = SimContext(scenery, runner, self.broker)
        self.device = self._new_device(scenery.config)
        restarted = self.broker.keep_running(lambda: self.device.broker_restarted())
        self.broker_watch = self.loop.create_task(restarted)

    def _new_device(self, config: DeviceConfig) -> SimDevice:
        return SimDevice(config, self._context, self._take)

    async def prepare(self) -> bool:
        """Prepare what the device takes."""
        self._prepared = PreparedParts(self.scenery.config, self._context)
        await prepare(self._prepared)
        return True

    def _take(self, config: DeviceConfig, disk: Disk) -> PreparedParts | None:
        prepared, self._prepared = self._prepared, None
        assert prepared is None or prepared.fits(config, disk)
        return prepared

    async def take_over(self, left: LeftBehind, goes_on: bool, end_left: Callable[[], None]) -> bool:
        """As `takeover.TakeOver` does with one device: go on with what was left, or recover it."""
        record = cast(Any, left)
        self.device = self._new_device(left.config)
        self.device.await_takeover(record)
        if goes_on:
            try:
                await self.device.go_on(record, {})
                return True
            except (DaemonError, PoolError, OSError):
                self.device.abandon()
                end_left()
                with suppress(PoolError):
                    await self.broker.forget_all_but([])
                self.device = self._new_device(left.config)
                self.device.await_takeover(record)
        return await self.device.recover_left(record, {})

    def _run_now(self, work: Callable[[], None]) -> None:
        """Call this with the loop running."""
        failures: list[BaseException] = []

        def call() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        self.loop.call_soon(call)
        self.loop.turn()
        if failures:
            raise failures[0]

    def spawn(self, make: Callable[[], Any]) -> "asyncio.Task[Any]":
        """Run a coroutine on the daemon's loop."""
        found: list[asyncio.Task[Any]] = []
        self._run_now(lambda: found.append(self.loop.create_task(make())))
        return found[0]

    def turn(self) -> None:
        """One turn of its loop."""
        for parts in (self.device.parts, self._prepared):
            if parts is not None and parts.resources.team is not None:
                cast(SimTeam, parts.resources.team).hear()
        self.loop.turn()
        assert not self.loop.failures, self.loop.failures


def _ender(scenery: Scenery) -> Callable[..., Any]:
    async def end_left(_records: object, spare: object) -> None:
        scenery.end_backend()

    return end_left


@contextmanager
def patched(scenery: Scenery) -> Iterator[None]:
    """Replace what the daemon's modules stand on by the simulation."""
    SimArena.scenery = SimTeam.scenery = SimBlockDevice.scenery = SimDeviceParts.scenery = scenery
    replaced: list[Replaced] = [
        (device_module, "DeviceParts", SimDeviceParts),
        (parts_module, "Background", SimBackground),
        (resources, "Arena", SimArena),
        (resources, "BlockDevice", SimBlockDevice),
        (resources, "Team", SimTeam),
        (adoption, "AdoptedDevice", SimAdoptedDevice),
        (adoption, "BlockDevice", SimBlockDevice),
        (adoption, "end_left", _ender(scenery)),
        (block_device, "control", SimControl(scenery.kernel)),
        (device_commands, "control", SimControl(scenery.kernel)),
        (ring_links, "time", SimTime(scenery.clock)),
        # Without this a machine that stood still for half a minute of real time would end a backend.
        (doors, "time", SimTime(Clock())),
        *REPLACED_BY.get(scenery.defect, ()),
    ]
    saved = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
