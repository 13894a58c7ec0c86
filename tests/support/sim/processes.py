"""The processes of a simulated device: how workers, broker, backend and supervisor come, take turns, and go.

Owns who lives, and the connections between them.  What clients and the driver do, who is killed when, and what must
hold is `device_world.py`'s.
"""

import os
import random
import tempfile
from collections import Counter, deque
from pathlib import Path
from typing import Any, Literal

import msgspec

from support.fakes.backend import Store
from support.fakes.driver import SECTOR_BYTES
from support.fakes.queue_rig import POISON
from support.sim.backend import SimBackend, SimSession
from support.sim.control import ControlJob
from support.sim.daemon import BrokerLife, Daemon, LeftBehind, Scenery, SimTeam
from support.sim.defects import COMMANDS_LIVE_ON
from support.sim.kernel import Model, SimKernel, Task
from support.sim.loop import Clock
from support.sim.wire import Killed, PoolDealer, lose_back, lose_front
from support.sim.witness import Witness
from support.sim.worker import PoolMemory, SimChild, SimWorker
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.open_files import reopened
from ublkpool.daemon.settings.config import DeviceConfig

SECTORS = 256
MAX_IO_BYTES = 8192
IO_TIMEOUT_S = 3600.0
"""Longer than any run without a pause."""
KILLED = 137
_NO_DIR = Path("/nonexistent/ublkpool/queues")
TRACE_LINES = 40
Victim = Literal["worker", "backend", "broker", "supervisor"]


WORKER_COUNTERS = (
    "replays",
    "rescues",
    "stale_answers",
    "violations",
    "requeues",
    "buffers_waited",
    "posts_used",
)


class DeviceScenario(msgspec.Struct, frozen=True, kw_only=True):
    """What a seed plays; `defect` is put in on purpose."""

    model: Model
    queues: int
    depth: int
    block_bytes: int
    need_get_data: bool
    place_in_backend: bool
    reads_own: bool
    lies: bool
    steps: int
    kills: tuple[Victim, ...]
    rings: bool = False
    """Whether descriptors travel in shared memory, or over ZeroMQ."""
    posts: bool = False
    """Whether backends post regions ahead, where writes are placed in theirs."""
    scarce: bool = False
    """Whether a backend has fewer regions than there are tags, so that requests wait for one."""
    pauses: bool = False
    """Whether all processes stop now and then for longer than any deadline, and a late backend is cut off."""
    slow_state: bool = False
    """Whether writing a device's state takes a separate process some steps; else it takes none."""
    iops_max: int = 0
    bytes_per_s_max: int = 0
    prepared: bool = False
    """Whether the device's first team was prepared before it."""
    defect: str = ""
    blind: bool = False
    """The witness is off, so that only wrong data shows a defect."""


class Stranger:
    """A process that was given a backend's memory, outlives it, and writes there when another backend serves."""

    def __init__(self, pool: PoolMemory, backend: SimBackend) -> None:
        self._memory, self._fd = pool.view, reopened(pool.arena.data_fd)
        self.backend = backend

    def scribble(self, rng: random.Random) -> None:
        start = rng.randrange(len(self._memory))
        part = self._memory[start : start + MAX_IO_BYTES]
        part[:] = bytes([POISON]) * len(part)

    def close(self) -> None:
        os.close(self._fd)


