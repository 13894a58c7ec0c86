"""What serves a device: the kernel's device, its pool and the leases of it, the workers of this epoch.

Owns these parts and how each is made and removed; the order is `build.py`'s, `recovery.py`'s and `teardown.py`'s.
Runs on the supervisor's asyncio loop.
"""

import asyncio
import errno
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.bufpool.memory_room import mib
from ublkpool.bufpool.pool.arena import Arena, arena_prefix, data_name
from ublkpool.bufpool.pool.control import Limits
from ublkpool.bufpool.pool.memory import DataPlan
from ublkpool.daemon.device.attached_backend import AttachedBackend
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.limits import limits_of
from ublkpool.daemon.device.memory import Made, memory_of, pool_of
from ublkpool.daemon.device.pool import Pool
from ublkpool.daemon.device.records import FIRST_EPOCH, Record
from ublkpool.daemon.device.succession import AdoptedDevice
from ublkpool.daemon.device.team import Plan, Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.client_area import ClientArea
from ublkpool.daemon.kernel.control_process import ControlFailed
from ublkpool.daemon.kernel.disk_parameters import parameters
from ublkpool.daemon.kernel.opener import Opener
from ublkpool.daemon.processes.background import logged
from ublkpool.daemon.processes.beside import beside
from ublkpool.daemon.processes.broker_process import Leases, NoLeases
from ublkpool.daemon.processes.held_names import opener_names, pool_name, slice_name, worker_name
from ublkpool.daemon.settings.config import CLIENT_SLICES, DeviceConfig
from ublkpool.ublk.abi import Feature, Parameters
from ublkpool.ublk.statistics import read_statistics
from ublkpool.workers.engine_inside import EngineSpec
from ublkpool.workers.record_gate import RecordGate

STOP_DEADLINE_S = 60.0
WORKER_PATIENCE_S = 10.0
GOING_POLL_S = 0.2
_log = logging.getLogger("ublkpool.device")


