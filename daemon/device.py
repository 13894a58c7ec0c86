"""One device, from `add` to `del`: waits for a backend, starts, serves, stops, leaves nothing behind.

Owns the order in which kernel device, pool, workers and backend come and go.  Runs on the supervisor's asyncio loop,
never in the data path.

    waiting --attach--> (starting) --START_DEV--> live --del--> gone
                             |                    |  ^
                             |     a worker died  v  | fenced, and fetched again
                             |                 recovering
                             +------> failed <----+   the kernel refused, or its workers keep dying
"""

import asyncio
import logging
import os
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ublkpool.bufpool import wire
from ublkpool.bufpool.arena import Arena, arena_prefix
from ublkpool.bufpool.errors import AttachRefused, PoolError
from ublkpool.bufpool.keeper import Keeper, keeper_path
from ublkpool.bufpool.limits import pool_geometry
from ublkpool.daemon.backend_process import BackendProcess
from ublkpool.daemon.block_device import BlockDevice, parameters
from ublkpool.daemon.broker_process import BrokerProcess, Leases
from ublkpool.daemon.config import DeviceConfig
from ublkpool.daemon.control_process import ControlRunner
from ublkpool.daemon.disk import Disk, check_fits, disk_of
from ublkpool.daemon.errors import STATUS_USAGE, DaemonError, one_line, without_name
from ublkpool.daemon.holder import Holder
from ublkpool.daemon.records import FIRST_EPOCH, Record, Records, build_id, end_left, is_alive
from ublkpool.daemon.recovery import Strikes, next_epoch, recover, retire
from ublkpool.daemon.session import Session
from ublkpool.daemon.status import BackendStatus, DeviceStatus, State, WorkerStatus
from ublkpool.daemon.succession import Heir, record_of, session_names, worker_name
from ublkpool.daemon.team import Plan, Team
from ublkpool.daemon.worker_process import WorkerProcess
from ublkpool.ublk import abi
from ublkpool.workers import messages

START_DEADLINE_S = 600.0
STOP_DEADLINE_S = 60.0
BACKEND_PATIENCE_S = 10.0
HANGUP_PATIENCE_S = 5.0
WORKER_PATIENCE_S = 10.0
IO_TIMEOUT_MS = 1000
RECOVERY_PAUSE_S = 0.5
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
        holder: Holder,
    ) -> None:
        self.run_dir = run_dir
        self.instance = instance
        self.group = group
        self.runner = runner
        self.broker = pool_broker
        self.holder = holder
        self.build = build_id()
        self.records = Records(run_dir / "devices")
        self.queue_dir = run_dir / "queues"


