"""A device's workers of one epoch: forked together, told the same, ended together.

Runs on the supervisor's asyncio loop.
"""

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.control import Control
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.forks import Forks
from ublkpool.daemon.device.records import Worker
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.client_area import ClientArea
from ublkpool.daemon.kernel.opener import SERVER_KILLED, Opener
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.processes.beside import beside
from ublkpool.daemon.processes.open_files import reopened
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.processes.worker_template import WorkerTemplate
from ublkpool.daemon.settings.affinity import cpu_for
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.settings.run_directory import restore_queues
from ublkpool.ublk.errors import UblkError
from ublkpool.ublk.queue import BufferClass, QueueConfig
from ublkpool.ublk.statistics import read_statistics
from ublkpool.workers import messages
from ublkpool.workers.engine_awaited import told
from ublkpool.workers.engine_inside import EngineSpec
from ublkpool.workers.listening import socket_mode
from ublkpool.workers.privileges import Account
from ublkpool.workers.queue_loop import WorkerSpec, buffer_classes, own_classes
from ublkpool.workers.record_gate import RecordGate

READY_DEADLINE_S = 120.0
REPORT_DEADLINE_S = 10.0
SPIN_DEFAULT_US = 20
SPIN_CPUS_MIN = 16
_POLL_S = 0.02


class Plan(NamedTuple):
    """What all workers of a device have in common."""

    config: DeviceConfig
    kernel: BlockDevice
    arena: Arena
    disk: Disk
    pool_endpoint: str | None
    """Of the broker; None: each queue has buffers of its own."""
    queue_dir: Path
    group: int | None
    area: ClientArea | None = None
    held: bool = False
    """Whether requests wait from the workers' start, since the device is drained."""
    hold_gate: RecordGate | None = None
    """The gate of that hold until it is on record that the device is drained."""
    account: Account | None = None
    """The user that the workers become; None: they keep the daemon's rights."""
    engine: EngineSpec | None = None
    """The engine that the workers run themselves; None: a backend's process answers, or nothing does."""
    is_prepared: bool = False
    """Whether no device has taken the workers yet."""
    template: WorkerTemplate | None = None
    """What forks the workers; None: the daemon does."""

    def segments(self) -> tuple[wire.Segment, ...]:
        """The memory that every backend is handed."""
        pool = wire.Segment(number=wire.SEGMENT_POOL, size_bytes=self.arena.geometry.total_bytes)
        return (pool, *(self.area.segments() if self.area else ()))

    @contextmanager
    def descriptors(self) -> Iterator[list[int]]:
        """The descriptors of `segments`, in that order, to be sent to a backend.  Raises `OSError`.

        The pool's is a separate open file, so that `open_files.is_open_elsewhere` sees whether a backend still has it.
        """
        pool = reopened(self.arena.data_fd)
        try:
            yield [pool, *(self.area.descriptors() if self.area else ())]
        finally:
            os.close(pool)


