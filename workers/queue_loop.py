"""The worker's loop: one queue on one ring, its backend and its broker, until the device stops.

Runs in the forked worker, on its only thread (ZeroMQ adds an I/O thread of its own).  Requests are served in C without
Python's lock; Python runs when a batch of descriptors is to be sent or has come, when the stock is low, and when a
message from the supervisor has come.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import zmq

from ublkpool.bufpool.errors import BackendError, StoreTaken
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.control import LIMITS_OFFSET, slot_header_offset, stats_offset
from ublkpool.bufpool.pool.size_pool import held_max
from ublkpool.bufpool.sdk.inside import Connect
from ublkpool.bufpool.wire import Grown, Resized
from ublkpool.ublk import mappings
from ublkpool.ublk import queue as core
from ublkpool.ublk.calls import ffi
from ublkpool.ublk.queue import Attention, IoUring, LinkState, Memory, Queue, QueueConfig
from ublkpool.workers import messages
from ublkpool.workers.backend_doors import BackendDoors
from ublkpool.workers.backend_link import BackendLink
from ublkpool.workers.engine_awaited import EngineAwaited
from ublkpool.workers.engine_connected import EngineConnected
from ublkpool.workers.engine_inside import Awaited, EngineInside, EngineSpec
from ublkpool.workers.engine_place import EnginePlace
from ublkpool.workers.hold_gate import HoldGate
from ublkpool.workers.own_stock import OwnStock
from ublkpool.workers.pool_files import PoolFiles
from ublkpool.workers.pool_link import PoolLink
from ublkpool.workers.privileges import Account, give_up_rights, run_without_capabilities
from ublkpool.workers.ring_link import RingLink

TICK_MS = 500
LOOK_S = 0.5
_WATCH_SUPERVISOR, _WATCH_POOL = range(2)
_WATCH_GATE = 6
"""After those of `BackendDoors`."""
# Plain numbers, tested at every turn: an enum's arithmetic costs more than all other Python of the turn.
_POOL_READABLE = 1 << core.WATCH_SHIFT + _WATCH_POOL
_TO_REPORT = int(
    Attention.CUT | Attention.SILENT | Attention.ABSENT | Attention.LINK | Attention.QUIET | Attention.FLUSHED
)
_FAULT, _GONE, _CUT = int(Attention.FAULT), int(Attention.GONE), int(Attention.CUT)
_BATCH_MAX = 32
_log = logging.getLogger("ublkpool.worker")


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's configuration, complete before the fork."""

    name: str
    queue: QueueConfig
    queue_socket: Path
    ring_socket: Path | None
    """The socket at which backends ask for rings; None: no rings."""
    pool_endpoint: str | None
    """Of the broker; None: all buffers of `queue.classes` are the queue's own."""
    socket_mode: int
    socket_group: int | None
    cpu: int | None
    spin_us: int
    """How long the worker polls before it sleeps, in microseconds."""
    hold_gate: int | None = None
    """The reader of the gate of a hold from the start, see `messages.Hold`; inherited."""
    engine: EngineSpec | None = None
    """The engine that answers in this process; None: a backend in its own process does."""
    account: Account | None = None
    """The user that the worker becomes once its tags are fetched; None: it keeps the daemon's rights."""
    is_prepared: bool = False
    """Whether no device has taken it yet: it ends with its supervisor until `messages.Become`."""

    @property
    def title(self) -> str:
        """The process's name."""
        return f"ublkpool-{self.queue.device_number}.{self.queue.queue}"

    def descriptors(self) -> list[int]:
        """Those that it names."""
        gate = [] if self.hold_gate is None else [self.hold_gate]
        return gate + (self.engine.descriptors() if self.engine is not None else [])

    def renumbered(self, numbers: Mapping[int, int]) -> "WorkerSpec":
        """The same in a process where the descriptors have these numbers."""
        gate, engine = self.hold_gate, self.engine
        return msgspec.structs.replace(
            self,
            hold_gate=None if gate is None else numbers[gate],
            engine=None if engine is None else engine.renumbered(numbers),
        )


