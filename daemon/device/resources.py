"""What serves a device: the kernel's device, its pool and who holds which buffer of it, the workers of this epoch.

Owns these parts and the order in which they come and go; when they do, and for which backend, is `device.py`'s.  Runs
on the supervisor's asyncio loop.
"""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Mapping

from ublkpool.bufpool import wire
from ublkpool.bufpool.pool.arena import Arena, arena_prefix
from ublkpool.bufpool.pool.limits import pool_geometry
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.disk import Disk, disk_of
from ublkpool.daemon.device.pool import Pool
from ublkpool.daemon.device.records import FIRST_EPOCH, Record
from ublkpool.daemon.device.recovery import next_epoch, recover
from ublkpool.daemon.device.succession import AdoptedDevice
from ublkpool.daemon.device.team import Plan, Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.block_device import BlockDevice, new_mark, parameters
from ublkpool.daemon.kernel.client_area import ClientArea
from ublkpool.daemon.kernel.control_process import ControlFailed
from ublkpool.daemon.processes.background import logged
from ublkpool.daemon.processes.broker_process import Leases
from ublkpool.daemon.processes.held_names import pool_name, slice_name, worker_name
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk.abi import Feature
from ublkpool.workers import messages

STOP_DEADLINE_S = 60.0
WORKER_PATIENCE_S = 10.0
GOING_POLL_S = 0.2
_log = logging.getLogger("ublkpool.device")