class Team:
    """The workers of one epoch."""

    def __init__(
        self, plan: Plan, epoch: int, on_news: Callable[[WorkerProcess, messages.FromWorker], None]
    ) -> None:
        self.plan = plan
        self.epoch = epoch
        self.workers: list[WorkerProcess] = []
        self._on_news = on_news
        self._gate: RecordGate | None = None
        """Closed from the fork until the workers are on record."""

    def adopt(self, left: Sequence[tuple[Worker, socket.socket]]) -> None:
        """Go on with an earlier daemon's workers and its ends of their sockets.  Raises `ProcessLookupError`."""
        for queue, (worker, sock) in enumerate(left):
            self.workers.append(WorkerProcess(queue, worker.cpu, worker.process.pid, sock, self._on_news))

    async def report(self) -> list[messages.Standing]:
        """The state of the adopted workers.  Raises `DaemonError` if one has ended or does not answer."""
        try:
            return await asyncio.wait_for(
                asyncio.gather(*(each.report() for each in self.workers)), REPORT_DEADLINE_S
            )
        except TimeoutError:
            raise DaemonError(f"a worker has not answered after {REPORT_DEADLINE_S:.0f} s") from None

    def let_go(self) -> None:
        """Close the sockets here; the workers go on."""
        for worker in self.workers:
            worker.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The ZeroMQ endpoint of each queue."""
        return tuple(f"ipc://{self._socket(queue)}" for queue in range(self.plan.kernel.info.queues))

    async def fork(self) -> None:
        """Open the device and fork a worker per queue, which fetch nothing before `recorded`.

        Raises `DaemonError`, `OSError`.
        """
        kernel = self.plan.kernel
        account = self.plan.account
        restore_queues(
            self.plan.queue_dir.parent, self.plan.group, workers_enter=bool(account and account.user)
        )
        cpus = os.sched_getaffinity(0)
        specs = [self._spec(queue, self._cpu(queue, cpus)) for queue in range(kernel.info.queues)]
        if template := self.plan.template:
            if await self._forks(specs).by_template(template):
                return
            await self.kill()
            self.workers.clear()
        await self._forks(specs).here()

    def _forks(self, specs: Sequence[WorkerSpec]) -> Forks:
        self._gate = RecordGate()
        return Forks(self.plan.kernel, self.plan.arena, specs, self._gate, self._begun)

    def _begun(self, spec: WorkerSpec, pid: int, sock: socket.socket) -> None:
        self.workers.append(WorkerProcess(spec.queue.queue, spec.cpu, pid, sock, self._on_news))

    def _cpu(self, queue: int, allowed: Collection[int]) -> int | None:
        kernel = self.plan.kernel
        return cpu_for(self.plan.config.affinity, kernel.number, queue, kernel.queue_cpus[queue], allowed)

    def recorded(self) -> None:
        """The forked workers are on record, where the next daemon finds them: they may fetch."""
        if self._gate is not None:
            self._gate.open(len(self.workers))
            self._gate = None

    async def ready(self) -> None:
        """Wait until every tag is fetched.  Raises `DaemonError` with the reason of the first worker that ended."""
        try:
            await asyncio.wait_for(
                asyncio.gather(*(each.fetched() for each in self.workers)), READY_DEADLINE_S
            )
        except TimeoutError:
            raise DaemonError(f"its workers were not ready after {READY_DEADLINE_S:.0f} s") from None

    def serve_for(self, plan: Plan, on_news: Callable[[WorkerProcess, messages.FromWorker], None]) -> None:
        """These prepared workers are this device's, which tells them with `become`."""
        self.plan, self._on_news = plan, on_news
        for worker in self.workers:
            worker.report_to(on_news)

    async def become(self) -> None:
        """Have every worker serve the device, whose record names it.  Raises `DaemonError` if one cannot."""
        plan = self.plan
        message = messages.Become(
            name=plan.config.name,
            deadlines=messages.SetDeadlines(*_deadlines(plan.config)),
            engine=told(plan.engine) if plan.engine is not None else None,
        )
        files = plan.engine.descriptors() if plan.engine is not None else []
        await asyncio.gather(*(each.become(message, files) for each in self.workers))

    async def expect(self, session: Session, fence: bool) -> None:
        """Have every worker expect this backend.  Raises `AttachRefused`, `DaemonError`."""
        attach = session.attach
        expect = messages.Expect(
            session.token.hex(),
            session.segment,
            attach.segment_bytes,
            attach.read_buffers == "own",
            session.uid,
            fence,
        )
        answers = await asyncio.gather(*(each.ask(expect, session.segment_fd) for each in self.workers))
        for answer in answers:
            if isinstance(answer, messages.Expecting) and answer.reason:
                await self.lost()
                raise AttachRefused(f"device {self.plan.config.name}: {answer.reason}")

    @property
    def can_change_pool(self) -> bool:
        """Whether all workers are of a version that can change the pool."""
        return all(each.knows_new_pool for each in self.workers)

    async def change_pool(self) -> None:
        """Have every worker use the pool's present memory.  Raises `AttachRefused`, `DaemonError`."""
        fd = self.plan.arena.data_fd
        answers = await asyncio.gather(*(each.ask(messages.NewPool(), fd) for each in self.workers))
        for answer in answers:
            if isinstance(answer, messages.PoolChanged) and answer.reason:
                raise AttachRefused(f"device {self.plan.config.name}: {answer.reason}")

    @property
    def can_set_deadlines(self) -> bool:
        """Whether all workers are of a version that can change their deadlines."""
        return all(each.knows_deadlines for each in self.workers)

    async def set_deadlines(self, config: DeviceConfig) -> None:
        """Have every living worker use this config's deadlines; the next epoch's workers begin with them."""
        deadlines = messages.SetDeadlines(*_deadlines(config))
        # A worker that ends or does not answer is dead: its successor has the config.
        await asyncio.gather(*(each.ask(deadlines) for each in self.workers), return_exceptions=True)

    @property
    def can_resize(self) -> bool:
        """Whether all workers are of a version whose engine can learn another size."""
        return all(each.knows_resize for each in self.workers)

    @property
    def can_grow(self) -> bool:
        """Whether all workers are of a version that has the store grow to which it is connected."""
        return all(each.knows_grow for each in self.workers)

    async def grow(self, size_bytes: int, patience_s: float) -> None:
        """Have the one worker's store grow, and serve all of it.  Raises `DaemonError`, see `WorkerProcess.grow`."""
        await self.workers[0].grow(size_bytes, patience_s)

    def follow_growth(self, hear: Callable[[int], None]) -> None:
        """Call `hear` with the size of the one worker's store, if that has grown by itself, and whenever it does."""
        worker = self.workers[0]
        worker.on_grown = hear
        if worker.grown_bytes:
            hear(worker.grown_bytes)

    async def resize(self, size_bytes: int) -> None:
        """Have every worker's engine serve requests up to this size.  Raises `DaemonError` if a worker ends before."""
        await asyncio.gather(*(each.ask(messages.Resize(size_bytes)) for each in self.workers))

    @property
    def can_hold(self) -> bool:
        """Whether all workers are of a version that can hold requests."""
        return all(each.knows_hold for each in self.workers)

    async def hold(self, on: bool, gate: RecordGate | None = None) -> None:
        """Have every worker's requests wait, or go on; a hold with a gate ends with this daemon unless that opens.

        Raises `DaemonError` if a worker ends before.
        """
        reader = gate.reader if gate is not None else None
        await asyncio.gather(*(each.hold(on, reader) for each in self.workers))

    async def release(self) -> None:
        """Have every living worker's requests go on; the next epoch's workers begin so."""
        await asyncio.gather(*(each.hold(False) for each in self.workers), return_exceptions=True)

    async def quiet(self) -> None:
        """After `hold`: wait until the backend has no request.  Raises `DaemonError` if a worker ends before."""
        await asyncio.gather(*(each.quiet() for each in self.workers))

    async def flush(self) -> int:
        """The backend's result of one FLUSH, see `WorkerProcess.flush`; it covers what every queue was answered."""
        return await self.workers[0].flush()

    def attached(self, session: Session) -> wire.Attached:
        """What the backend that these workers expect is told."""
        plan, info = self.plan, self.plan.kernel.info
        return wire.Attached(
            v=wire.PROTOCOL_VERSION,
            device=plan.config.name,
            device_number=plan.kernel.number,
            size_bytes=plan.disk.size_bytes,
            logical_block_bytes=plan.disk.block_bytes,
            queues=info.queues,
            depth=info.depth,
            max_io_bytes=info.max_io_bytes,
            need_get_data=plan.config.need_get_data,
            placement=plan.config.placement,
            read_only=plan.disk.read_only,
            epoch=self.epoch,
            token=session.token.hex(),
            endpoints=self.endpoints,
            rings=tuple(str(self._ring_socket(queue)) for queue in range(info.queues) if plan.config.rings),
            segments=plan.segments(),
            own_segment=session.segment,
            post_bytes=self._post_bytes(),
            spin_us=spin_us(plan.config),
            generation=session.generation,
        )

    def _post_bytes(self) -> tuple[int, ...]:
        if self.plan.config.placement != "backend":
            return ()
        return tuple(each.buffer_bytes for each in self.plan.arena.geometry.classes)

    async def connect(self) -> str:
        """Have the one worker connect to its store; the name under which it has locked that.  Raises `DaemonError`."""
        answer = await self.workers[0].ask(messages.Connect())
        assert isinstance(answer, messages.Connected)
        if answer.reason:
            raise DaemonError(f"{self.plan.config.name}: {answer.reason}")
        return answer.owner

    async def serve(self) -> None:
        """Have the one worker serve the store to which it has connected.  Raises `DaemonError` if it ends before."""
        self.workers[0].tell(messages.Serve())
        await self.linked()

    def unlinked(self) -> list[int]:
        """The queues that the backend has not greeted."""
        return [each.queue for each in self.workers if not each.is_linked]

    async def linked(self) -> None:
        """Wait until the backend has greeted every queue, and is fenced.  Raises `DaemonError` if a worker ends."""
        await asyncio.gather(*(each.linked() for each in self.workers))

    async def lost(self) -> None:
        """The backend is gone: have every worker take back the buffers that the backend held."""
        for worker in self.workers:
            with suppress(DaemonError):
                await worker.ask(messages.Lost())

    def give_up(self) -> None:
        """Have every worker fail the requests that wait for a backend, and new ones."""
        for worker in self.workers:
            with suppress(DaemonError):
                worker.tell(messages.GiveUp())

    async def ended(self) -> WorkerProcess:
        """The first worker that ends; of several that ended meanwhile, one whose exit status is not 0."""
        opener = self.plan.kernel.opener
        if opener is None:
            return await self._first_ended()
        async with beside(self._end_with(opener)):
            return await self._first_ended()

    async def _end_with(self, opener: Opener) -> None:
        """The kernel has ended what it takes for the server: so end the device, whose requests it watches no more."""
        await opener.ended()
        for worker in self.workers:
            worker.fault = SERVER_KILLED
            worker.child.send(signal.SIGKILL)

    async def _first_ended(self) -> WorkerProcess:
        async with AsyncExitStack() as stack:
            waits = {
                await stack.enter_async_context(beside(each.child.wait())): each for each in self.workers
            }
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        # A dead worker's siblings exit with 0, since the kernel takes their tags away.
        return waits[max(done, key=lambda wait: wait.result() != 0)]

    def whole_check(self) -> Call:
        """A call that raises `UblkError` unless every worker lives and has all of its tags.

        A control process makes it just before the command that lets requests come.
        """
        ends = tuple((each.queue, each.child.end_check) for each in self.workers)
        return Call(_check_whole, ends, fds=[self.plan.arena.control_fd])

    async def drain(self, patience_s: float) -> None:
        """Wait until the living workers hold no request, at most `patience_s`."""
        deadline_s = asyncio.get_running_loop().time() + patience_s
        while any(map(self._is_busy, self.workers)) and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(_POLL_S)

    async def end(self, patience_s: float) -> None:
        """Wait for the workers of a stopped or quiesced device, kill those that stay, remove their sockets."""
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(each.child.wait() for each in self.workers)), patience_s)
        await self.kill()

    async def kill(self) -> None:
        """Kill all workers, remove their sockets."""
        if self._gate is not None:
            self._gate.close()
            self._gate = None
        for worker in self.workers:
            await worker.child.kill()
        for worker in self.workers:
            worker.close()
            for path in (self._socket(worker.queue), self._ring_socket(worker.queue)):
                path.unlink(missing_ok=True)

    def _is_busy(self, worker: WorkerProcess) -> bool:
        counters = read_statistics(self.plan.arena.control.statistics_block(worker.queue)).counters
        # What the limits hold back may take long, and the next epoch's worker gets it again.
        return worker.child.exit_status is None and counters["in_flight"] > counters["limit_waiting"]

    def _spec(self, queue: int, cpu: int | None) -> WorkerSpec:
        plan, info = self.plan, self.plan.kernel.info
        answers_itself = plan.config.answers == "worker"
        offers_rings = plan.config.rings and plan.config.has_backend_process
        timeout_ms, fail_on_timeout, absent_ms = _deadlines(plan.config)
        return WorkerSpec(
            name=plan.config.name,
            queue=QueueConfig(
                device_number=plan.kernel.number,
                queue=queue,
                depth=info.depth,
                queues=info.queues,
                epoch=self.epoch,
                max_io_bytes=info.max_io_bytes,
                answers_itself=answers_itself,
                block_bytes=plan.disk.block_bytes,
                need_get_data=plan.config.asks_for_data,
                zero_copy=plan.config.zero_copy,
                place_in_backend=plan.config.placement == "backend",
                timeout_ms=timeout_ms,
                fail_on_timeout=fail_on_timeout,
                absent_ms=absent_ms,
                held=plan.held,
                slice_bytes=plan.area.slice_bytes if plan.area else 0,
                slices=plan.area.bits if plan.area else 0,
                classes=self._classes(queue),
            ),
            queue_socket=self._socket(queue),
            ring_socket=self._ring_socket(queue) if offers_rings else None,
            pool_endpoint=plan.pool_endpoint,
            socket_mode=socket_mode(plan.group),
            socket_group=plan.group,
            cpu=cpu,
            spin_us=spin_us(plan.config),
            hold_gate=plan.hold_gate.reader if plan.hold_gate is not None else None,
            engine=plan.engine,
            account=plan.account,
            is_prepared=plan.is_prepared,
        )

    def _classes(self, queue: int) -> tuple[BufferClass, ...]:
        arena = self.plan.arena
        return buffer_classes(arena) if self.plan.pool_endpoint is not None else own_classes(arena, queue)

    def _socket(self, queue: int) -> Path:
        return self.plan.queue_dir / f"{self.plan.kernel.number}.{queue}"

    def _ring_socket(self, queue: int) -> Path:
        return self.plan.queue_dir / f"{self.plan.kernel.number}.{queue}.ring"


