"""One device, from `add` to `del`: waits for a backend, starts, serves, stops, leaves nothing behind.

Owns the order in which kernel device, pool, workers and backend come and go.  Runs on the supervisor's asyncio loop,
never in the data path.

    waiting --attach--> (starting) --START_DEV--> live --del--> gone
                             |                     |
                             +------> failed <-----+   a worker died, or the kernel refused
"""

import asyncio
import logging
import os
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from ublkpool.bufpool import broker, wire
from ublkpool.bufpool.arena import Arena, arena_prefix
from ublkpool.bufpool.errors import AttachRefused, PoolError
from ublkpool.bufpool.limits import pool_geometry
from ublkpool.daemon.attach import Session
from ublkpool.daemon.backend_process import BackendProcess
from ublkpool.daemon.block_device import BlockDevice, parameters
from ublkpool.daemon.broker_process import BrokerProcess
from ublkpool.daemon.config import DeviceConfig
from ublkpool.daemon.control_process import ControlFailed, ControlRunner
from ublkpool.daemon.errors import STATUS_USAGE, DaemonError, one_line
from ublkpool.daemon.status import BackendStatus, DeviceStatus, State, WorkerStatus
from ublkpool.daemon.worker_process import WorkerProcess
from ublkpool.ublk import abi
from ublkpool.ublk.queue import QueueConfig, map_descriptors, unmap_descriptors
from ublkpool.workers import messages
from ublkpool.workers.process import fork_child, run_worker
from ublkpool.workers.queue_loop import WorkerSpec, buffer_classes

START_DEADLINE_S = 600.0
STOP_DEADLINE_S = 60.0
BACKEND_PATIENCE_S = 10.0
WORKER_PATIENCE_S = 10.0
_FIRST_EPOCH = 1
_log = logging.getLogger("ublkpool.device")


class Surroundings:
    """What all devices of a daemon share."""

    def __init__(
        self,
        run_dir: Path,
        instance: str,
        group: int | None,
        runner: ControlRunner,
        pool_broker: BrokerProcess,
    ) -> None:
        self.run_dir = run_dir
        self.instance = instance
        self.group = group
        self.runner = runner
        self.broker = pool_broker
        self.queue_dir = run_dir / "queues"
        # From the open of /dev/ublkcN to its close nobody else may fork: a stray child would hold it.
        self.forking = asyncio.Lock()


