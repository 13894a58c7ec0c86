"""A worker of the simulation: the real `QueueLoop`, core and links on a made-up ring, and how the supervisor sees it.

Owns one process's life: `SimWorker` is the process, `SimWorkerProcess` the supervisor's side of it.
"""

import asyncio
import errno
import os
import random
import select
import signal
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import msgspec
import zmq

from support.fakes.queue_rig import check_durations, new_area
from support.fakes.ring_peer import TO_BACKEND
from support.sim.defects import BUFFER_FREE_EARLY, COMPLETION_LOST, PAUSES_COUNT
from support.sim.kernel import SimKernel, Task
from support.sim.loop import TURN_S, Clock
from support.sim.rings import SimPort
from support.sim.wire import Context, Killed, Life, SimBackendLink
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.control import LIMITS_OFFSET, slot_header_offset, stats_offset
from ublkpool.daemon.processes.channel import Channel
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.questions import Questions
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.ublk import calls, mappings
from ublkpool.ublk.queue import (
    NULL,
    WATCH_SHIFT,
    Attention,
    Command,
    IoUring,
    LinkState,
    Memory,
    Port,
    Queue,
    QueueConfig,
)
from ublkpool.ublk.statistics import Statistics, read_statistics
from ublkpool.workers import messages
from ublkpool.workers.backend_doors import BackendDoors
from ublkpool.workers.hold_gate import HoldGate
from ublkpool.workers.pool_link import PoolLink
from ublkpool.workers.queue_loop import QueueLoop, WorkerSpec
from ublkpool.workers.ring_link import RingLink

_ffi = calls.ffi
GATE = 6
_SUPERVISOR, _POOL, _RINGS, _GATE = (1 << WATCH_SHIFT + index for index in (0, 1, 5, GATE))


class PoolMemory:
    """A pool's two segments, mapped for all that is no worker; a worker maps the data at an address of its own."""

    def __init__(self, arena: Arena, control_bytes: int) -> None:
        self.arena = arena
        self._sizes = (arena.geometry.total_bytes, control_bytes)
        self._maps = [self.map_data()]
        self.control = mappings.map_segment(arena.control_fd, self._sizes[1])

    def map_data(self) -> Any:
        """Another mapping of the present data; the caller unmaps its `data_bytes`."""
        return mappings.map_segment(self.arena.data_fd, self.data_bytes)

    @property
    def data_bytes(self) -> int:
        return self._sizes[0]

    @property
    def changes(self) -> int:
        """How often the data was replaced."""
        return len(self._maps) - 1

    @property
    def view(self) -> memoryview:
        """The present data; a view from before a replacement keeps the old data."""
        return memoryview(_ffi.buffer(self._maps[-1], self.data_bytes)).cast("B")

    def changed(self, arena: Arena) -> None:
        """The data was replaced, in this arena or another one of this pool."""
        if arena is not self.arena:
            os.close(self.arena.data_fd)
            self.arena.data_fd = os.dup(arena.data_fd)
        self._maps.append(self.map_data())

    def close(self) -> None:
        for each in self._maps:
            mappings.unmap_segment(each, self.data_bytes)
        mappings.unmap_segment(self.control, self._sizes[1])