def _deadlines(config: DeviceConfig) -> tuple[int, bool, int]:
    """`timeout_ms`, `fail_on_timeout` and `absent_ms` of `QueueConfig`."""
    can_be_absent = config.has_backend_process and config.on_absent == "fail"
    absent_ms = max(1, int(config.absent_timeout_s * 1000)) if can_be_absent else 0
    return max(1, int(config.io_timeout_s * 1000)), config.on_timeout == "fail", absent_ms


def spin_us(config: DeviceConfig) -> int:
    """Busy-poll time in microseconds: the config's, else 20 from 16 CPUs on, else 0."""
    if config.spin_us is not None:
        return config.spin_us
    return SPIN_DEFAULT_US if len(os.sched_getaffinity(0)) >= SPIN_CPUS_MIN else 0


def _check_whole(control_fd: int, ends: Sequence[tuple[int, Callable[[], bool]]]) -> None:
    """See `Team.whole_check`; `ends` tell whether the worker of a queue has ended."""
    control = Control(control_fd)
    try:
        for queue, has_ended in ends:
            if has_ended() or read_statistics(control.statistics_block(queue)).counters["tags_gone"]:
                raise UblkError(f"queue {queue}: its worker or its tags have gone", errno.EOWNERDEAD)
    finally:
        control.close()