class Device:
    """A device of the daemon's."""

    def __init__(self, config: DeviceConfig, around: Surroundings) -> None:
        self.config = config
        self.state: State = "waiting"
        self.reason = ""
        self.session: Session | None = None
        self.arena: Arena | None = None
        self.workers: list[WorkerProcess] = []
        self._around = around
        self._kernel: BlockDevice | None = None
        self._managed: BackendProcess | None = None
        self._size_bytes = config.size_bytes
        self._block_bytes = 0
        self._segments = wire.SEGMENT_POOL
        self._attaching = asyncio.Lock()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._farewell: asyncio.Task[None] | None = None
        self._stopping = False

    def status(self) -> DeviceStatus:
        """What `list` shows."""
        info = self._kernel.info if self._kernel else None
        child = self._managed.child.pid if self._managed else None
        kind = self.config.backend.kind if self.config.backend else None
        if self.session:
            backend = BackendStatus(kind=self.session.attach.kind, pid=self.session.pid, attached=True)
        else:
            backend = BackendStatus(kind=kind, pid=child, attached=False)
        return DeviceStatus(
            name=self.config.name,
            id=info.device_number if info else self.config.id,
            path=str(self._kernel.node) if self._kernel and self.state == "live" else None,
            state=self.state,
            size_bytes=self._size_bytes,
            queues=info.queues if info else self.config.queues,
            depth=self.config.depth,
            need_get_data=self.config.need_get_data,
            placement=self.config.placement,
            recovery=self.config.recovery,
            flags=tuple(abi.feature_names(info.flags)) if info else (),
            workers=tuple(
                WorkerStatus(queue=each.queue, pid=each.child.pid, cpu=each.cpu) for each in self.workers
            ),
            backend=backend,
            reason=self.reason,
        )

    def describe(self) -> wire.Described:
        """What a backend may know before it attaches."""
        config = self.config
        return wire.Described(
            v=wire.PROTOCOL_VERSION,
            device=config.name,
            size_bytes=self._size_bytes or 0,
            max_io_bytes=config.max_io_bytes,
            need_get_data=config.need_get_data,
            placement=config.placement,
            read_only=config.read_only,
        )

    async def live(self) -> None:
        """Return when the device is live.  Raises `DaemonError` with the reason if it fails first."""
        while self.state == "waiting" and not self._stopping:
            self._changed.clear()
            await self._changed.wait()
        if self.state != "live":
            raise DaemonError(f"{self.config.name}: {self.reason or 'the device is being deleted'}")

    async def run_backend(self) -> None:
        """Start the backend of the config and wait until the device is live; raises `DaemonError` if it ends first."""
        assert self.config.backend is not None
        self._managed = BackendProcess(self.config.name, self.config.backend, self._around.run_dir)
        ended = asyncio.ensure_future(self._managed.child.wait())
        live = asyncio.ensure_future(self.live())
        try:
            await asyncio.wait((ended, live), return_when=asyncio.FIRST_COMPLETED)
            if not live.done():
                raise self._backend_failed(self._managed)
            live.result()
        finally:
            ended.cancel()
            live.cancel()
        self._keeper = self._spawn(self._managed.keep_running())

    def _backend_failed(self, process: BackendProcess) -> DaemonError:
        # If the device could not start, its backend ended because of that, not the other way round.
        reason = self.reason.removeprefix(f"{self.config.name}: ") or process.obituary()
        error = DaemonError(f"{self.config.name}: {reason}")
        if process.child.exit_status == STATUS_USAGE:
            error.status = STATUS_USAGE
        return error

    async def attach(self, session: Session) -> None:
        """Take a backend.  Raises `AttachRefused` or another error with the reason if it cannot serve this device."""
        self._refuse_second()
        async with self._attaching:
            if self._farewell is not None:
                self._refuse_second()
                await self._farewell
            self._check_fits(session.attach)
            if self.state == "waiting":
                await self._start(session)
            else:
                await self._introduce(session)

    def _refuse_second(self) -> None:
        if self._stopping or self.state == "failed":
            raise AttachRefused(f"device {self.config.name} {self.reason or 'is being deleted'}")
        if self.session is not None and not self.session.is_gone:
            who = f"{self.session.attach.kind}, process {self.session.pid}"
            raise AttachRefused(f"device {self.config.name} has a backend already ({who})")

    def _check_fits(self, attach: wire.Attach) -> None:
        name, placement = self.config.name, self.config.placement
        if attach.placement not in (placement, "any"):
            raise AttachRefused(
                f"device {name} has placement {placement}, this backend serves {attach.placement}"
            )
        if placement == "backend" and not attach.segment_bytes:
            raise AttachRefused(f"device {name} has placement backend, and this backend brings no segment")
        if attach.read_buffers == "own" and not self.config.need_get_data:
            raise AttachRefused(f"device {name}: read_buffers own needs need_get_data")
        if attach.read_only and not self.config.read_only and self._block_bytes:
            raise AttachRefused(f"device {name} is writable, this backend is not")
        self._check_size(attach)

    def _check_size(self, attach: wire.Attach) -> None:
        name, size = self.config.name, self._size_bytes or attach.size_bytes
        if not size:
            raise AttachRefused(f"device {name} and this backend have no size: give one of them size=N")
        if attach.size_bytes and attach.size_bytes < size:
            raise AttachRefused(f"device {name} has {size} bytes, this backend only {attach.size_bytes}")
        if size % attach.logical_block_bytes:
            raise AttachRefused(
                f"device {name} has {size} bytes, no multiple of {attach.logical_block_bytes}"
            )
        if self._block_bytes and attach.logical_block_bytes > self._block_bytes:
            raise AttachRefused(
                f"device {name} has blocks of {self._block_bytes} bytes, "
                f"this backend needs {attach.logical_block_bytes}"
            )

    async def _start(self, session: Session) -> None:
        try:
            self._size_bytes = self._size_bytes or session.attach.size_bytes
            self._block_bytes = session.attach.logical_block_bytes
            await self._build(session.attach)
            await self._introduce(session)
        except (DaemonError, PoolError, OSError) as error:
            await self._undo_start(one_line(error))
            raise
        self._spawn(self._go_live())

    async def _build(self, attach: wire.Attach) -> None:
        """Kernel device, pool and workers; the disk does not exist yet."""
        assert self._size_bytes is not None
        disk = parameters(self.config, self._size_bytes, attach)
        self._kernel = await BlockDevice.create(self._around.runner, self.config, disk)
        self.arena = self._make_arena(self._kernel)
        number, queues = self._kernel.number, self._kernel.info.queues
        await self._around.broker.command(broker.AddDevice(number), self.arena.control_fd)
        for queue in range(queues):
            await self._around.broker.command(broker.Register(number, queue, _FIRST_EPOCH))
        await self._fork_workers(self._kernel, self.arena)
        await asyncio.gather(*(worker.ready() for worker in self.workers))

    def _make_arena(self, kernel: BlockDevice) -> Arena:
        info, config = kernel.info, self.config
        geometry, reserve = pool_geometry(
            info.queues,
            info.depth,
            info.max_io_bytes,
            config.need_get_data,
            config.placement,
            config.pool_bytes,
        )
        prefix = arena_prefix(self._around.instance, info.device_number)
        return Arena.create(prefix, geometry, info.queues, info.device_number, reserve)

    async def _fork_workers(self, kernel: BlockDevice, arena: Arena) -> None:
        async with self._around.forking:
            char_fd = await kernel.open_char()
            queues, depth = range(kernel.info.queues), kernel.info.depth
            descriptors: list[object] = []
            try:
                descriptors.extend(map_descriptors(char_fd, queue, depth) for queue in queues)
                for queue in queues:
                    self.workers.append(self._fork_worker(kernel, arena, queue, char_fd, descriptors))
            finally:
                # Only the workers hold the device from here on, so that their end releases it.
                for mapped in descriptors:
                    unmap_descriptors(mapped, depth)
                os.close(char_fd)

    def _fork_worker(
        self, kernel: BlockDevice, arena: Arena, queue: int, char_fd: int, descriptors: list[object]
    ) -> WorkerProcess:
        cpu = _cpu_for(queue, kernel.queue_cpus)
        spec = self._worker_spec(kernel, arena, queue, cpu)
        ours, theirs = messages.pair()
        pid = fork_child(
            lambda: run_worker(spec, char_fd, descriptors, arena, theirs),
            [char_fd, arena.data_fd, arena.control_fd, theirs.fileno()],
            f"ublkpool-{kernel.number}.{queue}",
        )
        theirs.close()
        worker = WorkerProcess(queue, cpu, pid, ours, self._on_news)
        self._spawn(self._watch(worker))
        return worker

    def _worker_spec(self, kernel: BlockDevice, arena: Arena, queue: int, cpu: int | None) -> WorkerSpec:
        config, around = self.config, self._around
        return WorkerSpec(
            name=config.name,
            queue=QueueConfig(
                device_number=kernel.number,
                queue=queue,
                depth=kernel.info.depth,
                epoch=_FIRST_EPOCH,
                max_io_bytes=kernel.info.max_io_bytes,
                block_bytes=self._block_bytes,
                need_get_data=config.need_get_data,
                place_in_backend=config.placement == "backend",
                timeout_ms=int(config.io_timeout_s * 1000),
                fail_on_timeout=config.on_timeout == "fail",
                classes=buffer_classes(arena),
            ),
            queue_socket=self._queue_socket(kernel, queue),
            pool_endpoint=around.broker.endpoint,
            socket_mode=0o600 if around.group is None else 0o660,
            socket_group=around.group,
            cpu=cpu,
        )

    def _queue_socket(self, kernel: BlockDevice, queue: int) -> Path:
        return self._around.queue_dir / f"{kernel.number}.{queue}"

    async def _introduce(self, session: Session) -> None:
        """Tell every worker whom to expect, then tell the backend where to go."""
        assert self._kernel is not None and self.arena is not None
        attach = session.attach
        segment = 0
        if attach.segment_bytes:
            self._segments += 1
            segment = self._segments
        expect = messages.Expect(
            session.token.hex(), segment, attach.segment_bytes, attach.read_buffers == "own"
        )
        answers = await asyncio.gather(*(each.ask(expect, session.segment_fd) for each in self.workers))
        for answer in answers:
            if isinstance(answer, messages.Expecting) and answer.reason:
                await self._let_go()
                raise AttachRefused(f"device {self.config.name}: {answer.reason}")
        self.session = session
        self._farewell = self._spawn(self._until_gone(session))
        session.say(self._attached(session, segment), [self.arena.data_fd])
        if self.state == "live":
            session.say(wire.Live(path=str(self._kernel.node)))
        _log.info("%s: backend %s attached (process %d)", self.config.name, attach.kind, session.pid)

    def _attached(self, session: Session, segment: int) -> wire.Attached:
        assert self._kernel is not None and self.arena is not None and self._size_bytes is not None
        info = self._kernel.info
        return wire.Attached(
            v=wire.PROTOCOL_VERSION,
            device=self.config.name,
            device_number=self._kernel.number,
            size_bytes=self._size_bytes,
            logical_block_bytes=self._block_bytes,
            queues=info.queues,
            depth=info.depth,
            max_io_bytes=info.max_io_bytes,
            need_get_data=self.config.need_get_data,
            placement=self.config.placement,
            read_only=self.config.read_only or session.attach.read_only,
            epoch=_FIRST_EPOCH,
            token=session.token.hex(),
            endpoints=tuple(
                f"ipc://{self._queue_socket(self._kernel, queue)}" for queue in range(info.queues)
            ),
            segments=(wire.Segment(number=wire.SEGMENT_POOL, size_bytes=self.arena.geometry.total_bytes),),
            own_segment=segment,
        )

    async def _go_live(self) -> None:
        assert self._kernel is not None
        try:
            await self._kernel.start(START_DEADLINE_S)
            await self._kernel.wait_for_node()
        except DaemonError as error:
            if not self._stopping:
                await self._fail(one_line(error))
            return
        if self._stopping:
            return
        self._set_state("live")
        if self.session is not None:
            self.session.say(wire.Live(path=str(self._kernel.node)))
        _log.info("%s: live as %s", self.config.name, self._kernel.node)

    async def _until_gone(self, session: Session) -> None:
        """After a backend's end: let the workers take back what it held."""
        await session.gone()
        if not self._stopping:
            _log.warning(
                "%s: backend %s is gone; requests wait for the next", self.config.name, session.attach.kind
            )
        await self._let_go()
        session.close()
        self.session = self._farewell = None

    async def _let_go(self) -> None:
        for worker in self.workers:
            with suppress(DaemonError):
                await worker.ask(messages.Lost())

    def _on_news(self, worker: WorkerProcess, news: messages.FromWorker) -> None:
        if isinstance(news, messages.Cut):
            _log.error("%s queue %d: backend cut off: %s", self.config.name, worker.queue, news.reason)
            if self.session is not None:
                self._spawn(self.session.cut_off())
        elif isinstance(news, messages.Silent):
            _log.warning(
                "%s queue %d: a request has waited longer than io_timeout_s = %g",
                self.config.name,
                worker.queue,
                self.config.io_timeout_s,
            )

    async def _watch(self, worker: WorkerProcess) -> None:
        await worker.child.wait()
        if not self._stopping and self.state != "failed":
            await self._fail(worker.obituary())

    async def _fail(self, reason: str) -> None:
        """The device cannot go on: end it in the kernel, keep it in the list with its reason."""
        _log.error("%s: %s", self.config.name, reason)
        self.reason = reason
        self._set_state("failed")
        # STOP_DEV waits for what a dead worker held, and its siblings keep the device from giving it up.
        for each in self.workers:
            await each.child.kill()
        await self._tear_down()

    async def _undo_start(self, reason: str) -> None:
        self._stopping = True
        _log.error("%s: %s", self.config.name, reason)
        self.reason = reason
        await self._tear_down()
        self._stopping = False
        self._set_state("waiting" if self.config.backend is None else "failed")

    def in_use(self) -> bool:
        """Whether a mount or something else holds the disk."""
        return self._kernel is not None and self.state == "live" and self._kernel.in_use()

    async def delete(self, force: bool) -> None:
        """Stop the device and leave nothing of it.  Raises `DaemonError` if it is in use and not forced."""
        if not force and self.in_use():
            raise DaemonError(
                f"{self.config.name}: its disk is in use (mounted?): unmount it, or use --force"
            )
        self._stopping = True
        self._set_state(self.state)
        await self._tear_down()
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    async def _tear_down(self) -> None:
        """In the order that cannot wedge the host: stop while workers serve, workers end, backend goes, delete."""
        if self.session is None:
            self._give_up()
        if self._kernel is not None and self.workers:
            await self._stop_kernel(self._kernel)
        await self._end_workers()
        await self._end_backend()
        if self._kernel is not None:
            with _logged(self.config.name):
                await self._kernel.delete()
            await self._forget_pool(self._kernel)
        self._kernel = None

    def _give_up(self) -> None:
        for worker in self.workers:
            with suppress(DaemonError):
                worker.tell(messages.GiveUp())

    async def _stop_kernel(self, kernel: BlockDevice) -> None:
        stopping = asyncio.ensure_future(kernel.stop(STOP_DEADLINE_S))
        gone = asyncio.ensure_future(self.session.gone()) if self.session else None
        if gone is not None:
            # A backend that dies now leaves requests that nobody will answer: they fail, so that the stop ends.
            gone.add_done_callback(lambda done: None if done.cancelled() else self._give_up())
        with _logged(self.config.name):
            await stopping
        if gone is not None:
            gone.cancel()

    async def _end_workers(self) -> None:
        for worker in self.workers:
            with suppress(TimeoutError):
                await asyncio.wait_for(worker.child.wait(), WORKER_PATIENCE_S)
                continue
            await worker.child.kill()
        for worker in self.workers:
            worker.close()
            if self._kernel is not None:
                self._queue_socket(self._kernel, worker.queue).unlink(missing_ok=True)

    async def _end_backend(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        if self.session is not None:
            await self.session.detach(self.reason or "the device is being deleted", BACKEND_PATIENCE_S)
        if self._farewell is not None:
            await self._farewell
        if self._managed is not None:
            await self._managed.child.end(BACKEND_PATIENCE_S)

    async def _forget_pool(self, kernel: BlockDevice) -> None:
        if self.arena is None:
            return
        with _logged(self.config.name):
            for worker in self.workers:
                await self._around.broker.command(broker.Reclaim(kernel.number, worker.queue, _FIRST_EPOCH))
            await self._around.broker.command(broker.RemoveDevice(kernel.number))
        self.workers = []
        self.arena.unlink()
        self.arena.close()
        self.arena = None

    def _set_state(self, state: State) -> None:
        self.state = state
        self._changed.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s: %s", self.config.name, one_line(error), exc_info=error)


def _cpu_for(queue: int, queue_cpus: list[list[int]]) -> int | None:
    """One of the CPUs whose requests come to the queue, of those that we may use."""
    usable = sorted(set(queue_cpus[queue]) & os.sched_getaffinity(0))
    return usable[queue % len(usable)] if usable else None


class _logged:
    """Logs a failure of a step that must not keep the next from being tried."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> bool:
        if isinstance(error, DaemonError | PoolError | ControlFailed):
            _log.error("%s: %s", self._name, error)
            return True
        return False