class SimRing:
    """What `IoUring.run` does in one pass, with a driver that is made up."""

    def __init__(self, worker: "SimWorker") -> None:
        self._worker = worker
        self._untaken: list[Command] = []
        self.port: SimPort | None = None
        self._sleeps_until_s = 0.0
        self._gate = -1
        self._clock = _ffi.new("struct uq_clock *")

    def watch(self, index: int, fd: int) -> None:
        """The simulation knows when to turn the loop, except for the gate of a hold."""
        if index == GATE:
            self._gate = fd

    def _gate_decides(self) -> bool:
        return self._gate >= 0 and bool(select.select([self._gate], [], [], 0)[0])

    def use_port(self, port: Port | None, bell_in: int = -1, bell_out: int = -1) -> None:
        worker = self._worker
        if self.port is not None:
            self.port.close()
        self.port = SimPort(port, bell_in, bell_out, worker.life, worker.defect) if port else None
        worker.queue.hold_output(port is not None)

    def run(self, timeout_ms: int) -> int:
        worker, port = self._worker, self.port
        now_ms = self._now_ms()
        calls.lib.uq_set_time(worker.queue.raw, now_ms)
        worker.queue.set_real_time(int(worker.clock.now_s * 1_000_000_000))
        self._pass_limited()
        if port is not None:
            port.exchange(worker.queue)
        worker.queue.tick(now_ms)
        # As the real ring: the driver takes the commands in the call in which the worker falls asleep.
        sleep_ms = worker.queue.limit_wait_ms(worker.queue.wait_ms(timeout_ms))
        self._submit()
        if port is not None and timeout_ms and not worker.task.completions and not self._bits():
            port.grow_drowsy()
            self._sleeps_until_s = worker.clock.now_s + sleep_ms / 1000
            self._pass_limited()
        self._harvest()
        return self._bits()

    def _pass_limited(self) -> None:
        worker = self._worker
        if worker.queue.limit_is_used:
            worker.queue.limit_tick(int(worker.clock.now_s * 1e9))

    def _now_ms(self) -> int:
        """The clock of the core's deadlines."""
        # A clock that reads 0 has not been read yet.
        system_ms = 1 + int(self._worker.clock.now_s * 1000)
        if self._worker.defect == PAUSES_COUNT:
            return system_ms
        return int(calls.lib.uq_clock_read(self._clock, system_ms, int(1000 * TURN_S)))

    def _bits(self) -> int:
        worker = self._worker
        asked = _SUPERVISOR if worker.inbox or worker.orphaned else 0
        granted = _POOL if worker.context.pool.inbox else 0
        called = _RINGS if worker.loop.hears_rings else 0
        decided = _GATE if self._gate_decides() else 0
        return worker.queue.attention_bits() | asked | granted | called | decided

    def is_awake(self) -> bool:
        """Whether the worker may take a turn: it is awake, or something that it waits for has come."""
        worker, port = self._worker, self.port
        if port is not None:
            port.doze(worker.queue)
        if port is None or not port.sleeps:
            return True
        is_over = worker.clock.now_s >= self._sleeps_until_s or port.is_rung()
        if not (is_over or worker.task.completions or self._bits()):
            return False
        port.wake()
        port.hear()
        return True

    def _submit(self) -> None:
        worker = self._worker
        if worker.defect == BUFFER_FREE_EARLY:
            # The next turn's commands are noted as taken one turn before the driver has them.
            commands, self._untaken = self._untaken, worker.queue.take_commands()
            for each in commands:
                worker.consume(each)
            return
        buffer = _ffi.new("struct uq_command[]", worker.queue.config.depth)
        count = calls.lib.uq_commands(worker.queue.raw, buffer, worker.queue.config.depth)
        for c in buffer[0:count]:
            worker.consume(Command(c.tag, c.op, c.result, c.address))
        calls.lib.uq_commands_taken(worker.queue.raw, count)

    def _harvest(self) -> None:
        worker = self._worker
        while worker.task.completions:
            tag, result = worker.task.completions.popleft()
            if worker.loses_completion(result):
                continue
            worker.queue.complete(tag, result)


class SimQueueLoop(QueueLoop):
    """The real loop; its socket to the supervisor is a pair of deques, its ring is made up."""

    def __init__(self, spec: WorkerSpec, worker: "SimWorker") -> None:
        self._spec = spec
        self._supervisor = cast(Any, worker)
        self._worker = worker
        self._queue = worker.queue
        context = cast("zmq.Context[zmq.Socket[bytes]]", worker.context)
        frames = SimBackendLink(context, spec.queue_socket, worker.queue, 0, None)
        self.doors = BackendDoors(frames, RingLink(spec.ring_socket, worker.queue, spec.socket_mode, None))
        self._backend = self.doors
        assert spec.pool_endpoint is not None
        self._pool = PoolLink(context, spec.pool_endpoint, worker.queue)
        self.ring = SimRing(worker)
        self._ring = cast(IoUring, self.ring)
        self.doors.rings.serve_on(self.ring)
        self._started = self._fetched = self._more = False
        self._bits = 0
        self._broken = ""
        self._grown_bytes = 0
        self._gate = self._make_gate()

    def _make_gate(self) -> HoldGate:
        # As a fork does with the descriptor.
        inherited = self._spec.hold_gate
        if inherited is not None:
            self._spec = msgspec.structs.replace(self._spec, hold_gate=os.dup(inherited))
        return super()._make_gate()

    def _look_around(self) -> None:
        self._queue.unmap_idle_segments()

    def _change_pool(self, _fd: int | None) -> str:
        pool = self._worker.pool
        self._queue.change_pool(pool.arena.data_fd, pool.data_bytes)
        return ""

    @property
    def backend_link(self) -> SimBackendLink:
        return cast(SimBackendLink, self.doors.frames)

    @property
    def gate(self) -> int:
        """The reader of its hold's gate, or -1."""
        return self._gate._reader

    @property
    def hears_rings(self) -> bool:
        """Whether a backend asks for rings, or the one that had them is gone."""
        return bool(self.doors.rings._epoll.poll(0))

    def die(self) -> None:
        """The process has died, perhaps while it wrote an entry; the kernel closes its files."""
        if self.ring.port is not None:
            self.ring.port.memory.scribble(TO_BACKEND, self._worker.rng)
        self.doors.rings.close()
        self._gate.close()
        for _, fd in self._worker.inbox:
            if fd is not None:
                os.close(fd)
        self._worker.inbox.clear()

    def _hear_supervisor(self) -> None:
        while self._worker.inbox:
            self._obey(*self._worker.inbox.popleft())
        if self._worker.orphaned and self._supervisor is not None:
            self._obey(None, None)

    def _expect(self, message: messages.Expect, fd: int | None) -> None:
        # As the real one, but every process has the segment mapped already.
        base = self._worker.segment_base(message.token) if message.segment else NULL
        if self._queue.link is LinkState.NONE and self._queue.expect(
            message.segment, base, message.segment_bytes, message.reads_own, message.fence
        ):
            self._backend.expect(bytes.fromhex(message.token), message.user)
            self._tell(messages.Expecting(id=message.id))
            return
        self._tell(
            messages.Expecting("the data of earlier backends has not found room in the pool yet", message.id)
        )

    def _tell(self, message: messages.FromWorker) -> None:
        self._worker.life.effect()
        if self._supervisor is not None:
            self._worker.outbox.append(message)


