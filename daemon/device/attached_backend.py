"""The one backend that is attached to a device, or none.

Owns the session, the numbers of the backends' segments, what the workers report of the backend, and its farewell.  The
order in which backends follow each other is `device.py`'s; the end of one connection and process is `session.py`'s, the
process of a backend that the daemon runs itself `managed_backend.py`'s.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.daemon.backends.backend_user import asked_for, why_not
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.cut_offs import CutOffs
from ublkpool.daemon.device.lifecycle import Lifecycle
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events.kinds import (
    BackendCutOff,
    BackendDetached,
    BackendDied,
    BackendReplaced,
    RequestLate,
    RequestsFail,
)
from ublkpool.daemon.events.tell import DeviceEvents
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.held_names import session_names
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.workers import messages
from ublkpool.workers.privileges import Account

DETACH_PATIENCE_S = 10.0
DEATH_PATIENCE_S = 10.0
"""After SIGKILL, for a backend that waits in the kernel."""
HANGUP_PATIENCE_S = 5.0
_CUT_OFF = "backend cut off: "
_log = logging.getLogger("ublkpool.device")


class _Ended(NamedTuple):
    """A backend that has ended: its process, when that was, and the workers' count of replays then."""

    pid: int
    at_s: float
    replays: int


class AttachedBackend:
    """A device's attached backend; `session` is None while no backend is attached."""

    def __init__(
        self,
        config: DeviceConfig,
        life: Lifecycle,
        holder: Holder,
        background: Background,
        events: DeviceEvents,
    ) -> None:
        self.session: Session | None = None
        self.cut_offs = CutOffs()
        self.segments = wire.SEGMENT_POOL
        """The highest segment number that a backend was given."""
        self.data_lost = ""
        """Why no backend can serve the device any more: the data ended with the process of the last one."""
        self.refusal = ""
        """Why the last backend that came was refused; empty once one was taken."""
        self.farewell: asyncio.Task[None] | None = None
        """Ends when the workers have taken back what the attached backend held; None if no backend is attached."""
        self.config = config
        self._life = life
        self._holder = holder
        self._background = background
        self._events = events
        self._cut: Session | None = None
        """The session whose cut-off a worker was the first to report."""
        self._before: _Ended | None = None
        """The backend that ended last, until another has taken its place."""
        self.may_attach = True
        """False while the device is drained."""
        self._is_absence_logged = False
        self._is_first_due = False
        """No backend has served since a takeover."""
        self.account: Account | None = None
        """The user that the workers become; None: they keep the daemon's rights."""
        self.replays: Callable[[], int] = lambda: 0
        """How many requests the workers have sent again to a backend's successor, since the device was made."""

    def check_free(self) -> None:
        """Raise `AttachRefused` unless a backend may attach, now or after the attached one's farewell."""
        name, life, session = self.config.name, self._life, self.session
        if self.config.answers == "worker":
            raise AttachRefused(f"device {name}: its workers answer: add it without --answers worker")
        if self.config.isolation == "none":
            raise AttachRefused(
                f"device {name}: its workers run the engine themselves: add it without --isolation none"
            )
        if life.is_stopping or life.state == "failed":
            raise AttachRefused(f"device {name}: {life.reason or 'it is being deleted'}")
        if not self.may_attach:
            raise AttachRefused(f"device {name} is drained: ublkpool resume {name} first")
        if session is not None and not session.is_gone and not session.is_leaving:
            raise AttachRefused(
                f"device {name} has a backend already ({session.attach.kind}, process {session.pid})"
            )

    async def check_user(self, user: int, runner: ControlRunner) -> None:
        """Raise `AttachRefused` unless a backend of this user may serve the device.

        Raises `CallHung`, `ControlFailed` if what knows the machine's users does not answer.
        """
        name = self.config.name
        if self.account is not None and self.account.user and user == self.account.user:
            raise AttachRefused(
                f"device {name}: user {self.account.name} is the workers' own, whom a backend of that user "
                "could end: run the backend as another user"
            )
        wanted = asked_for(self.config.backend, user)
        if wanted is None:
            return
        # Limited for itself: a process that may not serve the device must not use up its looks.
        owner, what = f"{name}'s user", f"{name}: asking for user {wanted}"
        if problem := await runner.look(owner, what, partial(why_not, wanted, user), str):
            raise AttachRefused(f"device {name}: {problem}")

    def number_segment(self, session: Session) -> None:
        """Give the backend's own segment, if it has one, a number that no earlier backend had."""
        if session.attach.segment_bytes:
            self.segments += 1
            session.segment = self.segments

    def begin(self, session: Session) -> None:
        """The workers expect this backend."""
        self.session = session
        self.watch(session)
        self.refusal = ""
        self._is_absence_logged = False

    def hold(self, session: Session) -> None:
        """Have the holder keep the connection, once the backend has its answer: else the next daemon owes it one."""
        for name, fd in zip(
            session_names(self.config.name), (session.fileno(), session.segment_fd), strict=True
        ):
            if fd is not None:
                self._holder.hold(name, fd)

    @property
    def is_absent_too_long(self) -> bool:
        """Whether requests fail for want of a backend."""
        return self.session is None and self._is_absence_logged

    def note_refusal(self, reason: str) -> None:
        """A backend was refused.  While another is attached this troubles no request."""
        if self.session is None:
            self.refusal = reason

    def await_first(self) -> None:
        """At a takeover: the device counts as served once a backend, the earlier daemon's or a new one, serves it."""
        if self.config.has_backend_process:
            self._is_first_due = True
            self._life.serve(False)

    def await_greetings(self, team: Team) -> None:
        """The device counts as served once the attached backend has greeted every queue of these workers."""
        if self.session is not None and team.unlinked():
            self._life.serve(False)
            self._background.spawn(self._until_greeted(team, self.session))
        elif self.session is not None:
            self._served()

    async def _until_greeted(self, team: Team, session: Session) -> None:
        # If a worker ends, the next epoch's team is greeted anew.
        with suppress(DaemonError):
            await team.linked()
            if self.session is session:
                self._served()

    def due_greetings(self, team: Team | None) -> str:
        """The queues that the attached backend has yet to greet before it serves, in words; empty if none."""
        session = self.session
        if self._life.is_served or session is None or team is None:
            return ""
        # The last greeting may have come since the loop last turned.
        if not (queues := ", ".join(map(str, team.unlinked()))):
            return ""
        return f"backend {session.attach.kind} has attached and not said HELLO on queue {queues} yet"

    def _served(self) -> None:
        self._note_replacement()
        self._is_first_due = False
        self._life.serve(True)

    def _note_replacement(self) -> None:
        """The attached backend serves in the place of one that has ended."""
        before, session = self._before, self.session
        if before is None or session is None:
            return
        self._before = None
        replayed = max(0, self.replays() - before.replays)
        kind, pid, seconds = session.attach.kind, session.pid, round(self._clock() - before.at_s, 3)
        self._events.record(
            BackendReplaced(kind=kind, pid=pid, earlier_pid=before.pid, seconds=seconds, replayed=replayed),
            f"backend {kind} (process {pid}) serves in the place of process {before.pid}, after {seconds:g} s; "
            f"requests sent again: {replayed}",
        )

    @staticmethod
    def _clock() -> float:
        return asyncio.get_running_loop().time()

    def say_live(self, team: Team) -> None:
        """Tell the backend, if one is attached, that the disk exists."""
        if self.session is not None:
            self.session.say(wire.Live(path=str(team.plan.kernel.node)))

    def hear(self, worker: WorkerProcess, news: messages.FromWorker) -> None:
        """A worker reports something of the backend, or that none is attached."""
        if isinstance(news, messages.Cut):
            self._note_cut(worker, news.reason)
            self.cut_off_soon()
        elif isinstance(news, messages.HungUp):
            if self.session is not None:
                self._background.spawn(self.session.hung_up(HANGUP_PATIENCE_S))
        elif isinstance(news, messages.Silent):
            timeout_s = self.config.io_timeout_s
            self._events.tell(
                _log,
                RequestLate(queue=worker.queue, io_timeout_s=timeout_s),
                f"a request has waited longer than io_timeout = {timeout_s:g} s",
                place=f"{self.config.name} queue {worker.queue}",
            )
        elif isinstance(news, messages.Absent):
            self._note_absence()

    def _note_absence(self) -> None:
        """Every worker reports the absence; it is logged once.

        The session may still be that of the backend that is absent, until its process is dead.  It is never the next
        one's, since every worker has answered that it expects a backend before that one's session begins.
        """
        if not self._life.is_stopping and not self._is_absence_logged:
            self._is_absence_logged = True
            absent_s = self.config.absent_timeout_s
            self._events.tell(
                _log,
                RequestsFail(why="no-backend", after_s=absent_s),
                f"no backend for {absent_s:g} s: requests fail until one attaches",
            )

    def note_new_deadlines(self) -> None:
        """The workers judge the absence of a backend anew."""
        self._is_absence_logged = False

    def cut_off_soon(self) -> None:
        """Have the backend killed, without waiting for its death."""
        if self.session is not None:
            self._background.spawn(self.session.cut_off())

    async def gone(self) -> None:
        """Return when the attached backend is gone; at once if none is attached."""
        if self.session is not None:
            await self.session.gone()

    async def end(self, keep: bool) -> None:
        """Have the backend go, with or without what it keeps for a successor; one that stays is killed."""
        if self.session is not None:
            session = self.session
            reason = self._life.reason or "the device is being deleted"
            try:
                await asyncio.wait_for(
                    session.detach(reason, DETACH_PATIENCE_S, keep), DETACH_PATIENCE_S + DEATH_PATIENCE_S
                )
            except TimeoutError:
                # It waits for its own storage, which no signal ends; the device's memory serves no other backend.
                _log.error("%s: process %d was killed and waits in the kernel", self.config.name, session.pid)
            if self.farewell is not None:
                self.farewell.cancel()
            self.drop(session)

    def watch(self, session: Session) -> None:
        """Have this backend's cut-offs told as the device's events."""
        session.on_blame = lambda text: self._note_blame(session, text)

    def _note_blame(self, session: Session, text: str) -> None:
        self.cut_offs.note(text)
        self._events.tell(_log, BackendCutOff(reason=text.removeprefix(_CUT_OFF), pid=session.pid), text)

    def _note_cut(self, worker: WorkerProcess, reason: str) -> None:
        """Every worker may report the same backend; one cut-off is told and counted once."""
        session = self.session
        if session is not None and (session.was_cut_off or self._cut is session):
            return
        self._cut = session
        self.cut_offs.note(reason)
        pid = session.pid if session is not None else 0
        self._events.tell(
            _log,
            BackendCutOff(reason=reason, pid=pid, queue=worker.queue),
            f"backend cut off: {reason}",
            place=f"{self.config.name} queue {worker.queue}",
        )

    def _note_end(self, session: Session) -> None:
        """A backend is gone: an event for each that was attached."""
        kind, pid = session.attach.kind, session.pid
        if session.is_detaching or self._life.is_stopping:
            self._events.record(
                BackendDetached(kind=kind, pid=pid), f"backend {kind} has left (process {pid})"
            )
            return
        self._before = _Ended(pid, self._clock(), self.replays())
        if session.is_replaced and not session.was_cut_off:
            self._events.record(
                BackendDetached(kind=kind, pid=pid),
                f"backend {kind} has left for its successor (process {pid})",
            )
            return
        was_told = session.has_said_end and not session.was_cut_off
        self._events.record(
            BackendDied(kind=kind, pid=pid, was_cut_off=session.was_cut_off, was_told=was_told),
            f"backend {kind} has ended{', as it was told to' if was_told else ''} (process {pid})",
            severity="info" if was_told else None,
        )

    def drop(self, session: Session) -> None:
        """The workers have taken back what this backend held, or end with it: the next one may attach."""
        self._note_end(session)
        for name in session_names(self.config.name):
            self._holder.drop(name)
        session.close()
        self.session = self.farewell = self._cut = None
        self._life.serve(not self._is_first_due)

    def abandon(self) -> None:
        """Close the connection here; the backend and the holder's copy of it stay as they are."""
        if self.session is not None:
            self.session.close(is_kept=True)


def why_data_is_lost(attach: wire.Attach) -> str:
    """The reason of a device whose data ended with this backend's process; empty if its data does not end with it."""
    if attach.survives_death:
        return ""
    return f"its backend {attach.kind} has ended, and the data of the device with it (survives_death = False)"
