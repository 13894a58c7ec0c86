"""Bringing a backend to a device's workers, and taking leave of it.

Owns the order of who is told what: the workers, the record, the backend; and that the workers take back what a dead
backend held before the next one is introduced.  Runs on the supervisor's asyncio loop.
"""

import logging
from collections.abc import Awaitable, Callable

from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.attached_backend import why_data_is_lost
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.resize import follow_growth
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.events.kinds import BackendAttached
from ublkpool.daemon.processes.background import logged

_log = logging.getLogger("ublkpool.device")


Fail = Callable[[str], Awaitable[None]]
"""Ends the device with this reason; the caller has the turn."""


async def introduce(parts: DeviceParts, team: Team, session: Session, fail: Fail) -> None:
    """Tell every worker which backend to expect, then tell the backend where to connect; the caller has the turn.

    `fail` is called when the backend has ended and its data with it.

    Raises `AttachRefused`, `PoolError`, `DaemonError`, `OSError`; then the backend was handed nothing.
    """
    backend, name = parts.backend, parts.config.name
    await parts.resources.pool.prepare(team, session.uid)
    with team.plan.descriptors() as fds:
        await team.expect(session, fence=False)
        backend.begin(session)
        try:
            parts.save()
        except BaseException:
            # The backend is refused: the workers must not wait for its greeting, and the next one may attach.
            backend.session = None
            with logged(name):
                await team.lost()
            raise
        backend.await_greetings(team)
        watch_backend(parts, session, fail)
        session.entrust(team.attached(session), fds)
    # The backend has its memory: without the holder's copy, the next daemon ends this backend and starts another.
    with logged(name):
        backend.hold(session)
    if parts.life.state == "live":
        backend.say_live(team)
    kind, pid = session.attach.kind, session.pid
    attached = BackendAttached(kind=kind, pid=pid, generation=session.generation)
    parts.events.tell(_log, attached, f"backend {kind} attached (process {pid})")


def watch_backend(parts: DeviceParts, session: Session, fail: Fail) -> None:
    """Follow its store's growth, and take leave of the backend when its process has ended.

    The device fails if its data ended with that.
    """
    follow_growth(parts)
    parts.backend.farewell = parts.background.spawn(_take_leave(parts, session, fail))


async def _take_leave(parts: DeviceParts, session: Session, fail: Fail) -> None:
    await session.gone()
    life = parts.life
    if not life.is_stopping and life.state != "failed" and session.attach.survives_death:
        # The end of the daemon's own backend is logged with its exit status when it is started again.
        level = logging.INFO if parts.config.backend else logging.WARNING
        name, kind = parts.config.name, session.attach.kind
        _log.log(level, "%s: backend %s is gone; requests wait for the next", name, kind)
    async with life.turn:
        if parts.resources.team is not None:
            await parts.resources.team.lost()
        parts.backend.drop(session)
        if reason := _why_none_may_follow(parts, session):
            # In the same turn, so that no other backend is introduced before.
            parts.backend.data_lost = reason
            await fail(reason)
        elif life.state == "waiting":
            await parts.binding.backend_ended()


def _why_none_may_follow(parts: DeviceParts, session: Session) -> str:
    """Why no backend may serve the device after this one; empty if one may.

    Clients may have written to a store that ended with this backend, or know data of a store that another client has
    changed since.
    """
    life = parts.life
    was_served = life.state not in ("waiting", "failed") or parts.binding.is_starting
    if not was_served or life.is_stopping:
        return ""
    return session.excluded or why_data_is_lost(session.attach)