class SimQueue(Queue):
    """The real core; segments stay mapped for the whole run."""

    def __init__(self, config: QueueConfig, memory: Memory) -> None:
        super().__init__(config, memory)
        self.deadlines = (config.timeout_ms, config.fail_on_timeout, config.absent_ms)
        self.is_held = config.held

    def hold(self, on: bool) -> None:
        super().hold(on)
        self.is_held = on

    def set_deadlines(self, timeout_ms: int, fail_on_timeout: bool, absent_ms: int) -> None:
        super().set_deadlines(timeout_ms, fail_on_timeout, absent_ms)
        self.deadlines = (timeout_ms, fail_on_timeout, absent_ms)

    def unmap_idle_segments(self) -> int:
        base, size = _ffi.new("uint8_t **"), _ffi.new("uint64_t *")
        count = 0
        while calls.lib.uq_segment_idle(self.raw, base, size):
            count += 1
        return count


class SimWorker:
    """One queue's process of one epoch."""

    def __init__(
        self,
        spec: WorkerSpec,
        task: Task,
        kernel: SimKernel,
        pool: PoolMemory,
        clock: Clock,
        segment_base: Callable[[str], Any],
        rng: random.Random,
        defect: str,
    ) -> None:
        config = spec.queue
        self.rng = rng
        self.spec, self.kernel, self.clock, self.defect = spec, kernel, clock, defect
        self.segment_base = segment_base
        self.life = Life()
        self.task = task
        self.inbox: deque[tuple[messages.ToWorker, int | None]] = deque()
        self.outbox: deque[messages.FromWorker] = deque()
        self.orphaned = False
        self.completions_to_lose = 1 if defect == COMPLETION_LOST else 0
        self.pool = pool
        self._data = pool.map_data()
        self.scratch = new_area(0, config.max_io_bytes)
        self._classes = range(len(config.classes))
        memory = self._memory(config)
        self._headers = _ffi.cast("struct uq_slot *", memory.slots)
        self.queue = SimQueue(config, memory)
        self.context = Context(config.queue, config.epoch, self.life)
        self.loop = SimQueueLoop(spec, self)

    def _memory(self, config: QueueConfig) -> Memory:
        pool, queues = self.pool, self.pool.arena.queues
        return Memory(
            descriptors=self.kernel.queues[config.queue].descriptors,
            pool=self._data,
            slots=mappings.offset(pool.control, slot_header_offset(queues, 0)),
            scratch=self.scratch.base,
            statistics=mappings.offset(pool.control, stats_offset(config.queue)),
            limits=mappings.offset(pool.control, LIMITS_OFFSET),
        )

    @property
    def pool_address(self) -> int:
        """The address of its mapping of the pool's data."""
        return int(_ffi.cast("uintptr_t", self._data))

    def unmap(self) -> None:
        """At the end of the run: until then the kernel may still write there."""
        mappings.unmap_segment(self._data, self.pool.data_bytes)

    def check(self) -> None:
        """Raises `AssertionError` if the worker is at fault, or asleep on arrived work."""
        assert not self.has_fault(), f"{self.task}: {self.queue.fault()}"
        # If the backend dies before it rings, the worker hears of the death instead.
        if self.loop.ring.port is not None and not self.loop.hears_rings:
            self.loop.ring.port.assert_no_wakeup_lost(str(self.task), self.queue)

    def will_hold(self) -> bool:
        """Whether its requests wait once it has read what its supervisor, which has ended, has sent."""
        holds, gate = self.queue.is_held, self.loop.gate
        for message, fd in self.inbox:
            if isinstance(message, messages.Hold):
                holds, gate = message.on, -1 if fd is None else fd
        if not holds or gate < 0:
            return holds
        poll = select.poll()
        poll.register(gate, select.POLLIN)
        return any(event & select.POLLIN for _, event in poll.poll(0))

    def check_durations(self) -> None:
        """Raises `AssertionError` if a request that this worker or an earlier one answered has no duration."""
        check_durations(self._statistics())

    def has_fault(self) -> bool:
        return bool(calls.lib.uq_attention(self.queue.raw) & int(Attention.FAULT))

    def held(self) -> list[int]:
        """Every buffer that it has, in its stock or lent to a tag."""
        return [slot for index in self._classes for slot in self.queue.stock_held(index)]

    def named_owner(self, slot: int) -> tuple[int, int]:
        """Queue and epoch that the slot's header names."""
        header = self._headers[slot]
        return (header.owner - 1, header.epoch)

    def counter(self, name: str) -> int:
        """One of the queue's counters, which its workers continue one after another."""
        return self._statistics().counters[name]

    def _statistics(self) -> Statistics:
        return read_statistics(self.pool.arena.control.statistics_block(self.task.queue))

    def turn(self) -> int | None:
        """One turn of the loop, unless it sleeps; the exit status if it was the last."""
        try:
            if not self.loop.ring.is_awake():
                return None
            return self.loop.turn()
        except Killed:
            return 128 + signal.SIGKILL

    def consume(self, command: Command) -> None:
        self.life.effect()
        self.kernel.consume(self.task, command)

    def loses_completion(self, result: int) -> bool:
        if result < 0 or not self.completions_to_lose:
            return False
        self.completions_to_lose -= 1
        return True


