"""After a worker's death: the device's next epoch, and when to stop trying.

The driver gives up a device as a whole, so all workers are replaced.  The backend may still execute what the dead
workers had sent while the driver sends it again: the device gets requests only after the backend has confirmed that
nothing of an older epoch runs, or is dead (the fence).
"""

import asyncio
import logging
from collections.abc import Callable

from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.opening import connect, reopen_store
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events.kinds import RecoveryBegun, RecoveryEnded
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.processes.beside import beside
from ublkpool.daemon.processes.broker_process import Leases

RECOVERY_DEADLINE_S = 60.0
FENCE_DEADLINE_S = 30.0
DRAIN_PATIENCE_S = 2.0
QUIESCE_DEADLINE_S = 10.0
RESTARTS_MAX = 5
RETRY_PAUSE_S = 0.5
STEADY_S = 2.0
_log = logging.getLogger("ublkpool.recovery")


class RestartLimit:
    """Counts consecutive lives shorter than `STEADY_S`; a longer one resets the count.  `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._live_since_s: float | None = None
        self._count = 0

    def live(self) -> None:
        """The workers serve."""
        self._live_since_s = self._clock()

    def died(self) -> bool:
        """A worker died, or a recovery failed; whether to stop trying."""
        steady = self._live_since_s is not None and self._clock() - self._live_since_s >= STEADY_S
        self._live_since_s = None
        self._count = 1 if steady else self._count + 1
        return self._count > RESTARTS_MAX


class RecoveryAccount:
    """Tells the beginning and the end of one recovery as events: how long it took, and what is sent again."""

    def __init__(self, parts: DeviceParts) -> None:
        self._parts = parts
        self._clock = asyncio.get_running_loop().time
        self._begun_s = self._clock()
        self._has_workers = parts.resources.team is not None
        parts.resources.left_requests = 0

    def begin(self, reason: str) -> None:
        """A worker has ended for this reason; it is empty if an earlier daemon left the device."""
        told = reason or "left by an earlier daemon"
        begun = RecoveryBegun(reason=told, epoch=self._parts.resources.epoch)
        if reason:
            self._parts.events.tell(_log, begun, f"{reason}; recovering")
        else:
            self._parts.events.record(begun, f"{told}; recovering", severity="warning")

    def end(self, served: bool, why: str = "") -> None:
        """The new workers serve, or the recovery was given up, `why`."""
        resources, seconds = self._parts.resources, round(self._clock() - self._begun_s, 3)
        replayed = resources.left_requests if self._has_workers else None
        ended = RecoveryEnded(served=served, epoch=resources.epoch, seconds=seconds, replayed=replayed)
        if served:
            again = "" if replayed is None else f", {replayed} requests are sent again"
            self._parts.events.tell(
                _log, ended, f"recovered, epoch {resources.epoch}, after {seconds:g} s{again}"
            )
        else:
            self._parts.events.record(ended, f"not recovered after {seconds:g} s: {why}", severity="error")


async def retire(team: Team, name: str) -> None:
    """Have workers end with no request left, where the driver has QUIESCE_DEV; `next_epoch` kills those that stay."""
    try:
        if await team.plan.kernel.quiesce(QUIESCE_DEADLINE_S):
            await team.end(QUIESCE_DEADLINE_S)
    except DaemonError as error:
        _log.warning("%s: %s; ending its workers", name, error)


async def next_epoch(parts: DeviceParts) -> Team:
    """Replace the workers of the last epoch, this daemon's or an earlier one's; the new ones serve.

    The caller has the turn.  Raises `DaemonError`, `PoolError`, `OSError`; then a retry may succeed.
    """
    resources = parts.resources
    assert resources.kernel is not None
    kernel, leases = resources.kernel, await resources.ensure_pool()
    if resources.team is not None:
        await resources.team.drain(DRAIN_PATIENCE_S)
        await resources.team.kill()
        # The gauges of the dead: their successors reset them.
        resources.left_requests = max(resources.left_requests, resources.counted("in_flight"))
    if parts.inside is not None:
        await reopen_store(parts, parts.inside)
    await kernel.wait_quiesced(RECOVERY_DEADLINE_S)
    await kernel.start_recovery(RECOVERY_DEADLINE_S)
    team = await parts.fork(resources.epoch + 1)
    await _fence(team, parts.backend.session)
    # The fence is what allows it: until then the backend may use the dead workers' buffers.
    await leases.reclaim()
    await (_end_after_fetches if kernel.tears_siblings else _end_before_fetches)(kernel, team, leases)
    await connect(parts, team)
    return team


async def _fence(team: Team, session: Session | None) -> None:
    """Return when the attached backend has confirmed that nothing of an older epoch runs, or is dead."""
    if session is None or session.is_gone:
        return
    await team.expect(session, fence=True)
    async with beside(team.linked()) as fenced, beside(session.gone()) as gone:
        await asyncio.wait({fenced, gone}, timeout=FENCE_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if fenced.done():
            fenced.result()
        elif not gone.done():
            session.blame(f"backend {session.attach.kind} did not confirm the fence: cutting it off")
            await session.cut_off()


async def _end_before_fetches(kernel: BlockDevice, team: Team, leases: Leases) -> None:
    """END_USER_RECOVERY waits in the kernel before the first fetch, so that nothing of ours delays it after the last.

    Until 6.15 a device whose only worker dies in between never becomes QUIESCED again.
    """
    begun = asyncio.Event()
    async with beside(kernel.end_recovery(RECOVERY_DEADLINE_S, begun)) as command:
        await _begun(begun, command)
        await leases.register(team.epoch)
        await team.ready()
        await _while_serving(team, command)


async def _end_after_fetches(kernel: BlockDevice, team: Team, leases: Leases) -> None:
    """END_USER_RECOVERY comes once every worker was seen with all of its tags: see `BlockDevice.tears_siblings`."""
    await leases.register(team.epoch)
    await team.ready()
    async with beside(
        kernel.end_recovery(RECOVERY_DEADLINE_S, asyncio.Event(), team.whole_check())
    ) as command:
        await _while_serving(team, command)


async def _begun(begun: asyncio.Event, command: "asyncio.Task[None]") -> None:
    """Return when a command is with the kernel, or over."""
    async with beside(begun.wait()) as waiting:
        await asyncio.wait({command, waiting}, return_when=asyncio.FIRST_COMPLETED)


async def _while_serving(team: Team, command: "asyncio.Task[None]") -> None:
    """Wait for a command, which waits for the workers' tags.  Raises `DaemonError` if a worker ends before."""
    async with beside(team.ended()) as ended:
        await asyncio.wait({command, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not command.done():
            raise DaemonError(ended.result().obituary())
        command.result()
