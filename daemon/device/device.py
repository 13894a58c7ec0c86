"""One device's life in order: start, attach, live, recovery, renewal, failure, deletion; and its takeover.

Owns the decision what comes next.  Its parts (`parts.py`) and the steps made of them (`build.py`, `introduction.py`,
`recovery.py`, `teardown.py`, `adoption.py`) are called from here and call nothing here.  Runs on the supervisor's
asyncio loop, never in the data path.

    waiting --attach--> (starting) --START_DEV--> live --del--> gone
                             |                    |  ^
                             |     a worker died  v  | fenced, and fetched again
                             |                 recovering
                             +------> failed <----+   the kernel refused, or its workers keep dying
"""

import asyncio
import logging
from collections.abc import Mapping

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.sdk.keeper import keeper_path
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device import adoption, client_buffers, drain, teardown
from ublkpool.daemon.device.build import Take, build, nothing_prepared
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.disk import alone, check_fits, disk_of
from ublkpool.daemon.device.introduction import introduce, watch_backend
from ublkpool.daemon.device.kept_memory import drop_kept
from ublkpool.daemon.device.naming import name_when_served
from ublkpool.daemon.device.opening import open_store
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.device.recovery import RETRY_PAUSE_S, RecoveryAccount, RestartLimit, next_epoch, retire
from ublkpool.daemon.device.resize import repair_soon
from ublkpool.daemon.device.service import DeviceService
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError, is_shortage, one_line, without_name
from ublkpool.daemon.events.kinds import (
    DeviceAdopted,
    DeviceFailed,
    DeviceLive,
    DeviceNotStarted,
    WorkerDied,
    WorkersReplaced,
)
from ublkpool.daemon.processes.background import logged
from ublkpool.daemon.processes.backoff import Backoff
from ublkpool.daemon.processes.held_names import stderr_name
from ublkpool.daemon.settings.config import DeviceConfig

START_DEADLINE_S = 600.0
IO_TIMEOUT_MS = 1000
SHORTAGE_PAUSE_MAX_S = 5.0
_LEFT_AND_LOST = "left by an earlier daemon, and not to be recovered: "
_log = logging.getLogger("ublkpool.device")