class Processes:
    """The processes, which can be killed, and the kernel, which cannot; every choice comes from `rng`."""

    first_sectors = SECTORS
    """The config's size of the device."""

    def __init__(self, scenario: DeviceScenario, rng: random.Random) -> None:
        self.scenario, self.rng = scenario, rng
        self.clock = Clock()
        self.witness = Witness(scenario.blind)
        self.kernel = SimKernel(
            scenario.model,
            scenario.queues,
            scenario.depth,
            scenario.block_bytes,
            MAX_IO_BYTES,
            scenario.need_get_data,
            self.witness,
        )
        self.config = DeviceConfig(
            name="sim",
            size_bytes=self.first_sectors * SECTOR_BYTES,
            queues=scenario.queues,
            depth=scenario.depth,
            max_io_bytes=MAX_IO_BYTES,
            need_get_data=scenario.need_get_data,
            placement="backend" if scenario.place_in_backend else "pool",
            rings=scenario.rings,
            io_timeout_s=IO_TIMEOUT_S,
            on_timeout="fail" if scenario.pauses else "wait",
            iops_max=scenario.iops_max,
            bytes_per_s_max=scenario.bytes_per_s_max,
        )
        # In memory: a simulation has no power failures.
        self.state_dir = Path(tempfile.mkdtemp(prefix="ublkpool-sim-state-", dir="/dev/shm"))
        self._queue_dir = Path(tempfile.mkdtemp(prefix="ublkpool-sim-")) if scenario.rings else _NO_DIR
        self.store = Store(0, SECTORS * SECTOR_BYTES)
        self.workers: list[SimWorker] = []
        self.all_workers: list[SimWorker] = []
        self.strangers: list[Stranger] = []
        self.dealers: list[PoolDealer] = []
        self.backend: SimBackend | None = None
        self.broker: BrokerLife | None = None
        self.broker_child: SimChild | None = None
        self.left: LeftBehind | None = None
        self.daemon: Daemon | None = None
        self.daemons: list[Daemon] = []
        self.backends: list[SimBackend] = []
        self.zombies: list[SimBackend] = []
        """Backends that live on although the other processes take them for dead; only a defect makes them."""
        self.adopting: Any = None
        self.jobs: list[ControlJob] = []
        self.arenas: list[Arena] = []
        self._last_live_epoch = 0
        self._dies_in_fork = self._died_in_fork = False
        self.limit = 0
        self.ending = self.deleting = False
        self.trace: deque[str] = deque(maxlen=TRACE_LINES)
        self.step = 0
        self.counts = Counter[str]()
        self._scenery = Scenery(
            self.kernel,
            self.clock,
            rng,
            self.config,
            self.witness.pools,
            self.arenas,
            self._begin_workers,
            self._end_worker,
            self._begin_broker,
            self._end_broker,
            self._end_backend,
            self._hold_backend,
            self._drop_backend,
            self._save,
            self.jobs,
            scenario.defect,
            self._queue_dir,
            self.state_dir,
            scenario.slow_state,
        )

    def note(self, text: str) -> None:
        self.trace.append(f"{self.step} {self.clock.now_s:.2f}s: {text}")

    # Workers

    def _begin_workers(self, team: Team, tasks: list[Task]) -> list[SimWorker]:
        assert isinstance(team, SimTeam)
        self.counts["epochs"] += 1
        self.counts["hurt recoveries"] += self.daemon is not None and team.epoch > self._last_live_epoch + 1
        self.note(f"epoch {team.epoch} begins")
        made: list[SimWorker] = []
        lives_for = self.rng.randrange(len(tasks) + 1) if self._dies_in_fork else len(tasks) + 1
        for task in tasks:
            if len(made) == lives_for:
                break
            worker = SimWorker(
                team.worker_spec(task.queue),
                task,
                self.kernel,
                self.witness.pools[-1],
                self.clock,
                self._segment_base,
                self.rng,
                self.scenario.defect,
            )
            self.witness.scratch_of[task] = worker.scratch
            self.witness.pool_at[task] = worker.pool_address
            self.all_workers.append(worker)
            self.dealers.append(worker.context.pool)
            made.append(worker)
        self.workers.extend(made)
        if self._dies_in_fork:
            self.kernel.openers.difference_update(tasks[len(made) :])
            self._died_in_fork = True
            raise Killed
        return made

    def _segment_base(self, token: str) -> Any:
        return next(each.own.base for each in self.backends if each.token.hex() == token)

    def _work(self) -> None:
        if not self.workers:
            return
        worker = self.rng.choice(self.workers)
        status = worker.turn()
        if status is not None:
            self._worker_ended(worker, status)

    def _end_worker(self, worker: SimWorker) -> None:
        """SIGKILL; the process ends now."""
        if worker.life.alive:
            self._worker_ended(worker, KILLED)

    def _worker_ended(self, worker: SimWorker, status: int) -> None:
        for name in WORKER_COUNTERS:
            self.counts[name] = max(self.counts[name], worker.counter(name))
        killed = f"killed, fault {worker.queue.fault()}" if status else "its tags are gone"
        self.note(f"{worker.task} ends: {status} ({killed})")
        assert not worker.has_fault(), f"{worker.task}: {worker.queue.fault()}"
        worker.life.alive = False
        self.workers.remove(worker)
        self.kernel.exit(worker.task)
        self.witness.worker_ended(worker.task)
        self._cut_links(worker)
        worker.loop.die()
        team = self.daemon.device.team if self.daemon else None
        for each in team.workers if team else ():
            if getattr(each, "worker", None) is worker and isinstance(each.child, SimChild):
                each.child.exited(status)

    def _cut_links(self, worker: SimWorker) -> None:
        queue, dealer = worker.task.queue, worker.context.pool
        lose_back(dealer.outbox, self.rng)
        dealer.inbox.clear()
        if not dealer.connected:
            dealer.outbox.clear()
        peer = worker.context.backend.peer
        if isinstance(peer, SimBackend) and peer.attachment is not None:
            lose_front(peer.outbox[queue], self.rng)
            lose_back(peer.inbox[queue], self.rng)
            peer.link_events.append((queue, False))

    def _connect(self) -> None:
        """A connection gets made: of a worker to the broker, or of the backend to a worker."""
        if not self.workers:
            return
        worker = self.rng.choice(self.workers)
        if self.broker is not None:
            worker.context.pool.connected = True
        router, backend = worker.context.backend, self.backend
        link = worker.loop.backend_link
        if (
            isinstance(router.peer, SimBackend)
            and router.peer.ended
            and not router.peer.outbox[worker.task.queue]
        ):
            router.peer = None
        if self.scenario.rings:
            return
        if router.peer is None and link.is_bound and backend is not None and backend.attachment is not None:
            router.peer = backend
            backend.link_events.append((worker.task.queue, True))

    # The broker

    def _begin_broker(self, child: SimChild, life: BrokerLife | None) -> BrokerLife:
        self.broker, self.broker_child = life or BrokerLife(self.dealers, self.clock), child
        return self.broker

    def _lease(self) -> None:
        self.dealers[:] = [
            each for each in self.dealers if each.life.alive or (each.connected and each.outbox)
        ]
        if self.broker is None:
            return
        try:
            self.broker.turn(self.rng.random() < 0.5)
        except Killed:
            self._end_broker()

    def _end_broker(self) -> None:
        if self.broker is None or self.broker_child is None:
            return
        self.note("the broker dies")
        self.broker.end()
        self.broker_child.exited(KILLED)
        for each in self.dealers:
            if each.connected:
                each.connected = False
                lose_front(each.outbox, self.rng)
                lose_back(each.inbox, self.rng)
        self.broker = None

    # The backend

    def _serve(self) -> None:
        if self.backend is None:
            self._begin_backend()
            return
        try:
            if self.backend.life.alive:
                self.backend.turn()
        except Killed:
            self._end_backend()
            return
        if self.backend.is_zombie:
            self.zombies.append(self.backend)
            self._forget_backend(self.backend)
        elif self.backend.kill_pending and self.rng.random() < 0.3:
            self._end_backend()

    def _execute(self) -> None:
        self._interfere()
        for each in self.zombies:
            each.execute()
        if self.backend is not None and self.backend.life.alive:
            try:
                self.backend.execute()
            except Killed:
                self._end_backend()

    def _interfere(self) -> None:
        """A stranger from an earlier backend writes to the memory that it was given, or ends."""
        served = self.backend is not None and self.backend.attachment is not None
        for each in list(self.strangers):
            if served and self.backend is not each.backend:
                each.scribble(self.rng)
            if self.rng.random() < 0.01:
                self._end_stranger(each)

    def _end_stranger(self, stranger: Stranger) -> None:
        self.strangers.remove(stranger)
        stranger.close()

    def _begin_backend(self) -> None:
        daemon = self.daemon
        if daemon is None or self.deleting or self.adopting is not None or self.rng.random() < 0.5:
            return
        scenario = self.scenario
        own = scenario.place_in_backend or scenario.reads_own
        tags = scenario.queues * scenario.depth
        cells = max(1, tags // 2) if scenario.scarce else 2 * tags if scenario.posts else tags
        attach = wire.Attach(
            v=wire.PROTOCOL_VERSION,
            device="sim",
            kind="sim",
            logical_block_bytes=scenario.block_bytes,
            volatile_cache=True,
            placement="any",
            read_buffers="own" if scenario.reads_own else "pool",
            segment_bytes=cells * MAX_IO_BYTES if own else 0,
            identity=wire.Identity(value="the store of the simulation"),
        )
        attach = self._offered(attach, daemon)
        backend = SimBackend(
            1 + len(self.backends),
            self.witness,
            self.store,
            attach,
            cells,
            self.rng,
            self.clock,
            scenario.lies,
            scenario.defect,
            scenario.posts,
        )
        self.backend = backend
        self.backends.append(backend)
        self.witness.segments.append(backend.own)
        self.note(f"backend {backend.pid} comes")

        async def admit() -> None:
            backend.session = SimSession(backend, attach)
            if backend.ended:
                backend.session.ended()
            try:
                await daemon.device.attach(backend.session)
            except (PoolError, DaemonError) as error:
                self.note(f"backend {backend.pid} is refused: {error}")
                backend.session.say(wire.Refused(reason=str(error)))
                backend.session.close()

        daemon.spawn(admit)

    def _offered(self, attach: wire.Attach, daemon: Daemon) -> wire.Attach:
        """What a backend attaches with."""
        return attach

    def _end_backend(self) -> None:
        backend = self.backend
        if backend is None:
            return
        self.note(f"backend {backend.pid} ends")
        backend.life.alive = False
        if backend.attachment is not None and self.rng.random() < 0.3:
            self.strangers.append(Stranger(self.witness.pools[-1], backend))
        backend.forget()
        self._forget_backend(backend)

    def _hold_backend(self, pid: int) -> None:
        self.backends[pid - 1].is_held = True

    def _drop_backend(self) -> None:
        """The holder lets go of the connection of the backend that was taken leave of."""
        for each in self.backends:
            each.is_held = False

    def _forget_backend(self, backend: SimBackend) -> None:
        """The backend has ended; with a defect the other processes only believe that."""
        backend.ended = True
        self.backend = None
        for worker in self.workers:
            router = worker.context.backend
            if router.peer is backend:
                # Messages from it may still be read; messages to it are lost.
                lose_back(backend.outbox[worker.task.queue], self.rng)
                if not backend.outbox[worker.task.queue]:
                    router.peer = None
        if backend.session is not None and not (self.daemon is None or self.daemon.loop.dead):
            backend.session.ended()

    # The supervisor

    def _begin_daemon(self, broker: BrokerLife | None = None) -> Daemon:
        self.daemon = daemon = Daemon(self._scenery, broker)
        self.daemons.append(daemon)
        return daemon

    def _prepare(self) -> None:
        """Make what the device takes; no backend comes before that."""
        assert self.daemon is not None
        self.adopting = self.daemon.spawn(self.daemon.prepare)

    def _save(self, left: LeftBehind) -> None:
        self.left = left

    def _supervise(self) -> None:
        if self.daemon is None:
            if self.ending or self.rng.random() < 0.1:
                self._next_daemon()
            return
        self.daemon.turn()
        if self._died_in_fork:
            self.counts["supervisor killed in a fork"] += 1
            self._kill_supervisor()
            return
        if self.adopting is not None and self.adopting.done():
            assert self.adopting.result(), "the device was not adopted"
            self.adopting = None
        device = self.daemon.device
        if device.state == "live" and device.team is not None:
            self._last_live_epoch = device.team.epoch
        assert device.state != "failed", f"the device has failed: {device.reason}"

    def _next_daemon(self) -> None:
        """As `takeover.TakeOver`: go on with the last supervisor's processes, or end them and recover the device."""
        left = self.left
        assert left is not None
        self.limit = 0
        goes_on, broker = left.may_go_on, self.broker
        self.note(f"the next supervisor starts{' and goes on' * goes_on}")
        self.counts["successions" if goes_on else "recoveries of what was left"] += 1
        if not goes_on:
            self._end_left()
        if not goes_on or left.broker is not broker:
            self._end_broker()
            broker = None
        daemon = self._begin_daemon(broker)
        self.adopting = daemon.spawn(lambda: daemon.take_over(left, goes_on, self._end_left))

    def _end_left(self) -> None:
        """As `records.end_left`: end the processes on record."""
        assert self.left is not None
        for worker in list(self.workers):
            if worker in self.left.workers:
                self._end_worker(worker)
        self._end_backend()
        self.witness.new_pool()

    def _kill_supervisor(self) -> None:
        self.note("the supervisor dies")
        assert self.daemon is not None
        self.daemon.loop.kill()
        # The process's end closes its descriptors.
        if (gate := self.daemon.device.parts.resources.hold_gate) is not None:
            gate.close()
        self.daemon = self.adopting = None
        self._dies_in_fork = self._died_in_fork = False
        if self.scenario.defect != COMMANDS_LIVE_ON:
            for job in self.jobs:
                job.kill()
            self.jobs.clear()
        # Sockets that the holder has stay open; the other processes see the end of theirs.
        held = self.left.workers if self.left else []
        for worker in self.workers:
            worker.orphaned |= worker not in held
        if self.backend is not None and not self.backend.is_held:
            self.backend.control.append(None)