def buffer_classes(arena: Arena) -> tuple[core.BufferClass, ...]:
    """The pool's size classes for a queue; a LEASE's batch is a quarter of its share of the buffers beyond reserves."""
    classes = []
    for each, reserve in zip(arena.geometry.classes, arena.reserve, strict=True):
        shared = each.count - reserve * arena.queues
        batch = max(1, min(_BATCH_MAX, shared // (4 * arena.queues)))
        classes.append(
            core.BufferClass(
                each.base_offset,
                each.buffer_bytes,
                each.count,
                each.first_slot,
                reserve,
                batch,
                held_max(each.count, reserve, arena.queues),
            )
        )
    return tuple(classes)


def own_classes(arena: Arena, queue: int) -> tuple[core.BufferClass, ...]:
    """An equal part of the pool's buffers for this queue, see `OwnStock`; its reserve is in it."""
    classes = []
    for each in arena.geometry.classes:
        begin, end = (each.count * number // arena.queues for number in (queue, queue + 1))
        offset = each.base_offset + begin * each.buffer_bytes
        count = end - begin
        classes.append(
            core.BufferClass(offset, each.buffer_bytes, count, each.first_slot + begin, count, 1, count)
        )
    return tuple(classes)


class QueueLoop:
    """One queue, from its first fetch to the last abort."""

    def __init__(
        self, spec: WorkerSpec, char_fd: int, descriptors: object, pool: PoolFiles, supervisor: socket.socket
    ) -> None:
        self._spec = spec
        self._supervisor: socket.socket | None = supervisor
        self._context = _context_of(spec)
        _settle(self._context, spec)
        memory = _map_memory(spec.queue, descriptors, pool)
        self._queue = Queue(spec.queue, memory)
        self._files = pool
        self._look_at_s = 0.0
        self._broken = ""
        self._is_excluded = False
        self._grown_bytes = 0
        """The largest size that the store has announced."""
        self._backend: BackendDoors | EnginePlace = (
            self._doors() if spec.engine is None else self._engine(spec.engine, memory)
        )
        self._pool = self._stock()
        engine_requests = spec.queue.depth if spec.engine is not None else 0
        self._ring = IoUring(self._queue, char_fd, spec.spin_us, engine_requests)
        self._started = False
        self._fetched = False
        self._more = False
        self._bits = 0
        self._ring.watch(_WATCH_SUPERVISOR, supervisor.fileno())
        if isinstance(self._pool, PoolLink):
            self._ring.watch(_WATCH_POOL, self._pool.fileno())
        self._backend.serve_on(self._ring)
        self._gate = self._make_gate()

    def _doors(self) -> BackendDoors:
        spec = self._spec
        where = (self._queue, spec.socket_mode, spec.socket_group)
        assert self._context is not None
        frames = BackendLink(self._context, spec.queue_socket, *where)
        return BackendDoors(frames, RingLink(spec.ring_socket, *where))

    def _stock(self) -> PoolLink | OwnStock:
        endpoint = self._spec.pool_endpoint
        if endpoint is None:
            return OwnStock(self._queue)
        assert self._context is not None
        return PoolLink(self._context, endpoint, self._queue)

    def _engine(self, spec: EngineSpec, memory: Memory) -> EnginePlace:
        pool = memoryview(ffi.buffer(memory.pool, self._files.geometry.total_bytes))
        if isinstance(spec.storage, Awaited):
            return EngineAwaited(self._queue, pool)
        kind = EngineConnected if isinstance(spec.storage, Connect) else EngineInside
        return kind(spec, self._spec.name, self._queue, pool)

    def _make_gate(self) -> HoldGate:
        gate = HoldGate(lambda fd: self._ring.watch(_WATCH_GATE, fd), lambda: self._queue.hold(False))
        gate.begin(self._spec.hold_gate)
        return gate

    def run(self) -> int:
        """Serve until every tag is gone (0) or the worker has failed (1)."""
        while (status := self.turn()) is None:
            pass
        return status

    def close(self) -> None:
        """Close links and ring; the process's end does the same."""
        for each in (self._backend, self._pool, self._ring):
            each.close()
        if self._context is not None:
            self._context.term()

    def turn(self) -> int | None:
        """Wait for events and handle them; the exit status once every tag is gone or the worker has failed."""
        self._service_links()
        fetching = self._started and not self._fetched
        bits = self._bits = self._ring.run(0 if self._more or fetching else self._patience_ms())
        if fetching:
            self._fetched = True
            if problem := self._give_up_rights():
                return self._fail(problem)
            self._tell(messages.Fetched())
        attention = self._queue.attention_bits()
        if self._has_failed(attention):
            return 1
        if bits >> core.WATCH_SHIFT & 1 << _WATCH_SUPERVISOR:
            self._hear_supervisor()
            # The next daemon may not have a record of a worker that was forked just before its supervisor ended.
            if self._supervisor is None and (not self._started or self._spec.is_prepared):
                return 1
        if bits >> core.WATCH_SHIFT & 1 << _WATCH_GATE:
            self._gate.look()
        self._more = self._turn_backend(bits)
        self._look_around()
        if attention & _TO_REPORT:
            self._report(Attention(attention))
        if attention & _GONE:
            self._backend.leave()
            return 0
        return None

    def _patience_ms(self) -> int:
        """The longest sleep: without limit, unless this loop has something to look at that announces nothing.

        The queue's deadlines are the ring's own matter.
        """
        return TICK_MS if self._backend.needs_looks or self._queue.has_left_segment else core.FOREVER_MS

    def _has_failed(self, attention: int) -> bool:
        """Whether the worker ends; it has told its supervisor why."""
        if attention & _FAULT:
            self._fail(self._queue.fault())
            return True
        if attention & _CUT:
            self._broken = self._broken or self._backend.failure()
        if self._broken:
            self._fail(self._broken, self._is_excluded or self._backend.is_excluded)
            return True
        return False

    def _turn_backend(self, bits: int) -> bool:
        """Whether there is more to do at once."""
        try:
            return self._backend.turn(bits)
        except BackendError as error:
            self._broken, self._is_excluded = str(error), isinstance(error, StoreTaken)
            return True

    def _give_up_rights(self) -> str:
        """Become the worker's user; the reason of a failure, or empty.

        Not before the last tag is fetched: the driver notes then whether the worker had CAP_SYS_ADMIN, without which no
        partitions are looked for.  And not after `Fetched`: no request comes before the supervisor has that.
        """
        account = self._spec.account
        if account is None:
            return ""
        self._backend.take_places()
        try:
            give_up_rights(account)
        except OSError as error:
            return f"queue {self._spec.queue.queue}: its worker cannot become user {account.name}: {error}"
        return ""

    def _service_links(self) -> None:
        # Every send to the broker is followed by a receive, so a later message makes its descriptor readable.
        if not self._bits or self._bits & _POOL_READABLE:
            self._pool.receive()
        self._pool.balance()
        if not self._started and self._has_reserve():
            self._queue.start()
            self._started = True

    def _has_reserve(self) -> bool:
        classes = self._spec.queue.classes
        return all(len(self._queue.stock_held(n)) >= each.reserve for n, each in enumerate(classes))

    def _look_around(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + LOOK_S
            self._queue.unmap_idle_segments()

    def _report(self, attention: Attention) -> None:
        if attention & Attention.CUT:
            self._queue.clear(Attention.CUT)
            self._backend.expect(b"")
            was_guilty = self._queue.has_violation
            self._tell(messages.Cut(self._queue.violation()) if was_guilty else messages.HungUp())
        if attention & Attention.SILENT:
            self._queue.clear(Attention.SILENT)
            self._tell(messages.Silent())
        if attention & Attention.ABSENT:
            self._queue.clear(Attention.ABSENT)
            self._tell(messages.Absent())
        if attention & Attention.LINK:
            self._queue.clear(Attention.LINK)
            self._tell(messages.Linked())
        # An interrupted drain's FLUSH ends before the queue is quiet for the next drain, which then asks for its own.
        if attention & Attention.FLUSHED:
            self._queue.clear(Attention.FLUSHED)
            self._tell(messages.Flushed(self._queue.flush_result()))
        # The supervisor may have let the queue go, or held it anew, since these bits were read.
        if attention & self._queue.attention() & Attention.QUIET:
            self._queue.clear(Attention.QUIET)
            self._tell(messages.Quiet())

    def _hear_supervisor(self) -> None:
        while self._supervisor is not None:
            try:
                message, fd = messages.receive_in_worker(self._supervisor)
            except BlockingIOError:
                return
            except ConnectionError:
                message, fd = None, None
            self._obey(message, fd)

    def _obey(self, message: messages.ToWorker | None, fd: int | None) -> None:
        match message:
            case messages.Expect() | messages.Lost() | messages.NewPool():
                self._obey_about_backend(message, fd)
            case messages.SetDeadlines() | messages.Resize():
                self._change(message)
            case messages.Hold(on):
                self._gate.begin(fd)
                self._queue.hold(on)
                self._tell(messages.Holding(message.id))
            case messages.FlushBackend():
                self._tell(messages.Flushing(self._queue.flush(), message.id))
            case messages.HandOver() | messages.Become():
                self._obey_about_engine(message, fd)
            case messages.Connect() | messages.Serve() | messages.Grow() | messages.GiveUp():
                self._obey_about_store(message)
            case messages.Report():
                self._gate.succeed()
                is_linked = self._queue.link is LinkState.UP
                self._tell(
                    messages.Standing(
                        self._fetched,
                        self._backend.token,
                        is_linked,
                        message.id,
                        knows_new_pool=True,
                        knows_deadlines=True,
                        knows_hold=True,
                        knows_gate=True,
                        knows_resize=True,
                        knows_grow=True,
                        grown_bytes=self._grown_bytes,
                        has_let_go=self._gate.has_let_go,
                    )
                )
            case None:
                if not self._spec.is_prepared:
                    _log.info(
                        "%s queue %d: the supervisor is gone; serving on",
                        self._spec.name,
                        self._spec.queue.queue,
                    )
                self._ring.watch(_WATCH_SUPERVISOR, -1)
                self._supervisor = None

    def _obey_about_backend(
        self, message: messages.Expect | messages.Lost | messages.NewPool, fd: int | None
    ) -> None:
        match message:
            case messages.Expect():
                self._expect(message, fd)
            case messages.Lost():
                self._backend.expect(b"")
                self._queue.lost()
                self._tell(messages.LetGo(message.id))
            case messages.NewPool():
                self._tell(messages.PoolChanged(self._change_pool(fd), message.id))

    def _obey_about_engine(self, message: messages.HandOver | messages.Become, fd: int | None) -> None:
        match message:
            case messages.HandOver():
                assert isinstance(self._backend, EngineAwaited)
                self._backend.take(fd)
            case messages.Become():
                self._tell(messages.Became(self._become(message), message.id))

    def _obey_about_store(
        self, message: messages.Connect | messages.Serve | messages.Grow | messages.GiveUp
    ) -> None:
        match message:
            case messages.Connect(number):
                self._backend.connect(
                    lambda owner, reason: self._tell(messages.Connected(owner, reason, number)),
                    self._tell_growth,
                )
            case messages.Grow(size_bytes):
                self._backend.grow(size_bytes)
            case messages.Serve():
                try:
                    self._backend.serve()
                except (BackendError, OSError) as error:
                    self._broken = f"queue {self._spec.queue.queue}: {error}"
            case messages.GiveUp():
                self._queue.give_up()

    def _become(self, message: messages.Become) -> str:
        """Of a prepared worker: from now on it is this device's; the reason of a failure, or empty."""
        deadlines = message.deadlines
        self._queue.set_deadlines(deadlines.timeout_ms, deadlines.fail_on_timeout, deadlines.absent_ms)
        try:
            if message.engine is not None:
                assert isinstance(self._backend, EngineAwaited)
                self._backend = self._backend.begin(message.engine, message.name)
        except (BackendError, OSError) as error:
            return f"queue {self._spec.queue.queue}: {error}"
        self._spec = msgspec.structs.replace(self._spec, name=message.name, is_prepared=False)
        return ""

    def _tell_growth(self, news: Resized | Grown) -> None:
        is_asked, reason = (True, news.reason) if isinstance(news, Resized) else (False, "")
        if not reason:
            # Also of an answer: the supervisor that asked may have ended, or given the question up.
            self._grown_bytes = max(self._grown_bytes, news.size_bytes)
        self._tell(messages.Grown(news.size_bytes, is_asked, reason))

    def _change(self, message: messages.SetDeadlines | messages.Resize) -> None:
        if isinstance(message, messages.Resize):
            self._backend.resize(message.size_bytes)
            self._tell(messages.Resized(message.id))
            return
        self._queue.set_deadlines(message.timeout_ms, message.fail_on_timeout, message.absent_ms)
        self._tell(messages.DeadlinesSet(message.id))

    def _change_pool(self, fd: int | None) -> str:
        """The reason of a failure, or empty."""
        if fd is None or self._queue.link is not LinkState.NONE:
            return "a new pool without a descriptor, or in the presence of a backend"
        try:
            self._queue.change_pool(fd, self._files.geometry.total_bytes)
        except OSError as error:
            os.close(fd)
            reason = f"queue {self._spec.queue.queue}: its new pool cannot be mapped: {error}"
            if isinstance(error, core.PoolLost):
                self._broken = reason
            return reason
        os.close(self._files.data_fd)
        self._files.data_fd = fd
        return ""

    def _expect(self, message: messages.Expect, fd: int | None) -> None:
        problem = self._expect_segment(message, fd)
        if not problem:
            try:
                self._backend.expect(bytes.fromhex(message.token), message.user)
            except (OSError, zmq.ZMQError) as error:
                # The supervisor answers with `Lost`, which takes the backend and its segment back.
                problem = f"no socket can be made at {self._spec.queue_socket}: {error.strerror or error}"
        self._tell(messages.Expecting(problem, message.id))

    def _expect_segment(self, message: messages.Expect, fd: int | None) -> str:
        """The reason of a failure, or empty."""
        try:
            base = mappings.map_segment(fd, message.segment_bytes) if fd is not None else core.NULL
        except OSError as error:
            return f"its segment cannot be mapped: {error}"
        finally:
            if fd is not None:
                os.close(fd)
        # The new segment may need the place of an idle one in the queue's table.
        self._queue.unmap_idle_segments()
        problem = "the data of earlier backends has not found room in the pool yet"
        try:
            if self._queue.link is LinkState.NONE and self._queue.expect(
                message.segment, base, message.segment_bytes, message.reads_own, message.fence
            ):
                return ""
        except OSError as error:
            problem = str(error)
        if fd is not None:
            mappings.unmap_segment(base, message.segment_bytes)
        return problem

    def _tell(self, message: messages.FromWorker) -> None:
        if self._supervisor is None:
            return
        try:
            messages.send(self._supervisor, message)
        except OSError as error:
            _log.warning(
                "%s queue %d: the supervisor does not listen: %s",
                self._spec.name,
                self._spec.queue.queue,
                error,
            )

    def _fail(self, reason: str, excluded: bool = False) -> int:
        self._tell(messages.Fault(reason, excluded))
        return 1


def _context_of(spec: WorkerSpec) -> "zmq.Context[zmq.Socket[bytes]] | None":
    """None where nothing speaks ZeroMQ: its threads and their memory are a third of such a worker."""
    return None if spec.engine is not None and spec.pool_endpoint is None else zmq.Context()


def _settle(context: "zmq.Context[zmq.Socket[bytes]] | None", spec: WorkerSpec) -> None:
    """Move to the queue's CPU before the worker touches memory of its own, which is then allocated near it."""

    def start_threads() -> None:
        if context is not None:
            context.socket(zmq.PAIR).close()

    # ZeroMQ's threads start with its first socket, and must not be bound to the queue's CPU.
    if spec.account is not None and spec.account.user == 0:
        run_without_capabilities(start_threads)
    else:
        start_threads()
    if spec.cpu is not None:
        os.sched_setaffinity(0, {spec.cpu})


def _map_memory(config: QueueConfig, descriptors: object, files: PoolFiles) -> Memory:
    control = mappings.map_segment(files.control_fd, os.fstat(files.control_fd).st_size)
    pool = mappings.map_segment(files.data_fd, files.geometry.total_bytes)
    return Memory(
        descriptors=descriptors,
        pool=pool,
        slots=mappings.offset(control, slot_header_offset(files.queues, 0)),
        scratch=mappings.map_sink(config.max_io_bytes),
        statistics=mappings.offset(control, stats_offset(config.queue)),
        limits=mappings.offset(control, LIMITS_OFFSET),
        zeros=mappings.map_zeros(config.max_io_bytes) if config.answers_itself else None,
    )