class Device(DeviceService):
    """A device of the daemon's."""

    def __init__(self, config: DeviceConfig, context: DaemonContext, take: Take = nothing_prepared) -> None:
        """`take`: where a prepared device is found."""
        super().__init__(DeviceParts(config, context))
        self._take_prepared = take
        self._restart_limit = RestartLimit(asyncio.get_running_loop().time)
        self._is_open = False
        """Whether the disk has been opened once, after its partition scan."""

    # Start

    async def run(self) -> None:
        """Start the config's backend, or workers that answer themselves; return when the device is live.

        Raises `DaemonError`, `OSError` if it ends first.
        """
        if self.parts.managed is not None:
            await self.parts.managed.run(self.live, lambda: self.reason)
            return
        try:
            async with self.parts.life.turn:
                attach = await self._attach_of_workers()
                with self.parts.resources.counting(attach):
                    await self._bind(attach)
                    await self._start(attach, None)
        except PoolError as error:
            raise DaemonError(f"{self.config.name}: {error}") from error
        await self.live()

    async def _attach_of_workers(self) -> wire.Attach:
        """What a backend in the workers' place would attach with.  Raises `DaemonError`, `AttachRefused`."""
        inside = self.parts.inside
        return alone(self.config.name) if inside is None else await open_store(self.parts, inside)

    async def _bind(self, attach: wire.Attach) -> int:
        """Take a store for this device, on record before the backend hears of it; the attach's generation.

        Raises `AttachRefused` if it is another than before, `DaemonError` if that cannot be put on record.
        """
        resized_bytes = self.parts.binding.resized_for(attach)
        disk = self.parts.resources.disk or disk_of(self.config, attach, resized_bytes)
        return await self.parts.binding.bind(attach, disk.size_bytes, disk.resized_bytes)

    async def _start(self, attach: wire.Attach, session: Session | None) -> None:
        """Build the device and introduce its backend; without a session the workers answer requests themselves."""
        self._is_open = False
        try:
            team = await build(self.parts, attach, self._take_prepared)
            if session is not None:
                await introduce(self.parts, team, session, self._fail)
        except BaseException as error:
            # Cancellation too: by a deletion, by the daemon's end, or because the client has gone.
            await self._undo_start(one_line(error) if isinstance(error, Exception) else "given up")
            raise
        self._watch(team)
        self.parts.background.spawn(self._go_live(team))

    async def _undo_start(self, reason: str) -> None:
        parts = self.parts
        parts.life.is_stopping = True
        parts.life.reason = reason = without_name(self.config.name, reason)
        parts.events.tell(_log, DeviceNotStarted(reason=reason), reason)
        is_gone = await teardown.tear_down_failed(parts)
        with logged(self.config.name):
            await parts.binding.undo()
        parts.life.is_stopping = False
        parts.resources.disk = None
        parts.enter("waiting" if self.config.waits_for_backend and is_gone else "failed")

    # Attach

    async def attach(self, session: Session) -> None:
        """Take a backend, after the farewell of the one before it.

        Raises `AttachRefused` or another error with the reason if it cannot serve this device.
        """
        backend, turn = self.parts.backend, self.parts.life.turn
        await backend.check_user(session.uid, self.parts.context.runner)
        while True:
            backend.check_free()
            if backend.farewell is not None:
                await asyncio.shield(backend.farewell)
                continue
            async with turn:
                # Another backend may have attached and died while this one waited for the turn: its farewell comes
                # first, for the workers' LOST would cut whichever link they have then.
                if backend.farewell is None:
                    backend.check_free()
                    await self._take(session)
                    return

    async def _take(self, session: Session) -> None:
        parts, resources = self.parts, self.parts.resources
        check_fits(self.config, resources.disk, session.attach, parts.binding.resized_for(session.attach))
        with resources.counting(session.attach):
            session.generation = await self._bind(session.attach)
            parts.backend.number_segment(session)
            if resources.team is None:
                await self._start(session.attach, session)
            else:
                await self._introduce_next(resources.team, session)
        if parts.managed is not None:
            parts.managed.serves()
        if self.state == "live":
            parts.binding.served()

    async def _introduce_next(self, team: Team, session: Session) -> None:
        try:
            await introduce(self.parts, team, session, self._fail)
        except BaseException:
            # The backend was handed nothing, so its store has served nothing.
            await self.parts.binding.backend_ended()
            raise

    async def rebind(self) -> None:
        """Make the next store that attaches this device's.  Raises `DaemonError`."""
        async with self.parts.life.turn:
            await self.parts.binding.rebind()

    # Live

    async def _go_live(self, team: Team) -> None:
        """START_DEV, beside everything else: its partition scan reads through the workers."""
        try:
            # A disk that no backend serves would block every process that looks at it, such as udev.
            if self.config.answers == "backend":
                await team.linked()
            self.parts.binding.starting()
            await team.plan.kernel.start(START_DEADLINE_S, team.whole_check())
            # Before the wait for udev, which then covers the links: when `ublkpool add` returns they are there.
            await team.plan.kernel.publish_name()
            await team.plan.kernel.wait_for_node()
        except DaemonError as error:
            await self._end_start(one_line(error))
        else:
            await self._end_start("")

    async def _end_start(self, trouble: str) -> None:
        """The disk could be opened, unless there was trouble; its workers may have been recovered meanwhile."""
        parts = self.parts
        async with parts.life.turn:
            team = parts.resources.team
            if parts.life.is_stopping or self.state != "waiting" or team is None:
                return
            if trouble:
                await self._fail(trouble)
                return
            self._set_io_timeout(team)
            self._now_live(team)
            client_buffers.begin(parts)
            node = str(team.plan.kernel.node)
            live = DeviceLive(path=node, size_bytes=team.plan.disk.size_bytes)
            parts.events.tell(_log, live, f"live as {node}")

    def _set_io_timeout(self, team: Team) -> None:
        if team.plan.kernel.is_a_users:
            # The setting is root's; the driver ends the disk after the block layer's 30 s.
            return
        # Not awaited: the write to sysfs waits for the disk's requests, and these may need the supervisor.
        self.parts.background.spawn(team.plan.kernel.set_io_timeout(IO_TIMEOUT_MS))

    def _now_live(self, team: Team) -> None:
        parts = self.parts
        self._is_open = True
        self._restart_limit.live()
        parts.life.reason = parts.life.trouble = ""
        parts.binding.served()
        parts.enter("live")
        parts.backend.await_greetings(team)
        parts.backend.say_live(team)

    def _watch(self, team: Team) -> None:
        self.parts.background.spawn(self._until_worker_dies(team))

    async def _until_worker_dies(self, team: Team) -> None:
        # A worker that the kernel left without tags has not failed; its siblings will follow.
        worker = await team.ended()
        reason = worker.obituary()
        died = WorkerDied(queue=worker.queue, pid=worker.child.pid, reason=reason)
        await self._recover_or_fail(team, reason, died, may_recover=not worker.is_excluded)

    # Recovery

    async def _recover_or_fail(
        self, dead: Team, reason: str, died: WorkerDied | None = None, may_recover: bool = True
    ) -> None:
        """One worker's end is the whole team's: the driver gives up all of the device's queues."""
        parts = self.parts
        async with parts.life.turn:
            if parts.life.is_stopping or parts.resources.team is not dead or self.state == "failed":
                return
            if died is not None:
                # The line in the log is that of the recovery or of the failure.
                parts.events.record(died, reason)
            has_disk = self.state == "live" or dead.plan.kernel.is_started
            if has_disk and may_recover and self.config.recovery != "none":
                await self._recover(reason)
            else:
                await self._fail(reason)

    async def _recover(self, reason: str, given_up: str = "") -> None:
        """Try until the next epoch serves, or fail with the last reason, after `given_up`; the caller has the turn.

        `reason` is empty if an earlier daemon left the device.
        """
        reason = without_name(self.config.name, reason)
        account = None
        while not self._restart_limit.died():
            if account is None:
                account = RecoveryAccount(self.parts)
                account.begin(reason)
            elif reason:
                _log.error("%s: %s; recovering", self.config.name, reason)
            if reason:
                self.parts.life.trouble = reason
            self.parts.enter("recovering")
            if not (reason := await self._try_next_epoch()):
                account.end(served=True)
                return
            await asyncio.sleep(RETRY_PAUSE_S)
        if account is not None:
            account.end(served=False, why=reason)
        await self._fail(given_up + reason)

    async def _try_next_epoch(self) -> str:
        """Have the next epoch serve; why it does not, or nothing.

        A lack of descriptors, processes or memory is waited out: the disk's requests wait, and nothing is lost.
        """
        delays = Backoff(asyncio.get_running_loop().time, RETRY_PAUSE_S, SHORTAGE_PAUSE_MAX_S)
        reason = ""
        while True:
            try:
                team = await next_epoch(self.parts)
                break
            except (DaemonError, PoolError, OSError) as error:
                before, reason = reason, without_name(self.config.name, one_line(error))
                if self.parts.life.is_stopping or not is_shortage(error):
                    return reason
            if reason != before:
                _log.error("%s: %s; trying again until it can be recovered", self.config.name, reason)
                self.parts.life.trouble = reason
            await asyncio.sleep(delays.ended())
        self._watch(team)
        repair_soon(self.parts)
        if self._is_open:
            self._now_live(team)
        else:
            # The partition scan, and with it the device's start, goes on with these workers.
            self.parts.enter("waiting")
        return ""

    # Renewal

    async def renew(self) -> None:
        """Replace workers, and the daemon's own backend, by ones of today's code.  I/O pauses, no request fails."""
        parts = self.parts
        async with parts.life.turn:
            team = parts.resources.team
            is_live = self.state == "live" and not parts.life.is_stopping
            if not is_live or self.config.recovery == "none" or team is None:
                return
            if parts.drain and self.config.recovery != "reissue":
                # The waiting requests do not end, and the driver fails those that a worker has when it is killed.
                _log.info(
                    "%s: its workers are of another version or user and stay until `resume`", self.config.name
                )
                parts.background.spawn(self._renew_after_drain())
                return
            _log.info("%s: its workers are of another version or user; replacing them", self.config.name)
            parts.enter("quiesced")
            clock = asyncio.get_running_loop().time
            begun_s = clock()
            await retire(team, self.config.name)
            if reason := await self._try_next_epoch():
                await self._recover(reason)
            else:
                epoch, seconds = parts.resources.epoch, round(clock() - begun_s, 3)
                replaced = WorkersReplaced(epoch=epoch, seconds=seconds)
                parts.events.tell(_log, replaced, f"recovered, epoch {epoch}, after {seconds:g} s")
        session = parts.backend.session
        if parts.managed is not None and (session is None or session.attach.survives_death):
            if session is not None and session.pid == parts.managed.pid:
                session.is_replaced = True
            await parts.managed.replace()

    async def _renew_after_drain(self) -> None:
        """The same once a backend serves the device again, so that the workers' requests end."""
        parts, life = self.parts, self.parts.life
        await life.until(lambda: not parts.drain and parts.backend.session is not None and life.is_served)
        await self.renew()

    # Failure

    async def _fail(self, reason: str) -> None:
        """The device cannot go on: end it in the kernel, keep it in the list with its reason."""
        parts = self.parts
        parts.life.reason = reason = without_name(self.config.name, reason)
        parts.events.tell(_log, DeviceFailed(reason=reason), reason)
        parts.enter("failed")
        # STOP_DEV waits for a dead worker's requests, which the driver gives up only without its siblings.
        if parts.resources.team is not None:
            await parts.resources.team.kill()
            # Without workers the backend serves nothing, and STOP_DEV may wait for the block layer's timer.
            await teardown.end_backend(parts, keep=True)
        await teardown.tear_down_failed(parts)

    def note_failure(self, reason: str) -> None:
        """The device cannot be made, taken over or removed: it stays in the list with the reason."""
        self.parts.life.reason = reason = without_name(self.config.name, reason)
        self.parts.events.record(DeviceFailed(reason=reason), reason)
        self.parts.enter("failed")

    # Deletion

    async def delete(self, force: bool, keep: bool = False, forget: bool = False) -> None:
        """Stop the device and leave nothing of it, but with `keep` what its backend keeps for a successor.

        With `forget` the name may have another store from now on.  Raises `DaemonError` if it is in use and not forced;
        then it goes on.
        """
        if force or not await self._end_idle(keep, forget):
            await self._end_checked(force, keep, forget)
        parts = self.parts
        parts.background.cancel()
        if parts.inside is not None:
            parts.inside.end(keep)
        # A backend does this itself when it is told to leave, but none may have been attached.
        if not keep:
            await drop_kept(keeper_path(parts.context.run_dir, self.config.name))

    async def _end_idle(self, keep: bool, forget: bool) -> bool:
        """End the device if it is idle and the driver finds its disk unused; otherwise nothing has changed."""
        parts = self.parts
        if not teardown.is_idle(parts) or await teardown.is_claimed(parts):
            return False
        async with parts.life.turn:
            if not teardown.is_idle(parts) or not await teardown.stop_idle(parts):
                return False
            await self._end(keep, forget)
        return True

    async def _end_checked(self, force: bool, keep: bool, forget: bool) -> None:
        """End the device after a look for users of its disk, unless forced."""
        parts, life = self.parts, self.parts.life
        if force:
            self._begin_to_end()
        else:
            await self.check_unused()
        await drain.cancel(parts)
        state, waits = life.state, life.turn.locked()
        async with life.turn:
            if not force:
                await teardown.stop_unused(parts, look_again=waits or state != life.state)
            await self._end(keep, forget)

    async def _end(self, keep: bool, forget: bool) -> None:
        """Remove everything of the device.  Raises `DaemonError`, `OSError`: it has failed."""
        self._begin_to_end()
        try:
            await teardown.tear_down(self.parts, keep)
            await teardown.end_binding(self.parts, keep, forget)
        except (DaemonError, OSError) as error:
            self.note_failure(one_line(error))
            raise

    def _begin_to_end(self) -> None:
        self.parts.life.is_stopping = True
        self.parts.enter(self.state)

    # Takeover of what an earlier daemon left: `go_on`, and if that fails `abandon` and another device's `recover_left`

    def await_takeover(self, record: Record) -> None:
        """List the device that an earlier daemon left; `go_on`, `recover_left` or `delete` comes next."""
        self.parts.left = record
        self.parts.added = record.added or record.config
        if record.drained:
            self.parts.hold("drained")
        if record.device_number is not None:
            self.parts.life.state = "recovering"

    async def go_on(self, record: Record, held: Mapping[str, int]) -> None:
        """Go on with what an earlier daemon left running; `held` are the descriptors that the holder had of it.

        Raises `DaemonError`, `PoolError`, `OSError` if that cannot be; `abandon` comes next then.
        """
        parts = self.parts
        if not parts.drain:
            parts.backend.await_first()
        async with parts.life.turn:
            team = await adoption.go_on(parts, record, held)
            if reason := adoption.data_lost(parts, record):
                parts.backend.data_lost = reason
                await self._fail(reason)
                return
            self._watch(team)
            if parts.backend.session is not None:
                watch_backend(parts, parts.backend.session, self._fail)
            self._set_io_timeout(team)
            self._is_open = True
            self._restart_limit.live()
            parts.enter("live")
            parts.resources.hold_workers(team)
            await adoption.learn(parts, record)
            client_buffers.resume(parts, held)
        parts.background.spawn(name_when_served(parts))
        stderr = held.get(stderr_name(self.config.name))
        if parts.managed is not None and not parts.drain:
            parts.managed.go_on(record.managed, stderr)
        elif parts.managed is not None:
            parts.managed.adopt_to_end(record.managed, stderr)
        if parts.drain:
            # The earlier daemon may have died before its backend was gone.
            drain.let_backend_go(parts)
        parts.left = None
        parts.save_or_retry()
        parts.tell_size()
        repair_soon(parts)
        parts.events.tell(_log, DeviceAdopted(epoch=team.epoch), f"goes on, epoch {team.epoch}")

    def abandon(self) -> None:
        """After a `go_on` that failed: close everything here; processes and kernel device stay as they are."""
        parts = self.parts
        parts.life.give_up()
        parts.background.cancel()
        parts.clients.close()
        parts.resources.abandon()
        parts.backend.abandon()
        if parts.inside is not None:
            parts.inside.close()

    async def recover_left(self, record: Record, held: Mapping[str, int]) -> bool:
        """Recover what an earlier daemon left of the device; False if the kernel has nothing to recover.

        Its processes have ended (`records.end_left`): the kernel sends their requests again, and no request may be
        executed twice.  Raises `DaemonError`, `PoolError`, `OSError`.
        """
        parts = self.parts
        if record.device_number is None:
            # The daemon ended while it added the device, before any client had seen it.
            parts.resources.mark = record.device_mark
            await parts.resources.remove_kernel()
            parts.left = None
            if not self.config.waits_for_backend:
                parts.forget()
            return self.config.waits_for_backend
        if record.drain_is_open:
            # No worker holds a request any more, and no client was told that the device is drained.
            parts.hold("")
        async with parts.life.turn:
            if not await adoption.find(parts, record, held):
                parts.forget()
                return False
            if reason := adoption.data_lost(parts, record):
                parts.backend.data_lost = reason
                await self._fail(reason)
                return True
            parts.left = None
            if not parts.drain:
                parts.backend.await_first()
            await adoption.learn(parts, record)
            self._is_open = True
            await self._recover("", given_up=_LEFT_AND_LOST)
            if self.state == "failed":
                return True
            client_buffers.resume(parts, held)
            parts.background.spawn(name_when_served(parts))
        if parts.managed is not None and not parts.drain:
            parts.managed.start()
        return True