class Device:
    """A device of the daemon's."""

    def __init__(self, config: DeviceConfig, around: Surroundings) -> None:
        self.config = config
        self.state: State = "waiting"
        self.reason = ""
        self.session: Session | None = None
        self.arena: Arena | None = None
        self._around = around
        self._kernel: BlockDevice | None = None
        self._team: Team | None = None
        self._managed: BackendProcess | None = None
        self._disk: Disk | None = None
        self._segments = wire.SEGMENT_POOL
        self._leases: Leases | None = None
        self._strikes = Strikes(asyncio.get_running_loop().time)
        # Attach, farewell, recovery and deletion each find a device that none of the others is changing.
        self._changing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._farewell: asyncio.Task[None] | None = None
        self._stopping = False
        self._is_absent_logged = False

    @property
    def workers(self) -> list[WorkerProcess]:
        """The workers of the current epoch."""
        return self._team.workers if self._team else []

    def status(self) -> DeviceStatus:
        """What `list` shows."""
        info = self._kernel.info if self._kernel else None
        return DeviceStatus(
            name=self.config.name,
            id=info.device_number if info else self.config.id,
            path=str(self._kernel.node) if self._kernel and self.state != "waiting" else None,
            state=self.state,
            size_bytes=self._disk.size_bytes if self._disk else self.config.size_bytes,
            queues=info.queues if info else self.config.queues,
            depth=self.config.depth,
            need_get_data=self.config.need_get_data,
            placement=self.config.placement,
            recovery=self.config.recovery,
            flags=tuple(abi.feature_names(info.flags)) if info else (),
            workers=tuple(
                WorkerStatus(queue=each.queue, pid=each.child.pid, cpu=each.cpu) for each in self.workers
            ),
            backend=self._backend_status(),
            reason=self.reason,
            epoch=self._team.epoch if self._team else FIRST_EPOCH,
        )

    def _backend_status(self) -> BackendStatus:
        if self.session:
            return BackendStatus(kind=self.session.attach.kind, pid=self.session.pid, attached=True)
        kind = self.config.backend.kind if self.config.backend else None
        return BackendStatus(
            kind=kind, pid=self._managed.child.pid if self._managed else None, attached=False
        )

    def describe(self) -> wire.Described:
        """What a backend may know before it attaches."""
        config = self.config
        return wire.Described(
            v=wire.PROTOCOL_VERSION,
            device=config.name,
            size_bytes=self._disk.size_bytes if self._disk else config.size_bytes or 0,
            max_io_bytes=config.max_io_bytes,
            need_get_data=config.need_get_data,
            placement=config.placement,
            read_only=config.read_only,
        )

    async def live(self) -> None:
        """Return when the device is live.  Raises `DaemonError` with the reason if it fails first."""
        while self.state in ("waiting", "recovering", "quiesced") and not self._stopping:
            self._changed.clear()
            await self._changed.wait()
        if self.state != "live":
            raise DaemonError(f"{self.config.name}: {self.reason or 'the device is being deleted'}")

    async def run_backend(self) -> None:
        """Start the backend of the config and wait until the device is live; raises `DaemonError` if it ends first."""
        assert self.config.backend is not None
        self._managed = self._make_managed()
        self._managed.start()
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

    def _make_managed(self) -> BackendProcess:
        assert self.config.backend is not None
        name = f"{self.config.name}/stderr"
        return BackendProcess(
            self.config.name,
            self.config.backend,
            self._around.run_dir,
            lambda fd: self._around.holder.hold(name, fd),
        )

    def _backend_failed(self, process: BackendProcess) -> DaemonError:
        # If the device could not start, its backend ended because of that, not the other way round.
        reason = self.reason or process.obituary()
        error = DaemonError(f"{self.config.name}: {reason}")
        if process.child.exit_status == STATUS_USAGE:
            error.status = STATUS_USAGE
        return error

    async def attach(self, session: Session) -> None:
        """Take a backend.  Raises `AttachRefused` or another error with the reason if it cannot serve this device."""
        self._refuse_second()
        while not await self._admit(session):
            self._refuse_second()

    async def _admit(self, session: Session) -> bool:
        """Take a backend, unless the one before it has not been taken leave of; whether it was taken."""
        if self._farewell is not None:
            await asyncio.shield(self._farewell)
            self._refuse_second()
        async with self._changing:
            # Another may have been taken, and have died, while this one waited for its turn: its farewell comes first,
            # for it takes the link away from whoever has it then.
            if self._farewell is not None:
                return False
            self._refuse_second()
            check_fits(self.config, self._disk, session.attach)
            if session.attach.segment_bytes:
                self._segments += 1
                session.segment = self._segments
            if self._team is None:
                await self._start(session)
            else:
                await self._introduce(self._team, session)
        return True

    def _refuse_second(self) -> None:
        if self._stopping or self.state == "failed":
            raise AttachRefused(f"device {self.config.name}: {self.reason or 'it is being deleted'}")
        if self.session is not None and not self.session.is_gone:
            who = f"{self.session.attach.kind}, process {self.session.pid}"
            raise AttachRefused(f"device {self.config.name} has a backend already ({who})")

    async def _start(self, session: Session) -> None:
        try:
            self._disk = disk_of(self.config, session.attach)
            team = await self._build(self._disk, session.attach)
            await self._introduce(team, session)
        except (DaemonError, PoolError, OSError) as error:
            await self._undo_start(one_line(error))
            raise
        self._spawn(self._go_live(team))

    async def _build(self, disk: Disk, attach: wire.Attach) -> Team:
        """Kernel device, pool and workers; nobody sees the disk yet."""
        asked = parameters(self.config, disk.size_bytes, attach)
        self._kernel = await BlockDevice.create(self._around.runner, self.config, asked)
        self.save()
        self._leases = self._make_pool(self._kernel)
        await self._leases.register(FIRST_EPOCH)
        team = await self._fork_team(FIRST_EPOCH)
        await team.ready()
        return team

    def _make_pool(self, kernel: BlockDevice) -> Leases:
        self.arena = self._make_arena(kernel)
        return Leases(self._around.broker, kernel.number, kernel.info.queues, self.arena.control_fd)

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

    async def _fork_team(self, epoch: int) -> Team:
        self._team = self._make_team(epoch)
        # An epoch that has begun is never begun again, whoever dies now.
        self.save()
        await self._team.fork()
        self.save()
        self._hold_workers(self._team)
        self._spawn(self._watch(self._team))
        return self._team

    def _make_team(self, epoch: int) -> Team:
        kernel, arena, disk, around = self._kernel, self.arena, self._disk, self._around
        assert kernel is not None and arena is not None and disk is not None
        plan = Plan(
            self.config,
            kernel,
            arena,
            disk,
            around.broker.endpoint,
            around.queue_dir,
            around.group,
        )
        return Team(plan, epoch, self._on_news)

    def _hold_workers(self, team: Team) -> None:
        """Not before they are on record: a worker that nobody knows of must see the end of this daemon."""
        for worker in team.workers:
            self._around.holder.hold(worker_name(self.config.name, worker.queue), worker.fileno())

    def _hold_session(self, session: Session) -> None:
        """Not before the backend has its answer: else the next daemon would have to give it."""
        for name, fd in zip(
            session_names(self.config.name), (session.fileno(), session.segment_fd), strict=True
        ):
            if fd is not None:
                self._around.holder.hold(name, fd)

    def _entrust(self, session: Session, team: Team) -> None:
        session.entrust(team.plan.arena.data_fd, lambda: [each.child.pid for each in self.workers])

    def _drop_session(self, session: Session) -> None:
        for name in session_names(self.config.name):
            self._around.holder.drop(name)
        session.close()
        self.session = self._farewell = None

    async def _introduce(self, team: Team, session: Session) -> None:
        """Tell every worker whom to expect, then tell the backend where to go."""
        await team.expect(session, fence=False)
        self.session = session
        self._entrust(session, team)
        self._is_absent_logged = False
        self.save()
        self._farewell = self._spawn(self._until_gone(session))
        session.say(team.attached(session), [team.plan.arena.data_fd])
        self._hold_session(session)
        if self.state == "live":
            session.say(wire.Live(path=str(team.plan.kernel.node)))
        _log.info("%s: backend %s attached (process %d)", self.config.name, session.attach.kind, session.pid)

    async def _go_live(self, team: Team) -> None:
        kernel = team.plan.kernel
        try:
            await kernel.start(START_DEADLINE_S)
            await kernel.wait_for_node()
        except DaemonError as error:
            if not self._stopping and self.state == "waiting":
                async with self._changing:
                    await self._fail(one_line(error))
            return
        if self._stopping or self.state != "waiting":
            return
        if self.config.recovery != "none":
            # Not waited for: it waits for requests, and these may need us.
            self._spawn(kernel.set_io_timeout(IO_TIMEOUT_MS))
        self._now_live(team)
        _log.info("%s: live as %s", self.config.name, kernel.node)

    async def go_on(self, record: Record, held: Mapping[str, int]) -> None:
        """Go on with what an earlier daemon left running; `held` are the descriptors of it, ours from now on.

        Raises `DaemonError`, `PoolError`, `OSError` if that cannot be; `abandon` comes next then.
        """
        async with self._changing:
            heir = await Heir.of(record, held, self._around.runner)
            self._kernel, self._disk, self._segments = heir.kernel, record.disk, record.segments
            self.arena = Arena.open(arena_prefix(self._around.instance, heir.kernel.number))
            number, queues = heir.kernel.number, heir.kernel.info.queues
            self._leases = Leases(self._around.broker, number, queues, self.arena.control_fd, record.epoch)
            await self._leases.refresh()
            self._team = team = self._make_team(record.epoch)
            team.adopt(heir.workers)
            self.session = heir.session()
            await self._settle_backend(team, record)
            self._spawn(self._watch(team))
            self._spawn(heir.kernel.set_io_timeout(IO_TIMEOUT_MS))
            self._strikes.live()
            self._set_state("live")
            self._hold_workers(team)
        self._go_on_with_managed(record, held)
        self.save()
        _log.warning("%s: goes on, epoch %d", self.config.name, team.epoch)

    async def _settle_backend(self, team: Team, record: Record) -> None:
        """Bring workers and backend, who may have been told different things, to the same."""
        tokens = {each.token for each in await team.report()}
        if self.session is not None:
            self._hold_session(self.session)
            self._entrust(self.session, team)
            self._farewell = self._spawn(self._until_gone(self.session))
            if tokens != {self.session.token.hex()}:
                self._spawn(self.session.cut_off())
        elif tokens != {""}:
            await end_left([record], spare=[each for each in record.processes if each.role != "backend"])
            await team.lost()

    def _go_on_with_managed(self, record: Record, held: Mapping[str, int]) -> None:
        if self.config.backend is None:
            return
        self._managed = self._make_managed()
        stderr = held.get(f"{self.config.name}/stderr")
        try:
            if record.managed is None or stderr is None or not is_alive(record.managed):
                raise ProcessLookupError
            self._managed.adopt(record.managed.pid, os.dup(stderr))
        except ProcessLookupError:
            self._managed.start()
        self._keeper = self._spawn(self._managed.keep_running())

    def abandon(self) -> None:
        """After a `go_on` that failed: forget everything, change nothing."""
        for task in self._tasks:
            task.cancel()
        if self._team is not None:
            self._team.let_go()
        if self.session is not None:
            self.session.close()
        if self.arena is not None:
            self.arena.close()

    async def recover_left(self, record: Record) -> bool:
        """Take over what an earlier daemon left of the device; False if there was nothing worth it.

        Its processes have ended (`records.end_left`): what they were doing comes again from the kernel, and must not be
        done twice.  Raises `DaemonError`, `PoolError`, `OSError`.
        """
        if record.device_number is None:
            return self.config.backend is None
        async with self._changing:
            self._kernel = await BlockDevice.find(
                self._around.runner, record.config.name, record.device_number
            )
            self._disk, self._segments = record.disk, record.segments
            wanted = self.config.recovery != "none" and not record.going
            if self._kernel is None or not wanted or not self._kernel.was_started:
                await self._discard_left()
                return False
            self._set_state("recovering")
            team = await self._take_over(self._kernel, record.epoch)
            if team is None:
                return True
            self._now_live(team)
            _log.warning("%s: recovered, epoch %d", self.config.name, team.epoch)
        if self.config.backend is not None:
            self._managed = self._make_managed()
            self._managed.start()
            self._keeper = self._spawn(self._managed.keep_running())
        return True

    async def _take_over(self, kernel: BlockDevice, epoch: int) -> Team | None:
        """The first team of this daemon's; None if the device was given up, as for a recovery that never succeeds."""
        reason = ""
        while not self._strikes.died():
            try:
                if self._leases is None:
                    self._leases = self._make_pool(kernel)
                if self._team is None:
                    return await next_epoch(kernel, epoch + 1, self._fork_team, None, self._leases)
                return await recover(self._team, self._fork_team, None, self._leases)
            except (DaemonError, PoolError, OSError) as error:
                reason = one_line(error)
                _log.error("%s: left by an earlier daemon: %s; trying again", self.config.name, reason)
                await asyncio.sleep(RECOVERY_PAUSE_S)
        await self._fail(f"left by an earlier daemon, and not to be recovered: {reason}")
        return None

    async def _discard_left(self) -> None:
        if self._kernel is not None:
            with _logged(self.config.name):
                await self._kernel.stop(STOP_DEADLINE_S)
                await self._kernel.delete()
        self._kernel = None
        self._around.records.forget(self.config.name)

    def save(self) -> None:
        """Write down what the next daemon must know if this one is killed."""
        if self.state == "failed" or (self._kernel is None and self.config.backend is not None):
            return
        self._around.records.save(
            record_of(
                self.config,
                self._kernel,
                self._disk,
                self._team,
                self.session,
                self._managed,
                state=self.state,
                going=self._stopping,
                broker_pid=self._around.broker.child.pid,
                segments=self._segments,
                build=self._around.build,
            )
        )

    def _now_live(self, team: Team) -> None:
        self._strikes.live()
        self._set_state("live")
        if self.session is not None:
            self.session.say(wire.Live(path=str(team.plan.kernel.node)))

    async def _until_gone(self, session: Session) -> None:
        """After a backend's end: let the workers take back what it held."""
        await session.gone()
        if not self._stopping:
            _log.warning(
                "%s: backend %s is gone; requests wait for the next", self.config.name, session.attach.kind
            )
        async with self._changing:
            if self._team is not None:
                await self._team.lost()
            self._drop_session(session)

    def _on_absent(self) -> None:
        """Every worker says so; once is enough, and a backend may have come meanwhile."""
        if self.session is None and not self._stopping and not self._is_absent_logged:
            self._is_absent_logged = True
            _log.error(
                "%s: no backend for %g s: requests fail until one attaches",
                self.config.name,
                self.config.absent_timeout_s,
            )

    def _on_news(self, worker: WorkerProcess, news: messages.FromWorker) -> None:
        if isinstance(news, messages.Cut):
            _log.error("%s queue %d: backend cut off: %s", self.config.name, worker.queue, news.reason)
            if self.session is not None:
                self._spawn(self.session.cut_off())
        elif isinstance(news, messages.HungUp):
            if self.session is not None:
                self._spawn(self.session.hung_up(HANGUP_PATIENCE_S))
        elif isinstance(news, messages.Silent):
            _log.warning(
                "%s queue %d: a request has waited longer than io_timeout_s = %g",
                self.config.name,
                worker.queue,
                self.config.io_timeout_s,
            )
        elif isinstance(news, messages.Absent):
            self._on_absent()

    async def _watch(self, team: Team) -> None:
        """A worker's end is the whole device's: the driver gives up all of its queues."""
        worker = await team.ended()
        # A worker that the kernel left without tags has not failed; its siblings will follow.
        if not self._stopping and self._team is team and self.state != "failed":
            await self._recover_or_fail(team, worker.obituary())

    async def _recover_or_fail(self, dead: Team, reason: str) -> None:
        async with self._changing:
            if self._stopping or self._team is not dead:
                return
            if self.state == "live" and self.config.recovery != "none":
                await self._recover_while_worth_it(reason)
            else:
                await self._fail(reason)

    async def _recover_while_worth_it(self, reason: str) -> None:
        while not self._strikes.died():
            _log.error("%s: %s; recovering", self.config.name, without_name(self.config.name, reason))
            self._set_state("recovering")
            try:
                await self._recover()
                return
            except (DaemonError, PoolError, OSError) as error:
                reason = one_line(error)
                await asyncio.sleep(RECOVERY_PAUSE_S)
        await self._fail(reason)

    async def renew(self) -> None:
        """Have the code of today serve: other workers, and another backend if we run it.  I/O pauses, nothing fails."""
        async with self._changing:
            team = self._team
            if self._stopping or self.state != "live" or self.config.recovery == "none" or team is None:
                return
            _log.warning("%s: its workers are of another version; replacing them", self.config.name)
            self._set_state("quiesced")
            await retire(team, self.config.name)
            try:
                await self._recover()
            except (DaemonError, PoolError, OSError) as error:
                await self._recover_while_worth_it(one_line(error))
        if self._managed is not None:
            await self._managed.child.end(BACKEND_PATIENCE_S)

    async def settled(self) -> None:
        """Return when nothing changes this device."""
        async with self._changing:
            return

    async def _recover(self) -> None:
        assert self._team is not None and self._leases is not None
        if not self._team.plan.arena.is_whole():
            await self._mend_pool(self._team.plan.arena)
        team = await recover(self._team, self._fork_team, self.session, self._leases)
        self._now_live(team)
        _log.warning("%s: recovered, epoch %d", self.config.name, team.epoch)

    async def _mend_pool(self, arena: Arena) -> None:
        """The worker may have died of a pool that its backend cut short: the next would die of it as well."""
        _log.error("%s: its pool has another size than it was given: its backend goes", self.config.name)
        if self.session is not None:
            await self.session.cut_off()
        arena.mend()

    async def broker_restarted(self) -> None:
        """Bring the new broker up to date about this device."""
        # Without a turn: whoever has it may be waiting for the buffers that the new broker does not know of yet.
        if self._leases is not None:
            with _logged(self.config.name):
                await self._leases.refresh()
            self.save()

    async def _fail(self, reason: str) -> None:
        """The device cannot go on: end it in the kernel, keep it in the list with its reason."""
        reason = without_name(self.config.name, reason)
        _log.error("%s: %s", self.config.name, reason)
        self.reason = reason
        self._set_state("failed")
        # STOP_DEV waits for what a dead worker held, and its siblings keep the device from giving it up.
        if self._team is not None:
            await self._team.kill()
        await self._tear_down(keep=True)

    async def _undo_start(self, reason: str) -> None:
        self._stopping = True
        reason = without_name(self.config.name, reason)
        _log.error("%s: %s", self.config.name, reason)
        self.reason = reason
        await self._tear_down(keep=True)
        self._stopping = False
        self._disk = None
        self._set_state("waiting" if self.config.backend is None else "failed")

    def in_use(self) -> bool:
        """Whether a mount or something else holds the disk."""
        return self._kernel is not None and self.state == "live" and self._kernel.in_use()

    async def delete(self, force: bool, keep: bool = False) -> None:
        """Stop the device and leave nothing of it, but with `keep` what its backend keeps for a successor.

        Raises `DaemonError` if it is in use and not forced.
        """
        if not force and self.in_use():
            raise DaemonError(
                f"{self.config.name}: its disk is in use (mounted?): unmount it, or use --force"
            )
        self._stopping = True
        self._set_state(self.state)
        async with self._changing:
            await self._tear_down(keep)
        # Its backend does this when it is told to go; there may have been none just now.
        if not keep:
            with suppress(OSError):
                Keeper(keeper_path(self._around.run_dir, self.config.name)).drop()
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    async def _tear_down(self, keep: bool) -> None:
        """In the order that cannot wedge the host: stop while workers serve, workers end, backend goes, delete."""
        team, kernel = self._team, self._kernel
        if team is not None and kernel is not None:
            await self._stop_kernel(team, kernel)
            await team.end(WORKER_PATIENCE_S)
        await self._end_backend(keep)
        if kernel is not None:
            with _logged(self.config.name):
                await kernel.delete()
        if self._leases is not None:
            with _logged(self.config.name):
                await self._leases.close()
            self._leases = None
        self._drop_arena()
        self._team = self._kernel = None
        self._around.records.forget(self.config.name)
        self._around.holder.drop(self.config.name)

    async def _stop_kernel(self, team: Team, kernel: BlockDevice) -> None:
        """STOP_DEV, while workers and backend serve what is still to be written; without a backend it all fails."""
        watching = asyncio.ensure_future(self._give_up_without_backend(team))
        with _logged(self.config.name):
            await kernel.stop(STOP_DEADLINE_S)
        watching.cancel()

    async def _give_up_without_backend(self, team: Team) -> None:
        if self.session is not None:
            await self.session.gone()
        team.give_up()
        await team.lost()

    async def _end_backend(self, keep: bool) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        if self.session is not None:
            session = self.session
            await session.detach(self.reason or "the device is being deleted", BACKEND_PATIENCE_S, keep)
            if self._farewell is not None:
                self._farewell.cancel()
            self._drop_session(session)
        if self._managed is not None:
            await self._managed.child.end(BACKEND_PATIENCE_S)

    def _drop_arena(self) -> None:
        if self.arena is not None:
            self.arena.unlink()
            self.arena.close()
            self.arena = None

    def _set_state(self, state: State) -> None:
        self.state = state
        self.save()
        self._changed.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            reason = without_name(self.config.name, one_line(error))
            _log.error("%s: %s", self.config.name, reason, exc_info=error)


class _logged:
    """Logs a failure of a step that must not keep the next from being tried."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> bool:
        if isinstance(error, DaemonError | PoolError):
            _log.error("%s: %s", self._name, without_name(self._name, str(error)))
            return True
        return False