class DeviceResources:
    """The parts that serve one device; None is what it does not have now."""

    def __init__(self, config: DeviceConfig, context: DaemonContext, backend: AttachedBackend) -> None:
        """`backend` hears what workers report, and its end lets a disk stop that would wait for it."""
        self.kernel: BlockDevice | None = None
        self.mark = 0
        """Of the kernel's device, from before ADD_DEV; 0 if the kernel certainly has none."""
        self.disk: Disk | None = None
        self.pool = Pool(config.name, context.holder, context.runner)
        self.area: ClientArea | None = None
        self.leases: Leases | None = None
        self.team: Team | None = None
        self.epoch = FIRST_EPOCH
        """The last that has begun."""
        self.left_requests = 0
        """Requests that the last dead workers held, which the kernel sends again."""
        self.holds = False
        """Whether the next workers' requests wait, since the device is drained or about to be."""
        self.hold_gate: RecordGate | None = None
        """Until it is on record that the device is drained; the workers' hold ends if this daemon ends before."""
        self.segment_bytes = 0
        """The size of the segment that its last backend has brought."""
        self.is_prepared = False
        """Whether no device has taken it yet, see `prepared.py`."""
        self.config = config
        self._context = context
        self._backend = backend

    @property
    def arena(self) -> Arena | None:
        """The pool's memory."""
        return self.pool.arena

    @property
    def memory_bytes(self) -> int:
        """What the daemon makes for the device, see `memory.py`; before it is made, what will be."""
        arena, area = self.arena, self.area
        slices_bytes = area.slice_bytes * CLIENT_SLICES if area else 0
        if area is None and self.team is None:
            # Whether the driver supports it is known only when the device is made.
            slices_bytes = self.config.client_buffers_bytes
        made = Made(arena.geometry, arena.queues) if arena is not None else None
        return memory_of(self.config, slices_bytes, made) + self.segment_bytes

    @contextmanager
    def counting(self, attach: wire.Attach) -> Iterator[None]:
        """From now on the segment of this backend counts, unless the block raises.

        Raises `AttachRefused` if the device has yet to be made and the budget has no room for it with this segment.  No
        backend of a device that exists is refused for that: its requests wait for one.
        """
        before_bytes, self.segment_bytes = self.segment_bytes, attach.segment_bytes
        try:
            is_judged = self.team is None and attach.segment_bytes
            if is_judged and (reason := self._context.budget.refusal(self.config.name, self.memory_bytes)):
                raise AttachRefused(f"with its backend's segment of {mib(attach.segment_bytes)} {reason}")
            yield
        except BaseException:
            self.segment_bytes = before_bytes
            raise

    def counted(self, name: str) -> int:
        """The sum of one of the workers' counters over the queues; they go on over a recovery."""
        arena = self.arena
        if arena is None:
            return 0
        blocks = (arena.control.statistics_block(queue) for queue in range(arena.queues))
        return sum(read_statistics(block).counters[name] for block in blocks)

    async def add_kernel(self, attach: wire.Attach | None) -> None:
        """ADD_DEV, and SET_PARAMS for the disk that this backend makes.  Raises `DaemonError`, `OSError`.

        Without a backend SET_PARAMS is sent with START_DEV, once `take` was told of one.
        """
        asked = None if attach is None else self._parameters(attach)
        self.kernel = await BlockDevice.create(self._context.runner, self.config, asked, self.mark)

    def _parameters(self, attach: wire.Attach) -> Parameters:
        assert self.disk is not None
        return parameters(self.config, self.disk.size_bytes, attach)

    def take(self, prepared: "DeviceResources", attach: wire.Attach, engine: EngineSpec | None) -> Team:
        """Take over all that was prepared, for the disk that this backend makes; its workers are to be told yet."""
        kernel, team = prepared.kernel, prepared.team
        assert kernel is not None and team is not None
        asked = self._parameters(attach)
        self.kernel, self.mark, self.leases = kernel, prepared.mark, prepared.leases
        self.team, self.epoch = team, team.epoch
        prepared.kernel, prepared.mark, prepared.leases, prepared.team = None, 0, None, None
        kernel.take(self.config.name, asked)
        self.pool.take(prepared.pool)
        self.set_limits(limits_of(self.config))
        team.serve_for(self._plan(engine), self._backend.hear)
        return team

    async def equip(self) -> None:
        """Pool, client area and leases.  Raises `DaemonError`, `PoolError`, `OSError`; what was made stays."""
        assert self.kernel is not None
        leases = await self.ensure_pool()
        await self._make_area(self.kernel)
        await leases.register(FIRST_EPOCH)

    async def adopt(self, adopted: AdoptedDevice, disk: Disk | None) -> Team:
        """Go on with an earlier daemon's workers, pool and disk.  Raises `DaemonError`, `PoolError`, `OSError`."""
        record, kernel = adopted.record, adopted.kernel
        self.kernel, self.disk = kernel, disk
        if kernel.is_a_users:
            kernel.opener = Opener.adopt(self.config.name, adopted.held)
        data_fd = adopted.held.get(pool_name(self.config.name))
        arena = Arena.open(self._arena_prefix(kernel), data_fd, self.config.huge_pages)
        self.pool.resume(arena)
        self.set_limits(limits_of(self.config))
        await self.find_area(record, adopted.held)
        self.leases = self._leases(kernel, arena, record.epoch)
        await self.leases.refresh()
        team = self.new_team(record.epoch)
        team.adopt(adopted.workers)
        return team

    @property
    def limits(self) -> Limits:
        """The limits that hold now; before the device has a pool those of its config."""
        return self.arena.control.limits if self.arena is not None else limits_of(self.config)

    def set_limits(self, limits: Limits) -> None:
        """Set what the queues let through together; workers that run and requests that wait follow within 0.1 s."""
        if self.arena is not None:
            self.arena.control.set_limits(limits)

    async def _make_area(self, kernel: BlockDevice) -> None:
        """Make the memory that clients share with the backend, if the driver supports it; else requests are copied."""
        if not self.config.client_buffers_bytes or not kernel.info.flags & Feature.SHMEM_ZC:
            return
        config = self.config
        self.area = await ClientArea.create(self._context.runner, config.name, config.client_buffers_bytes)
        if not await kernel.register(self.area):
            raise DaemonError(f"{self.config.name}: the driver does not number registered buffers as we do")
        self._hold_area(self.area)

    async def find_area(self, record: Record, held: Mapping[str, int]) -> None:
        """Go on with the client area that an earlier daemon made, as far as its memory is held."""
        if record.clients is not None:
            runner, name = self._context.runner, record.config.name
            self._hold_area(await ClientArea.find(runner, record.clients, name, held))

    def _hold_area(self, area: ClientArea) -> None:
        self.area = area
        for number, fd in area.files.items():
            self._context.holder.hold(slice_name(self.config.name, number), fd)

    async def try_stop(self) -> bool:
        """Stop the disk unless it is open; whether it stopped.  Raises `ControlFailed`: it may still stop later."""
        team, kernel = self.team, self.kernel
        assert team is not None and kernel is not None
        async with (
            beside(self._lift_limits_once_going(kernel)),
            beside(self._give_up_once_going(team, kernel)),
        ):
            return await kernel.try_stop(STOP_DEADLINE_S)

    async def _give_up_once_going(self, team: Team, kernel: BlockDevice) -> None:
        """Not before the kernel has decided: a disk that stays keeps its requests for the next backend."""
        await self._backend.gone()
        with logged(self.config.name):
            while not await kernel.has_gone():
                await asyncio.sleep(GOING_POLL_S)
            await self._give_up_without_backend(team)

    async def _lift_limits_once_going(self, kernel: BlockDevice) -> None:
        """A disk that goes does not wait for requests that its limits hold back; one that stays keeps its limits."""
        if limits_of(self.config) == Limits():
            return
        with logged(self.config.name):
            while not await kernel.has_gone():
                await asyncio.sleep(GOING_POLL_S)
            self.set_limits(Limits())

    async def stop(self) -> None:
        """STOP_DEV while workers and backend serve the last requests, then the workers end; no other order is safe.

        Without a backend these requests fail.  A failure of STOP_DEV is logged.
        """
        team, kernel = self.team, self.kernel
        if team is None or kernel is None:
            return
        self.set_limits(Limits())
        with logged(self.config.name):
            async with beside(self._give_up_without_backend(team)):
                await kernel.stop(STOP_DEADLINE_S)
        await team.end(WORKER_PATIENCE_S)

    async def _give_up_without_backend(self, team: Team) -> None:
        if self.config.isolation == "none":
            # The workers answer until the disk has stopped, unless their store is still to come.
            if team.unlinked():
                team.give_up()
            return
        await self._backend.gone()
        team.give_up()
        await team.lost()

    async def remove(self) -> None:
        """Remove every part, after `stop` and the backend's end.

        Raises `DaemonError` if the kernel's device stays; the other parts are removed then, and a retry may succeed.
        """
        try:
            await self.remove_kernel()
        finally:
            if self.leases is not None:
                with logged(self.config.name):
                    await self.leases.close()
                self.leases = None
            with logged(self.config.name):
                self.pool.remove()
            self._close_area()
            self.team, self.epoch, self.segment_bytes = None, FIRST_EPOCH, 0

    async def remove_kernel(self) -> None:
        """DEL_DEV, also for a device that an ADD_DEV without an answer may have made.  Raises `DaemonError`."""
        if self.kernel is None and self.mark:
            self.kernel = await BlockDevice.find_marked(self._context.runner, self.config.name, self.mark)
        if self.kernel is not None:
            try:
                await self.kernel.delete()
            except ControlFailed as error:
                if error.errno != errno.ENODEV:
                    raise
            self.kernel.let_go()
            self._context.holder.drop(opener_names(self.config.name)[0])
        self.kernel, self.mark = None, 0

    async def discard(self) -> None:
        """STOP_DEV and DEL_DEV for a device without workers.  Raises `DaemonError` if it stays."""
        if self.kernel is not None:
            with logged(self.config.name):
                await self.kernel.stop(STOP_DEADLINE_S)
        await self.remove_kernel()

    def abandon(self) -> None:
        """Close everything here; workers, pool and kernel device stay as they are."""
        if self.team is not None:
            self.team.let_go()
        if self.kernel is not None:
            self.kernel.let_go()
        self.pool.close()
        self._close_area()

    def _close_area(self) -> None:
        if self.area is not None:
            self.area.close()
            self.area = None

    async def ensure_pool(self) -> Leases:
        """The leases of the pool, which is made if the device has none.  Raises `PoolError`, `OSError`."""
        assert self.kernel is not None
        if self.leases is None:
            arena = await self._make_arena(self.kernel)
            self.pool.begin(arena)
            self.set_limits(limits_of(self.config))
            self.leases = self._leases(self.kernel, arena)
        return self.leases

    def _leases(self, kernel: BlockDevice, arena: Arena, known: int | None = None) -> Leases:
        kind = Leases if self.config.asks_the_broker else NoLeases
        return kind(self._context.broker, kernel.number, kernel.info.queues, arena.control_fd, known)

    async def _make_arena(self, kernel: BlockDevice) -> Arena:
        info, config = kernel.info, self.config
        geometry, reserve = pool_of(config, info.queues, info.depth, info.max_io_bytes)
        huge = config.huge_pages
        data = await self.pool.allocate(DataPlan(data_name(kernel.number), geometry.total_bytes, huge))
        name = self._arena_prefix(kernel)
        return Arena.create(name, geometry, info.queues, kernel.number, reserve, huge, data)

    def _arena_prefix(self, kernel: BlockDevice) -> str:
        return arena_prefix(self._context.instance, kernel.number)

    def new_team(self, epoch: int, engine: EngineSpec | None = None) -> Team:
        """The team of this epoch, without a worker yet; its workers run this engine, if there is one."""
        self.team, self.epoch = Team(self._plan(engine), epoch, self._backend.hear), epoch
        return self.team

    def _plan(self, engine: EngineSpec | None) -> Plan:
        kernel, arena, disk, context = self.kernel, self.arena, self.disk, self._context
        assert kernel is not None and arena is not None and disk is not None
        return Plan(
            self.config,
            kernel,
            arena,
            disk,
            context.broker.endpoint if self.config.asks_the_broker else None,
            context.queue_dir,
            context.group,
            self.area,
            self.holds,
            self.hold_gate,
            context.account,
            engine,
            self.is_prepared,
            context.worker_template,
        )

    def grow(self, size_bytes: int) -> None:
        """The disk has this size for every backend that attaches from now on."""
        assert self.disk is not None
        self.disk = self.disk.grown(size_bytes)
        if self.team is not None:
            self.team.plan = self.team.plan._replace(disk=self.disk)

    def hold_workers(self, team: Team) -> None:
        """Have the holder keep the sockets of workers on record; a worker on no record must see this daemon's end."""
        # First: the next daemon goes on with the workers if it can reach them.
        if (opener := team.plan.kernel.opener) is not None:
            opener.hold(self.config.name, self._context.holder)
        for worker in team.workers:
            self._context.holder.hold(worker_name(self.config.name, worker.queue), worker.fileno())