class SimChild(Child):
    """A process that is a step of the simulation; `on_kill` ends it."""

    _last_pid = 0

    def __init__(self, title: str, on_kill: Callable[[], None]) -> None:
        SimChild._last_pid += 1
        self.pid = SimChild._last_pid
        self._identity = None
        self.title = title
        self._on_kill = on_kill
        self._has_ended = False
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[int] = self._loop.create_future()

    @property
    def end_check(self) -> Callable[[], bool]:
        return lambda: self._has_ended

    def send(self, number: signal.Signals) -> None:
        if not self._exited.done():
            self._on_kill()

    def exited(self, status: int) -> None:
        """The process has ended; its parent sees that in a later turn."""
        self._has_ended = True
        if not self._loop.is_closed():
            self._loop.call_soon(self._resolve, status)

    def _resolve(self, status: int) -> None:
        if not self._exited.done():
            self._exited.set_result(status)


class SimChannel(Channel[messages.ToWorker, messages.FromWorker]):
    """The supervisor's end of a worker's socketpair, on deques."""

    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self._questions = Questions()

    def fileno(self) -> int:
        return 0

    def send(self, message: messages.ToWorker, fd: int | None = None) -> None:
        if not self._worker.life.alive:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        # Of memory every process has a mapping already.
        is_gate = isinstance(message, messages.Hold) and fd is not None
        self._worker.inbox.append((message, os.dup(fd) if is_gate and fd is not None else None))

    def receive(self) -> messages.FromWorker | None:
        if not self._worker.outbox:
            raise BlockingIOError
        return self._worker.outbox.popleft()


class SimWorkerProcess(WorkerProcess):
    """The real supervisor's side, on a `SimChannel`."""

    def __init__(
        self,
        worker: SimWorker,
        on_kill: Callable[[SimWorker], None],
        on_news: Callable[[WorkerProcess, messages.FromWorker], None],
    ) -> None:
        self.worker = worker
        self.queue = worker.task.queue
        self.cpu = None
        self.child = SimChild(f"worker of queue {self.queue}", lambda: on_kill(worker))
        self.fault, self.is_excluded = "", False
        self._on_news = on_news
        self._loop = asyncio.get_running_loop()
        self._fetched = self._loop.create_future()
        self._linked = self._loop.create_future()
        self._quiet = self._loop.create_future()
        self._flushed = self._loop.create_future()
        self._channel = SimChannel(worker)

    def close(self) -> None:
        """Nothing is open."""

    def hear(self) -> None:
        """The worker's socket is readable."""
        if self.worker.outbox:
            self._loop.call_soon(self._hear)
