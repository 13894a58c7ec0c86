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
import socket
from collections.abc import Callable, Mapping

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.sdk.keeper import keeper_path
from ublkpool.daemon.backends.managed_backend import ManagedBackend
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.adoption import Adoption
from ublkpool.daemon.device.attachment import Attachment
from ublkpool.daemon.device.binding import Binding
from ublkpool.daemon.device.clients import ClientContext, Clients
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.disk import alone, check_fits, disk_of
from ublkpool.daemon.device.kept_memory import drop_kept
from ublkpool.daemon.device.lifecycle import Lifecycle
from ublkpool.daemon.device.records import FIRST_EPOCH, Record, end_left
from ublkpool.daemon.device.recovery import RETRY_PAUSE_S, RestartLimit, retire
from ublkpool.daemon.device.resources import DeviceResources
from ublkpool.daemon.device.succession import AdoptedDevice, record_of
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError, one_line, without_name
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.disk_users import check_unused, describe_use, stop_unused
from ublkpool.daemon.processes.background import Background, logged
from ublkpool.daemon.processes.held_names import stderr_name
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import BackendStatus, ClientStats, DeviceStatus, State, WorkerStatus
from ublkpool.ublk import abi

START_DEADLINE_S = 600.0
IO_TIMEOUT_MS = 1000
_log = logging.getLogger("ublkpool.device")


