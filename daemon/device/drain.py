"""Maintenance of a device's backend: its requests wait and its backend goes, until the device is resumed.

Owns the order, so that no request is lost or late whichever process dies: the workers hold new requests; what the
backend has is finished; it confirms a FLUSH; `drained` is on record; the backend leaves.  From then on no backend may
attach, a worker's successor holds requests from its start, and the next daemon goes on from there.

Until `drained` is on record the hold ends with this daemon: the workers have the reader of a gate (`RecordGate`), and
let their requests go on at its end.  Between the record and the gate's opening the record says so
(`Record.drain_is_open`), and the workers tell the next daemon which of both came first.  Runs on the supervisor's
asyncio loop.
"""

import asyncio
import errno
import logging
import os

from ublkpool.daemon.device.attached_backend import DETACH_PATIENCE_S
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events.kinds import DeviceDrained, DeviceResumed
from ublkpool.daemon.processes.beside import beside
from ublkpool.workers.record_gate import RecordGate

REASON = "the device is being drained"
_log = logging.getLogger("ublkpool.device")


class NotDrained(DaemonError):
    """The device goes on as before, for this reason."""


async def drain(parts: DeviceParts, flush: bool, timeout_s: float | None) -> None:
    """Return when the device is drained: the backend has left, requests wait.  A device that is drained stays so.

    The backend of a device that was drained before may still be leaving: the call waits for that.

    With `flush` the backend must have confirmed a FLUSH.  After `timeout_s`, if that fails, or if the caller is
    cancelled before the backend was told to leave, the device goes on as before.  Raises `DaemonError`, `OSError`.
    """
    if parts.drain == "drained":
        await _stay_drained(parts)
        return
    name = parts.config.name
    if parts.draining is not None and not parts.draining.done():
        raise DaemonError(f"{name}: it is being drained already")
    parts.draining = task = parts.background.spawn_awaited(_drain(parts, flush, timeout_s))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        if task.cancelled():
            raise DaemonError(f"{name}: not drained: it is being deleted, or the machine goes down") from None
        await cancel(parts)
        raise
    _check_drained(parts)


async def _stay_drained(parts: DeviceParts) -> None:
    """Return when the backend of a drained device has left.  Raises `DaemonError` if the device is not drained then."""
    _check_drained(parts)
    if parts.left is not None:
        # The earlier daemon may have died before the backend was gone.
        raise _being_taken_over(parts)
    await _has_left(parts)
    _check_drained(parts)


def _check_drained(parts: DeviceParts) -> None:
    """Raise `NotDrained` unless the device is drained."""
    name = parts.config.name
    if _is_over(parts):
        raise NotDrained(f"{name}: not drained: {parts.life.reason or 'it is being deleted'}")
    if parts.drain != "drained":
        raise NotDrained(f"{name}: not drained: it was resumed meanwhile")


def _being_taken_over(parts: DeviceParts) -> DaemonError:
    return DaemonError(f"{parts.config.name}: it is being taken over from an earlier daemon: try again")


async def cancel(parts: DeviceParts) -> None:
    """End a drain that is under way: the device goes on as before, or is drained."""
    if (task := parts.draining) is not None and not task.done():
        task.cancel()
        await asyncio.wait({task})


async def _drain(parts: DeviceParts, flush: bool, timeout_s: float | None) -> None:
    async with parts.life.turn:
        _check(parts)
        parts.resources.hold_gate = RecordGate()
        parts.hold("draining")
    try:
        async with asyncio.timeout(timeout_s):
            await _quiet(parts, flush)
        # It is not given up once the backend may have been told to leave.
        await asyncio.shield(parts.background.spawn_awaited(_leave(parts)))
    except BaseException as error:
        await asyncio.shield(parts.background.spawn(_give_up(parts)))
        if isinstance(error, TimeoutError):
            reason = f"its backend has not finished its requests after {timeout_s:g} s"
            raise NotDrained(f"{parts.config.name}: not drained: {reason}", code="timeout") from None
        raise


async def _give_up(parts: DeviceParts) -> None:
    """The device goes on as before the drain, unless it is drained already.

    The turn comes after that of `_leave`, which may still need the gate although `_drain` was cancelled.
    """
    async with parts.life.turn:
        try:
            if parts.drain == "draining":
                await _release(parts)
        finally:
            if (gate := parts.resources.hold_gate) is not None:
                parts.resources.hold_gate = None
                gate.close()


def _check(parts: DeviceParts) -> None:
    """Raise `DaemonError` with the reason if the device cannot be drained."""
    name, life, session, team = parts.config.name, parts.life, parts.backend.session, parts.resources.team
    reason = ""
    if parts.config.answers == "worker":
        reason = "its workers answer requests, so there is no backend to be exchanged"
    elif parts.config.isolation == "none":
        reason = (
            "its workers run the engine themselves (isolation none), so there is no backend to be exchanged: "
            "to work on its store, delete the device and add it again"
        )
    elif life.is_stopping:
        reason = "it is being deleted"
    elif life.state == "failed":
        reason = "it has failed and has no disk"
    elif life.state != "live" or team is None:
        reason = f"it is {life.shown}, not live: try again when it is"
    elif not team.can_hold:
        reason = "its workers run an earlier version, which cannot be drained: try again when they have been replaced"
    elif session is not None and not session.attach.survives_death:
        reason = "its data ends with the process of its backend, which therefore cannot be exchanged"
    if reason:
        raise NotDrained(f"{name}: {reason}")


