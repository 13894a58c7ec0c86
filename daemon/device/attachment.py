"""A device's backend: who is attached, what workers say of it, and its farewell.

Owns the order in which backends follow each other: at most one is attached, and the next is introduced to the workers
only after they have taken back what the last one held.  A backend's own end is `session.py`'s, the process of one that
the daemon runs itself `managed_backend.py`'s.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.lifecycle import Lifecycle
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.held_names import session_names
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.workers import messages

DETACH_PATIENCE_S = 10.0
DEATH_PATIENCE_S = 10.0
"""After KILL, for a backend that waits in the kernel."""
HANGUP_PATIENCE_S = 5.0
_log = logging.getLogger("ublkpool.device")


class Attachment:
    """The place of a device's backend; `session` is who has it."""

    def __init__(
        self,
        config: DeviceConfig,
        life: Lifecycle,
        holder: Holder,
        background: Background,
        team: Callable[[], Team | None],
    ) -> None:
        """`team` tells the workers of the current epoch."""
        self.session: Session | None = None
        self.segments = wire.SEGMENT_POOL
        """How many segment numbers were given away."""
        self.refusal = ""
        """Why the last backend that came was not taken; empty once one was."""
        self._config = config
        self._life = life
        self._holder = holder
        self._background = background
        self._team = team
        self._farewell: asyncio.Task[None] | None = None
        self._is_absent_logged = False
        self._is_first_due = False
        """No backend has served since a takeover."""

    async def admit(self, session: Session, take: Callable[[Session], Awaitable[None]]) -> None:
        """Have `take` bring it to the workers, when it is its turn.  Raises `AttachRefused` and what `take` raises."""
        self._refuse_second()
        while not await self._admit(session, take):
            self._refuse_second()

    async def _admit(self, session: Session, take: Callable[[Session], Awaitable[None]]) -> bool:
        """Take a backend, unless the one before it has not been taken leave of; whether it was taken."""
        if self._farewell is not None:
            await asyncio.shield(self._farewell)
            self._refuse_second()
        async with self._life.turn:
            # Another may have been taken, and have died, while this one waited for its turn: its farewell comes first,
            # for it takes the link away from whoever has it then.
            if self._farewell is not None:
                return False
            self._refuse_second()
            await take(session)
        return True

    def _refuse_second(self) -> None:
        name, life = self._config.name, self._life
        if self._config.answers == "worker":
            raise AttachRefused(f"device {name}: its workers answer: add it without --answers worker")
        if life.is_stopping or life.state == "failed":
            raise AttachRefused(f"device {name}: {life.reason or 'it is being deleted'}")
        # One that is leaving is waited for: see `_admit`.
        if self.session is not None and not self.session.is_gone and not self.session.is_leaving:
            who = f"{self.session.attach.kind}, process {self.session.pid}"
            raise AttachRefused(f"device {name} has a backend already ({who})")

    def number_segment(self, session: Session) -> None:
        """Give the backend's own segment, if it has one, a number that none before it had."""
        if session.attach.segment_bytes:
            self.segments += 1
            session.segment = self.segments

    async def introduce(self, team: Team, session: Session) -> None:
        """Tell every worker whom to expect, then the backend where to go.

        Raises `AttachRefused`, `DaemonError`, `OSError`; then it was handed nothing.
        """
        with team.plan.descriptors() as fds:
            await team.expect(session, fence=False)
            self.session = session
            self.refusal = ""
            self._is_absent_logged = False
            self._life.save()
            self.await_greetings(team)
            self._farewell = self._background.spawn(self._until_gone(session))
            session.entrust(team.attached(session), fds)
        self._hold(session)
        if self._life.state == "live":
            self.say_live(team)
        name = self._config.name
        _log.info("%s: backend %s attached (process %d)", name, session.attach.kind, session.pid)

    @property
    def is_absent_too_long(self) -> bool:
        """Whether requests fail for want of a backend."""
        return self.session is None and self._is_absent_logged

    def note_refusal(self, reason: str) -> None:
        """A backend that came was not taken.  One that comes while another serves troubles no request."""
        if self.session is None:
            self.refusal = reason

    def adopt(self, session: Session, team: Team) -> None:
        """Go on with a backend that an earlier daemon introduced."""
        self._hold(session)
        self.await_greetings(team)
        self._farewell = self._background.spawn(self._until_gone(session))

    def await_first(self) -> None:
        """At a takeover: the device is not served before a backend is there, an earlier daemon's or another."""
        if self._config.answers == "backend":
            self._is_first_due = True
            self._life.serve(False)

    def await_greetings(self, team: Team) -> None:
        """The device is served from when its backend, if it has one, has greeted every queue of these workers."""
        if self.session is not None and team.unlinked():
            self._life.serve(False)
            self._background.spawn(self._until_greeted(team, self.session))
        elif self.session is not None:
            self._served()

    async def _until_greeted(self, team: Team, session: Session) -> None:
        # A worker that ends has others follow, which are greeted anew.
        with suppress(DaemonError):
            await team.linked()
            if self.session is session:
                self._served()

    def due_greetings(self) -> str:
        """Which queues the attached backend has yet to greet before it serves; empty if none."""
        team, session = self._team(), self.session
        if self._life.is_served or session is None or team is None:
            return ""
        # All of them may have been greeted since this loop last turned.
        if not (queues := ", ".join(map(str, team.unlinked()))):
            return ""
        return f"backend {session.attach.kind} has attached and not said HELLO on queue {queues} yet"

    def _served(self) -> None:
        self._is_first_due = False
        self._life.serve(True)

    def say_live(self, team: Team) -> None:
        """The disk is there: tell the backend, if there is one."""
        if self.session is not None:
            self.session.say(wire.Live(path=str(team.plan.kernel.node)))

    def _hold(self, session: Session) -> None:
        """Not before the backend has its answer: else the next daemon would have to give it."""
        for name, fd in zip(
            session_names(self._config.name), (session.fileno(), session.segment_fd), strict=True
        ):
            if fd is not None:
                self._holder.hold(name, fd)

    def hear(self, worker: WorkerProcess, news: messages.FromWorker) -> None:
        """What a worker says of the backend, or of there being none."""
        name = self._config.name
        if isinstance(news, messages.Cut):
            _log.error("%s queue %d: backend cut off: %s", name, worker.queue, news.reason)
            self.cut_off_soon()
        elif isinstance(news, messages.HungUp):
            if self.session is not None:
                self._background.spawn(self.session.hung_up(HANGUP_PATIENCE_S))
        elif isinstance(news, messages.Silent):
            timeout_s = self._config.io_timeout_s
            _log.warning(
                "%s queue %d: a request has waited longer than io_timeout = %g s",
                name,
                worker.queue,
                timeout_s,
            )
        elif isinstance(news, messages.Absent):
            self._on_absent()

    def _on_absent(self) -> None:
        """Every worker says so; once is enough, and a backend may have come meanwhile."""
        if self.session is None and not self._life.is_stopping and not self._is_absent_logged:
            self._is_absent_logged = True
            _log.error(
                "%s: no backend for %g s: requests fail until one attaches",
                self._config.name,
                self._config.absent_timeout_s,
            )

    def cut_off_soon(self) -> None:
        """See to it that the backend touches no buffer any more, without waiting for that."""
        if self.session is not None:
            self._background.spawn(self.session.cut_off())

    async def gone(self) -> None:
        """Return when nobody is attached; at once if so."""
        if self.session is not None:
            await self.session.gone()

    async def _until_gone(self, session: Session) -> None:
        """After a backend's end: let the workers take back what it held."""
        await session.gone()
        if not self._life.is_stopping and self._life.state != "failed":
            name, kind = self._config.name, session.attach.kind
            # The end of one that the daemon runs is logged with its exit status where it is started again.
            level = logging.INFO if self._config.backend else logging.WARNING
            _log.log(level, "%s: backend %s is gone; requests wait for the next", name, kind)
        async with self._life.turn:
            if (team := self._team()) is not None:
                await team.lost()
            self._drop(session)

    async def end(self, keep: bool) -> None:
        """Have the backend go, with or without what it keeps for a successor; it is killed if it does not."""
        if self.session is not None:
            session = self.session
            reason = self._life.reason or "the device is being deleted"
            try:
                await asyncio.wait_for(
                    session.detach(reason, DETACH_PATIENCE_S, keep), DETACH_PATIENCE_S + DEATH_PATIENCE_S
                )
            except TimeoutError:
                # It waits for its own storage, which no signal ends; the device's memory serves no other backend.
                _log.error(
                    "%s: process %d was killed and waits in the kernel", self._config.name, session.pid
                )
            if self._farewell is not None:
                self._farewell.cancel()
            self._drop(session)

    def _drop(self, session: Session) -> None:
        for name in session_names(self._config.name):
            self._holder.drop(name)
        session.close()
        self.session = self._farewell = None
        self._life.serve(not self._is_first_due)

    def abandon(self) -> None:
        """Forget who is attached, change nothing."""
        if self.session is not None:
            self.session.close()