class Device:
    """A device of the daemon's."""

    def __init__(self, config: DeviceConfig, context: DaemonContext) -> None:
        self.config = config
        self._context = context
        self._background = Background(config.name)
        self._life = Lifecycle(config.name, lambda: self.save())
        self._attachment = Attachment(
            config, self._life, context.holder, self._background, lambda: self._resources.team
        )
        self._resources = DeviceResources(
            config, context, self._life.save, self._watch, self._attachment.hear
        )
        self._managed = (
            ManagedBackend(
                config.name,
                config.backend,
                context.run_dir,
                context.holder,
                context.live_mounts,
                self._background,
            )
            if config.backend
            else None
        )
        self._clients = Clients(config.name, context.holder, self._background)
        self._binding = Binding(config.name, context.states, context.boot_id)
        self._restart_limit = RestartLimit(asyncio.get_running_loop().time)
        self._is_open = False
        """Whether the disk has been opened once, after its partition scan."""
        self._left: Record | None = None
        """What an earlier daemon left of it, until it is taken over or removed."""

    def on_change(self, call: Callable[[], None]) -> None:
        """Have this called after every change of the state."""
        self._life.on_change = call

    @property
    def state(self) -> State:
        return self._life.state

    @property
    def shown(self) -> State:
        """The state that users are told, see `Lifecycle.shown`."""
        return self._life.shown

    @property
    def reason(self) -> str:
        """Why it failed."""
        return self._life.reason

    @property
    def trouble(self) -> str:
        """Why requests are not served; empty if they are."""
        life, state = self._life, self.state
        if state == "failed":
            return life.reason
        parts = [life.trouble if state in ("recovering", "quiesced") else ""]
        if self.session is None and self.config.answers == "backend":
            parts.append(self._why_no_backend())
        parts.append(self._attachment.due_greetings())
        return "; ".join(filter(None, parts))

    def _why_no_backend(self) -> str:
        known = (self._managed.trouble if self._managed else "") or self._attachment.refusal
        if self.state == "waiting":
            return known or self.reason
        then = "fail" if self._attachment.is_absent_too_long else "wait"
        return f"no backend is attached, requests {then}" + (f": {known}" if known else "")

    def note_refusal(self, reason: str) -> None:
        """A backend that came was not taken."""
        self._attachment.note_refusal(reason)

    @property
    def session(self) -> Session | None:
        """The attached backend."""
        return self._attachment.session

    @property
    def arena(self) -> Arena | None:
        """The pool."""
        return self._resources.arena

    def status(self) -> DeviceStatus:
        """What `list` shows."""
        kernel, disk, team = self._resources.kernel, self._resources.disk, self._resources.team
        info = kernel.info if kernel else None
        return DeviceStatus(
            name=self.config.name,
            id=info.device_number if info else self.config.id,
            path=str(kernel.node) if kernel and self.state != "waiting" else None,
            state=self._life.shown,
            size_bytes=disk.size_bytes if disk else self.config.size_bytes,
            queues=info.queues if info else self.config.queues,
            depth=self.config.depth,
            need_get_data=self.config.need_get_data,
            placement=self.config.placement,
            answers=self.config.answers,
            recovery=self.config.recovery,
            flags=tuple(abi.feature_names(info.flags)) if info else (),
            workers=tuple(
                WorkerStatus(queue=each.queue, pid=each.child.pid, cpu=each.cpu)
                for each in (team.workers if team else ())
            ),
            backend=self._backend_status(),
            reason=self.trouble,
            epoch=team.epoch if team else FIRST_EPOCH,
        )

    def _backend_status(self) -> BackendStatus:
        if self.session:
            return BackendStatus(kind=self.session.attach.kind, pid=self.session.pid, attached=True)
        kind = self.config.backend.kind if self.config.backend else None
        return BackendStatus(kind=kind, pid=self._managed.pid if self._managed else None, attached=False)

    @property
    def name(self) -> str:
        """The config's name of it."""
        return self.config.name

    @property
    def lacks_backend(self) -> bool:
        """Whether requests wait for a backend to attach."""
        return self.config.answers == "backend" and (self.session is None or self.session.is_gone)

    def give_up(self) -> None:
        """Fail what waits for a backend, and what comes, until one attaches."""
        if self._resources.team is not None:
            self._resources.team.give_up()

    def describe(self) -> wire.Described:
        """What a backend may know before it attaches."""
        config, disk, kernel = self.config, self._resources.disk, self._resources.kernel
        return wire.Described(
            v=wire.PROTOCOL_VERSION,
            device=config.name,
            size_bytes=disk.size_bytes if disk else config.size_bytes or 0,
            max_io_bytes=config.max_io_bytes,
            need_get_data=config.need_get_data,
            placement=config.placement,
            read_only=config.read_only,
            path=str(kernel.node) if kernel else "",
            may_create=self._may_create(),
        )

    def _may_create(self) -> bool:
        """Whether an empty store may be made; not for a disk that an earlier daemon served from an unknown one."""
        has_disk = self.state not in ("waiting", "failed")
        return self._binding.may_create() and not (has_disk and self._binding.store is None)

    async def check_unused(self) -> None:
        """Return if nothing shows a user of the disk.  Raises `DaemonError` that names the users."""
        kernel = self._resources.kernel
        if kernel is None or self.state == "failed":
            return
        await check_unused(self.config.name, kernel, may_open=self.state != "waiting")
        # Asked last: a client that ended meanwhile has given its memory back by now.
        if clients := self._clients.names():
            raise DaemonError(
                f"{self.config.name}: its client buffers are in use: {', '.join(clients)}: "
                f"end these clients, or use --force"
            )

    async def describe_use(self) -> str:
        """The users of the disk in words, empty if none is seen."""
        kernel = self._resources.kernel
        return await describe_use(kernel) if kernel is not None and self.state == "live" else ""

    async def live(self) -> None:
        """Return when the device is live.  Raises `DaemonError` with the reason if it fails first."""
        await self._life.live()

    async def settled(self) -> None:
        """Return when nothing changes this device."""
        await self._life.settled()

    def save(self) -> None:
        """Write down what the next daemon must know if this one is killed."""
        resources = self._resources
        is_there = resources.kernel is not None or resources.mark != 0
        if not is_there and (self.state == "failed" or not self.config.waits_for_backend):
            return
        self._context.records.save(
            record_of(
                self.config,
                resources.kernel,
                resources.disk,
                resources.team,
                self.session,
                self._managed.pid if self._managed else None,
                mark=resources.mark,
                state=self.state,
                going=self._life.is_stopping,
                broker_pid=self._context.broker.child.pid,
                segments=self._attachment.segments,
                clients=resources.area.record() if resources.area else None,
                build=self._context.build,
            )
        )

    async def run(self) -> None:
        """Start what needs nobody else, the backend of the config or workers that answer; wait until it is live.

        Raises `DaemonError`, `OSError` if it ends first.
        """
        if self._managed is not None:
            await self._managed.run(self._life.live, lambda: self.reason)
        else:
            await self._run_alone()

    async def _run_alone(self) -> None:
        try:
            async with self._life.turn:
                attach = alone(self.config.name)
                await self._bind(attach)
                await self._start(attach, None)
        except PoolError as error:
            raise DaemonError(f"{self.config.name}: {error}") from error
        await self._life.live()

    async def attach(self, session: Session) -> None:
        """Take a backend.  Raises `AttachRefused` or another error with the reason if it cannot serve this device."""
        await self._attachment.admit(session, self._take)

    async def _take(self, session: Session) -> None:
        check_fits(self.config, self._resources.disk, session.attach)
        session.generation = await self._bind(session.attach)
        self._attachment.number_segment(session)
        if self._resources.team is None:
            await self._start(session.attach, session)
        else:
            await self._introduce(self._resources.team, session)
        if self._managed is not None:
            self._managed.serves()
        if self.state == "live":
            self._binding.served()

    async def _bind(self, attach: wire.Attach) -> int:
        """Take a store for this device, before anybody hears of it; the attach's generation.

        Raises `AttachRefused` if it is another than before, `DaemonError` if that cannot be put on record.
        """
        disk = self._resources.disk or disk_of(self.config, attach)
        return await self._binding.bind(attach, disk.size_bytes)

    async def rebind(self) -> None:
        """Have the next store that attaches become this device's.  Raises `DaemonError`."""
        async with self._life.turn:
            await self._binding.rebind()

    async def _introduce(self, team: Team, session: Session) -> None:
        await self._resources.pool.prepare(team, session.uid)
        await self._attachment.introduce(team, session)

    async def _start(self, attach: wire.Attach, session: Session | None) -> None:
        """Without a session the workers answer themselves."""
        self._is_open = False
        try:
            team = await self._resources.build(attach)
            if session is not None:
                await self._introduce(team, session)
        except BaseException as error:
            # Also one that is given up: by a del, at the daemon's end, or since its client has gone.
            await self._undo_start(one_line(error) if isinstance(error, Exception) else "given up")
            raise
        self._background.spawn(self._go_live(team))

    async def _go_live(self, team: Team) -> None:
        kernel = team.plan.kernel
        try:
            # A disk that no backend serves would hold up every process that looks at it, such as udev.
            if self.config.answers == "backend":
                await team.linked()
            await kernel.start(START_DEADLINE_S, team.check_whole)
            await kernel.wait_for_node()
        except DaemonError as error:
            await self._end_start(one_line(error))
        else:
            await self._end_start("")

    async def _end_start(self, trouble: str) -> None:
        """The disk could be opened, or this was the trouble; in between its workers may have been recovered."""
        async with self._life.turn:
            team = self._resources.team
            if self._life.is_stopping or self.state != "waiting" or team is None:
                return
            if trouble:
                await self._fail(trouble)
                return
            kernel = team.plan.kernel
            # Not waited for: the write waits for the disk's requests, and these may need the supervisor.
            self._background.spawn(kernel.set_io_timeout(IO_TIMEOUT_MS))
            self._now_live(team)
            if (client_context := self._client_context()) is not None:
                self._clients.begin(client_context)
            _log.info("%s: live as %s", self.config.name, kernel.node)

    def client_stats(self) -> ClientStats:
        """Where the slices of the client area are."""
        area, (lent, resting, free) = self._resources.area, self._clients.counts()
        size_bytes = area.slice_bytes if area else 0
        return ClientStats(slice_bytes=size_bytes, lent_count=lent, resting_count=resting, free_count=free)

    def _client_context(self) -> ClientContext | None:
        resources = self._resources
        if resources.area is None or resources.kernel is None:
            return None
        return ClientContext(resources.area, resources.kernel)

    def lend_buffer(self, sock: socket.socket) -> tuple[wire.BufferLeased, int | None]:
        """The answer to a client of the disk, and a slice of the client area, which is its own while it is connected.

        Raises `DaemonError` if there is no disk.
        """
        kernel, area = self._resources.kernel, self._resources.area
        if kernel is None or self.state in ("waiting", "failed") or self._life.is_stopping:
            raise DaemonError(f"{self.config.name} is {self.state}: it has no disk to use buffers with")
        number = self._clients.lend(sock)
        if area is None or number is None:
            return wire.BufferLeased(path=str(kernel.node), size_bytes=0), None
        # Whose it is must be known to the next daemon before it is anybody's.
        self.save()
        return wire.BufferLeased(path=str(kernel.node), size_bytes=area.slice_bytes), area.files[number]

    def _now_live(self, team: Team) -> None:
        self._is_open = True
        self._restart_limit.live()
        self._life.reason = self._life.trouble = ""
        self._binding.served()
        self._life.enter("live")
        self._attachment.await_greetings(team)
        self._attachment.say_live(team)

    async def _undo_start(self, reason: str) -> None:
        self._life.is_stopping = True
        reason = without_name(self.config.name, reason)
        _log.error("%s: %s", self.config.name, reason)
        self._life.reason = reason
        is_gone = await self._tear_down_logged()
        with logged(self.config.name):
            await self._binding.undo()
        self._life.is_stopping = False
        self._resources.disk = None
        self._life.enter("waiting" if self.config.waits_for_backend and is_gone else "failed")

    def await_takeover(self, record: Record) -> None:
        """Say in the list that an earlier daemon left it; `go_on` or `recover_left` comes next, or `delete`."""
        self._left = record
        if record.device_number is not None:
            self._life.state = "recovering"

    def note_failure(self, reason: str) -> None:
        """It cannot be made or taken over, or not be removed: it stays in the list with the reason."""
        self._life.reason = without_name(self.config.name, reason)
        self._life.enter("failed")

    async def go_on(self, record: Record, held: Mapping[str, int]) -> None:
        """Go on with what an earlier daemon left running; `held` are the descriptors of it, ours from now on.

        Raises `DaemonError`, `PoolError`, `OSError` if that cannot be; `abandon` comes next then.
        """
        self._attachment.await_first()
        async with self._life.turn:
            adopted = await AdoptedDevice.of(record, held, self._context.runner)
            team = await Adoption(record, self._resources, self._attachment).go_on(adopted)
            self._watch(team)
            self._background.spawn(adopted.kernel.set_io_timeout(IO_TIMEOUT_MS))
            self._is_open = True
            self._restart_limit.live()
            self._life.enter("live")
            self._resources.hold_workers(team)
            await self._learn(record)
            if (client_context := self._client_context()) is not None:
                self._clients.resume(client_context, held)
        if self._managed is not None:
            self._managed.go_on(record.managed, held.get(stderr_name(self.config.name)))
        self._left = None
        self.save()
        _log.info("%s: goes on, epoch %d", self.config.name, team.epoch)

    async def _learn(self, record: Record) -> None:
        """What an earlier daemon served the device from, if that is not on record."""
        served, backend = record.served, self.config.backend
        size_bytes = record.disk.size_bytes if record.disk else 0
        await self._binding.learn(
            served.attach if served else None,
            size_bytes,
            backend.kind if backend else "",
            served.generation if served else 0,
        )

    def abandon(self) -> None:
        """After a `go_on` that failed: forget everything, change nothing."""
        self._life.give_up()
        self._background.cancel()
        self._clients.close()
        self._resources.abandon()
        self._attachment.abandon()

    async def recover_left(self, record: Record, held: Mapping[str, int]) -> bool:
        """Take over what an earlier daemon left of the device; False if there was nothing worth it.

        Its processes have ended (`records.end_left`): what they were doing comes again from the kernel, and must not be
        done twice.  Raises `DaemonError`, `PoolError`, `OSError`.
        """
        if record.device_number is None:
            # The daemon ended while it added the device, before any client had seen it.
            self._resources.mark = record.device_mark
            await self._resources.remove_kernel()
            self._left = None
            if not self.config.waits_for_backend:
                self._context.records.forget(self.config.name)
            return self.config.waits_for_backend
        left = Adoption(record, self._resources, self._attachment)
        async with self._life.turn:
            if not await left.find(self._context.runner, held):
                self._context.records.forget(self.config.name)
                return False
            self._left = None
            self._attachment.await_first()
            self._life.enter("recovering")
            await self._learn(record)
            try:
                team = await left.recover(self._restart_limit)
            except DaemonError as error:
                await self._fail(str(error))
                return True
            self._now_live(team)
            if (client_context := self._client_context()) is not None:
                self._clients.resume(client_context, held)
            _log.info("%s: recovered, epoch %d", self.config.name, team.epoch)
        if self._managed is not None:
            self._managed.start()
        return True

    def _watch(self, team: Team) -> None:
        self._background.spawn(self._until_ended(team))

    async def _until_ended(self, team: Team) -> None:
        """A worker's end is the whole device's: the driver gives up all of its queues."""
        worker = await team.ended()
        # A worker that the kernel left without tags has not failed; its siblings will follow.
        if not self._life.is_stopping and self._resources.team is team and self.state != "failed":
            await self._recover_or_fail(team, worker.obituary())

    async def _recover_or_fail(self, dead: Team, reason: str) -> None:
        async with self._life.turn:
            if self._life.is_stopping or self._resources.team is not dead:
                return
            has_disk = self.state == "live" or dead.plan.kernel.is_started
            if has_disk and self.state != "failed" and self.config.recovery != "none":
                await self._recover_while_worth_it(reason)
            else:
                await self._fail(reason)

    async def _recover_while_worth_it(self, reason: str) -> None:
        while not self._restart_limit.died():
            _log.error("%s: %s; recovering", self.config.name, without_name(self.config.name, reason))
            self._life.trouble = without_name(self.config.name, reason)
            self._life.enter("recovering")
            try:
                await self._recover()
                return
            except (DaemonError, PoolError, OSError) as error:
                reason = one_line(error)
                await asyncio.sleep(RETRY_PAUSE_S)
        await self._fail(reason)

    async def _recover(self) -> None:
        team = await self._resources.recover(self.session)
        if self._is_open:
            self._now_live(team)
        else:
            # The partition scan goes on with these workers, and the device's start with it.
            self._life.enter("waiting")
        _log.info("%s: recovered, epoch %d", self.config.name, team.epoch)

    async def renew(self) -> None:
        """Have the code of today serve: other workers, and another backend if we run it.  I/O pauses, nothing fails."""
        async with self._life.turn:
            team = self._resources.team
            if (
                self._life.is_stopping
                or self.state != "live"
                or self.config.recovery == "none"
                or team is None
            ):
                return
            _log.info("%s: its workers are of another version; replacing them", self.config.name)
            self._life.enter("quiesced")
            await retire(team, self.config.name)
            try:
                await self._recover()
            except (DaemonError, PoolError, OSError) as error:
                await self._recover_while_worth_it(one_line(error))
        if self._managed is not None:
            await self._managed.end()

    async def broker_restarted(self) -> None:
        """Bring the new broker up to date about this device."""
        await self._resources.refresh_leases()

    async def _fail(self, reason: str) -> None:
        """The device cannot go on: end it in the kernel, keep it in the list with its reason."""
        reason = without_name(self.config.name, reason)
        _log.error("%s: %s", self.config.name, reason)
        self._life.reason = reason
        self._life.enter("failed")
        # STOP_DEV waits for what a dead worker held, and its siblings keep the device from giving it up.
        if self._resources.team is not None:
            await self._resources.team.kill()
            # Without workers the backend serves nothing, and STOP_DEV may wait for the block layer's timer.
            await self._end_backend(keep=True)
        await self._tear_down_logged()

    async def delete(self, force: bool, keep: bool = False, forget: bool = False) -> None:
        """Stop the device and leave nothing of it, but with `keep` what its backend keeps for a successor.

        With `forget` the name may have another store from now on.  Raises `DaemonError` if it is in use and not forced;
        then it goes on.
        """
        if force:
            self._begin_to_end()
        else:
            await self.check_unused()
        state, waits = self.state, self._life.turn.locked()
        async with self._life.turn:
            if not force:
                await self._stop_unused(look_again=waits or state != self.state)
            self._begin_to_end()
            try:
                await self._tear_down(keep)
                await self._end_binding(keep, forget)
            except (DaemonError, OSError) as error:
                self.note_failure(one_line(error))
                raise
        self._background.cancel()
        # Its backend does this when it is told to go; there may have been none just now.
        if not keep:
            await drop_kept(keeper_path(self._context.run_dir, self.config.name))

    def _begin_to_end(self) -> None:
        self._life.is_stopping = True
        self._life.enter(self.state)

    async def _stop_unused(self, look_again: bool) -> None:
        """The caller has the turn.  Raises `DaemonError` that names the users; then nothing has changed."""
        resources = self._resources
        if look_again:
            await self.check_unused()
        if self.state == "live" and resources.kernel is not None and resources.kernel.can_try_stop:
            await stop_unused(
                self.config.name, resources.kernel, lambda: resources.try_stop(self._attachment.gone)
            )

    async def _end_binding(self, keep: bool, forget: bool) -> None:
        await self._binding.undo()
        if forget:
            await self._binding.forget()
        elif not keep:
            await self._binding.end()

    async def _tear_down_logged(self) -> bool:
        """Tear down for a successor; whether the kernel has rid itself of the device, else the reason says why not."""
        try:
            await self._tear_down(keep=True)
        except (DaemonError, OSError) as error:
            left = without_name(self.config.name, one_line(error))
            _log.error("%s: %s", self.config.name, left)
            self._life.reason += f"; its device is still there, `del` tries again: {left}"
            return False
        return True

    async def _tear_down(self, keep: bool) -> None:
        """In the order that cannot wedge the host: stop while workers serve, workers end, backend goes, delete.

        Raises `DaemonError` if the kernel's device stays: then it stays on record, too, and it can be tried again.
        """
        name = self.config.name
        self._clients.close()
        if self._left is not None:
            await self._end_left(self._left)
        with logged(name):
            await self._resources.stop(self._attachment.gone)
        await self._end_backend(keep)
        await self._resources.remove()
        self._context.records.forget(name)
        self._context.holder.drop(name)

    async def _end_backend(self, keep: bool) -> None:
        """The attached backend leaves, and the one that the daemon runs is not started again."""
        if self._managed is not None:
            self._managed.let_end()
        with logged(self.config.name):
            await self._attachment.end(keep)
        if self._managed is not None:
            await self._managed.end()

    async def _end_left(self, left: Record) -> None:
        """End what an earlier daemon left and this one has not taken over: processes, then the kernel device."""
        await end_left([left], [each for each in left.processes if each.role == "broker"])
        if self._resources.kernel is None and left.device_number is not None:
            name, number = self.config.name, left.device_number
            found = await BlockDevice.find(self._context.runner, name, number, left.device_mark)
            self._resources.kernel = found
        elif self._resources.kernel is None:
            self._resources.mark = left.device_mark
        if self._resources.team is None:
            await self._resources.discard()
        self._left = None