async def _quiet(parts: DeviceParts, flush: bool) -> None:
    """Return when the backend has no request, and has confirmed a FLUSH if there is one to do."""
    life, resources = parts.life, parts.resources
    while True:
        await life.until(lambda: life.state == "live" or _is_over(parts))
        async with life.turn:
            team = resources.team
            if _is_over(parts) or team is None:
                raise NotDrained(f"{parts.config.name}: {life.reason or 'it is being deleted'}")
        try:
            await team.hold(True, resources.hold_gate)
            await team.quiet()
            if flush:
                await _flush(parts, team)
            return
        except NotDrained:
            raise
        except DaemonError:
            # A worker has ended: its successors hold requests from their start.
            await life.until(lambda dead=team: resources.team is not dead or _is_over(parts))  # type: ignore[misc]


def _is_over(parts: DeviceParts) -> bool:
    return parts.life.is_stopping or parts.life.state == "failed"


async def _flush(parts: DeviceParts, team: Team) -> None:
    """Have the backend write out what it caches.  Raises `NotDrained`, `DaemonError` if a worker ends."""
    disk, session, name = parts.resources.disk, parts.backend.session, parts.config.name
    if disk is None or disk.read_only or not disk.volatile_cache:
        return
    if session is None:
        raise NotDrained(
            f"{name}: not drained: no backend is attached that could confirm a FLUSH; see --no-flush"
        )
    async with beside(team.linked()) as linked, beside(session.gone()) as gone:
        await asyncio.wait({linked, gone}, return_when=asyncio.FIRST_COMPLETED)
        if linked.done():
            linked.result()
    result = await team.flush()
    if result == -errno.ENOTCONN:
        raise NotDrained(f"{name}: not drained: its backend ended before it confirmed a FLUSH; try again")
    if result:
        raise NotDrained(f"{name}: not drained: its backend answered the FLUSH with {os.strerror(-result)}")


async def _leave(parts: DeviceParts) -> None:
    """Put on record that the device is drained, then end its backend.  Raises `DaemonError`, `OSError` before that."""
    async with parts.life.turn:
        if _is_over(parts):
            raise NotDrained(f"{parts.config.name}: {parts.life.reason or 'it is being deleted'}")
        parts.hold("drained")
        try:
            parts.save()
        except BaseException:
            parts.hold("draining")
            raise
        _hold_for_good(parts)
        let_backend_go(parts)
    await parts.saved()
    await _has_left(parts)
    parts.events.tell(_log, DeviceDrained(), "drained; requests wait until it is resumed")


def _hold_for_good(parts: DeviceParts) -> None:
    """The device is drained, also without this daemon."""
    resources = parts.resources
    if resources.hold_gate is not None:
        # In one step for all workers: none lets go while another holds.
        resources.hold_gate.open(len(resources.team.workers) if resources.team is not None else 0)
        resources.hold_gate = None
    parts.save_or_retry()


def let_backend_go(parts: DeviceParts) -> None:
    """Begin to end the backend of a drained device, which has no request; what it keeps for a successor stays."""
    parts.leaving = parts.background.spawn(_let_backend_go(parts))


async def _has_left(parts: DeviceParts) -> None:
    """Return when the backend of a drained device has ended, or will not: the device is deleted then.

    Not in the device's turn, which the backend's farewell takes.
    """
    if (task := parts.leaving) is not None:
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()


async def _let_backend_go(parts: DeviceParts) -> None:
    if parts.managed is not None:
        parts.managed.let_end()
    session, farewell = parts.backend.session, parts.backend.farewell
    if session is not None:
        await session.detach(REASON, DETACH_PATIENCE_S, keep=True)
        if farewell is not None:
            await asyncio.wait({farewell})
    if parts.managed is not None:
        await parts.managed.end()


async def resume(parts: DeviceParts) -> None:
    """Have the requests of a drained device served again, by the next backend.  Raises `DaemonError`, `OSError`.

    Returns after the earlier backend has left.
    """
    await _has_left(parts)
    async with parts.life.turn:
        if parts.life.state == "failed":
            raise DaemonError(f"{parts.config.name}: it has failed: {parts.life.reason}")
        if parts.left is not None:
            raise _being_taken_over(parts)
        if parts.leaving is not None and not parts.leaving.done():
            # Another client has resumed and drained the device meanwhile.
            raise DaemonError(f"{parts.config.name}: its backend is leaving: try again")
        if parts.drain == "draining":
            raise DaemonError(f"{parts.config.name}: it is being drained: interrupt that command instead")
        if not parts.drain:
            raise DaemonError(f"{parts.config.name}: it is not drained")
        parts.hold("")
        try:
            parts.save()
        except BaseException:
            parts.hold("drained")
            raise
        await _release(parts)
        if parts.managed is not None and not parts.life.is_stopping:
            parts.managed.start()
    parts.events.tell(_log, DeviceResumed(), "resumed")


async def _release(parts: DeviceParts) -> None:
    parts.hold("")
    if parts.resources.team is not None:
        await parts.resources.team.release()