class DeviceResources:
    """The parts that serve one device; None is what it does not have now."""

    def __init__(
        self,
        config: DeviceConfig,
        context: DaemonContext,
        save: Callable[[], None],
        watch: Callable[[Team], None],
        hear: Callable[[WorkerProcess, messages.FromWorker], None],
    ) -> None:
        """`save` puts it on record; `watch` is told every new team, `hear` whatever its workers say."""
        self.kernel: BlockDevice | None = None
        self.mark = 0
        """Of the kernel's device, from before it is made; 0 if there is none for certain."""
        self.disk: Disk | None = None
        self.pool = Pool(config.name, context.holder)
        self.area: ClientArea | None = None
        self.leases: Leases | None = None
        self.team: Team | None = None
        self._config = config
        self._context = context
        self._save = save
        self._watch = watch
        self._hear = hear

    @property
    def arena(self) -> Arena | None:
        """The pool's memory."""
        return self.pool.arena

    async def build(self, attach: wire.Attach) -> Team:
        """Kernel device, pool and workers, of the disk that this backend makes; nobody sees the disk yet.

        Raises `DaemonError`, `PoolError`, `OSError`; what was made by then is there.
        """
        self.disk = disk_of(self._config, attach)
        asked = parameters(self._config, self.disk.size_bytes, attach)
        # What could not be removed must not be forgotten.
        await self.remove_kernel()
        self.mark = new_mark()
        # Before the kernel has it: then it is found whenever this daemon ends.
        self._save()
        self.kernel = await BlockDevice.create(self._context.runner, self._config, asked, self.mark)
        self._save()
        self.leases = self._make_pool(self.kernel)
        await self._make_area(self.kernel)
        await self.leases.register(FIRST_EPOCH)
        team = await self._fork(FIRST_EPOCH)
        await team.ready()
        return team

    async def adopt(self, adopted: AdoptedDevice) -> Team:
        """Go on with an earlier daemon's workers and pool.  Raises `DaemonError`, `PoolError`, `OSError`."""
        record, kernel = adopted.record, adopted.kernel
        self.kernel, self.disk = kernel, record.disk
        data_fd = adopted.held.get(pool_name(self._config.name))
        arena = Arena.open(self._arena_prefix(kernel), data_fd, self._config.huge_pages)
        self.pool.resume(arena)
        await self.find_area(record, adopted.held)
        self.leases = Leases(
            self._context.broker, kernel.number, kernel.info.queues, arena.control_fd, record.epoch
        )
        await self.leases.refresh()
        self.team = self._make_team(record.epoch)
        self.team.adopt(adopted.workers)
        return self.team

    async def _make_area(self, kernel: BlockDevice) -> None:
        """Memory that clients share with the backend, where the driver can tell it; without it they are copied for."""
        if not self._config.client_buffers_bytes or not kernel.info.flags & Feature.SHMEM_ZC:
            return
        self.area = ClientArea.create(self._config.client_buffers_bytes)
        if not await kernel.register(self.area):
            raise DaemonError(f"{self._config.name}: the driver does not number registered buffers as we do")
        self._hold_area(self.area)

    async def find_area(self, record: Record, held: Mapping[str, int]) -> None:
        """The client area that an earlier daemon made, as far as somebody still has it."""
        if record.clients is not None:
            runner, name = self._context.runner, record.config.name
            self._hold_area(await ClientArea.find(runner, record.clients, name, held))

    def _hold_area(self, area: ClientArea) -> None:
        self.area = area
        for number, fd in area.files.items():
            self._context.holder.hold(slice_name(self._config.name, number), fd)

    async def begin_again(self, epoch: int) -> Team:
        """The epoch after `epoch`, serving, with a pool of its own: all who served `epoch` are dead.

        Raises `DaemonError`, `PoolError`, `OSError`; then it can be tried again.
        """
        assert self.kernel is not None
        if self.leases is None:
            self.leases = self._make_pool(self.kernel)
        if self.team is None:
            return await next_epoch(self.kernel, epoch + 1, self._fork, None, self.leases)
        return await self.recover(None)

    async def recover(self, session: Session | None) -> Team:
        """The next epoch, serving; `session` is the backend.

        Raises `DaemonError`, `PoolError`, `OSError`; then it can be tried again.
        """
        assert self.team is not None and self.leases is not None
        return await recover(self.team, self._fork, session, self.leases)

    async def refresh_leases(self) -> None:
        """Tell a broker that was started since of this device's leases; a failure is logged."""
        # Without a turn: whoever has it may be waiting for the buffers that the new broker does not know of yet.
        if self.leases is not None:
            with logged(self._config.name):
                await self.leases.refresh()
                self._save()

    async def try_stop(self, backend_gone: Callable[[], Awaitable[None]]) -> bool:
        """Stop the disk unless it is open; whether it stopped.  Raises `ControlFailed`, and then it may go later."""
        team, kernel = self.team, self.kernel
        assert team is not None and kernel is not None
        watching = asyncio.ensure_future(self._give_up_once_going(team, kernel, backend_gone))
        try:
            return await kernel.try_stop(STOP_DEADLINE_S)
        finally:
            watching.cancel()

    async def _give_up_once_going(
        self, team: Team, kernel: BlockDevice, backend_gone: Callable[[], Awaitable[None]]
    ) -> None:
        """Not before the kernel has decided: a disk that stays keeps its requests for the next backend."""
        await backend_gone()
        with logged(self._config.name):
            while not await kernel.has_gone():
                await asyncio.sleep(GOING_POLL_S)
            await _give_up_without_backend(team, backend_gone)

    async def stop(self, backend_gone: Callable[[], Awaitable[None]]) -> None:
        """In the order that cannot wedge the host: the disk stops while workers and backend serve, then workers end."""
        team, kernel = self.team, self.kernel
        if team is not None and kernel is not None:
            await self._stop_kernel(team, kernel, backend_gone)
            await team.end(WORKER_PATIENCE_S)

    async def _stop_kernel(
        self, team: Team, kernel: BlockDevice, backend_gone: Callable[[], Awaitable[None]]
    ) -> None:
        """STOP_DEV, while workers and backend serve what is still to be written; without a backend it all fails."""
        watching = asyncio.ensure_future(_give_up_without_backend(team, backend_gone))
        with logged(self._config.name):
            await kernel.stop(STOP_DEADLINE_S)
        watching.cancel()

    async def remove(self) -> None:
        """After `stop`, when the backend is gone as well: leave nothing of it.

        Raises `DaemonError` if the kernel's device stays; everything else has gone then, and it can be tried again.
        """
        try:
            await self.remove_kernel()
        finally:
            if self.leases is not None:
                with logged(self._config.name):
                    await self.leases.close()
                self.leases = None
            with logged(self._config.name):
                self.pool.remove()
            self._close_area()
            self.team = None

    async def remove_kernel(self) -> None:
        """Have the kernel rid itself of the device, also of one that an ADD_DEV without an answer may have made.

        Raises `DaemonError` if it does not.
        """
        if self.kernel is None and self.mark:
            self.kernel = await BlockDevice.find_marked(self._context.runner, self._config.name, self.mark)
        if self.kernel is not None:
            try:
                await self.kernel.delete()
            except ControlFailed as error:
                if error.errno != errno.ENODEV:
                    raise
        self.kernel, self.mark = None, 0

    async def discard(self) -> None:
        """Remove a kernel device that no worker serves.  Raises `DaemonError` if it stays."""
        if self.kernel is not None:
            with logged(self._config.name):
                await self.kernel.stop(STOP_DEADLINE_S)
        await self.remove_kernel()

    def abandon(self) -> None:
        """Forget everything, change nothing."""
        if self.team is not None:
            self.team.let_go()
        self.pool.close()
        self._close_area()

    def _close_area(self) -> None:
        if self.area is not None:
            self.area.close()
            self.area = None

    def _make_pool(self, kernel: BlockDevice) -> Leases:
        arena = self._make_arena(kernel)
        self.pool.begin(arena)
        return Leases(self._context.broker, kernel.number, kernel.info.queues, arena.control_fd)

    def _make_arena(self, kernel: BlockDevice) -> Arena:
        info, config = kernel.info, self._config
        geometry, reserve = pool_geometry(
            info.queues,
            info.depth,
            info.max_io_bytes,
            config.need_get_data,
            config.placement,
            config.pool_bytes,
        )
        name = self._arena_prefix(kernel)
        return Arena.create(name, geometry, info.queues, kernel.number, reserve, config.huge_pages)

    def _arena_prefix(self, kernel: BlockDevice) -> str:
        return arena_prefix(self._context.instance, kernel.number)

    async def _fork(self, epoch: int) -> Team:
        self.team = self._make_team(epoch)
        # An epoch that has begun is never begun again, whoever dies now.
        self._save()
        await self.team.fork()
        self._save()
        self.hold_workers(self.team)
        self._watch(self.team)
        return self.team

    def _make_team(self, epoch: int) -> Team:
        kernel, arena, disk, context = self.kernel, self.arena, self.disk, self._context
        assert kernel is not None and arena is not None and disk is not None
        plan = Plan(
            self._config,
            kernel,
            arena,
            disk,
            context.broker.endpoint,
            context.queue_dir,
            context.group,
            self.area,
        )
        return Team(plan, epoch, self._hear)

    def hold_workers(self, team: Team) -> None:
        """Not before they are on record: a worker that nobody knows of must see the end of this daemon."""
        for worker in team.workers:
            self._context.holder.hold(worker_name(self._config.name, worker.queue), worker.fileno())


async def _give_up_without_backend(team: Team, backend_gone: Callable[[], Awaitable[None]]) -> None:
    await backend_gone()
    team.give_up()
    await team.lost()
