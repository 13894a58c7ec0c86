"""After a worker's death: the device's next epoch, and when to stop trying.

The driver gives up a device as a whole, so all workers go and a new team takes over.  What the dead had handed to the
backend may still be running there while the driver sends it again: the device is opened for requests only after the
backend has confirmed that nothing of an older epoch runs, or is dead (the fence).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.processes.broker_process import Leases
from ublkpool.daemon.processes.worker_process import WorkerProcess

RECOVERY_DEADLINE_S = 60.0
FENCE_DEADLINE_S = 30.0
DRAIN_PATIENCE_S = 2.0
QUIESCE_DEADLINE_S = 10.0
RESTARTS_MAX = 5
RETRY_PAUSE_S = 0.5
STEADY_S = 2.0
_log = logging.getLogger("ublkpool.recovery")


class RestartLimit:
    """Counts lives that were too short, one after another; a long one wipes the slate."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._live_since_s: float | None = None
        self._count = 0

    def live(self) -> None:
        """Workers are serving."""
        self._live_since_s = self._clock()

    def died(self) -> bool:
        """A worker died, or recovery failed; whether it is time to stop trying."""
        steady = self._live_since_s is not None and self._clock() - self._live_since_s >= STEADY_S
        self._live_since_s = None
        self._count = 1 if steady else self._count + 1
        return self._count > RESTARTS_MAX


async def recover(
    dead: Team, fork: Callable[[int], Awaitable[Team]], session: Session | None, leases: Leases
) -> Team:
    """The next epoch's workers, serving.  Raises `DaemonError`, `PoolError`, `OSError`; then it can be tried again."""
    await dead.drain(DRAIN_PATIENCE_S)
    await dead.kill()
    return await next_epoch(dead.plan.kernel, dead.epoch + 1, fork, session, leases)


async def retire(team: Team, name: str) -> None:
    """Have workers end with nothing left to answer, as far as the driver helps; `recover` ends those that stay."""
    try:
        if await team.plan.kernel.quiesce(QUIESCE_DEADLINE_S):
            await team.end(QUIESCE_DEADLINE_S)
    except DaemonError as error:
        _log.warning("%s: %s; ending its workers", name, error)


async def next_epoch(
    kernel: BlockDevice,
    epoch: int,
    fork: Callable[[int], Awaitable[Team]],
    session: Session | None,
    leases: Leases,
) -> Team:
    """Take over a device whose workers are all dead; `session` is the backend that served them, if it lives."""
    await kernel.wait_quiesced(RECOVERY_DEADLINE_S)
    await kernel.start_recovery(RECOVERY_DEADLINE_S)
    team = await fork(epoch)
    await _fence(team, session)
    # Only now is nobody using the dead workers' buffers any more.
    await leases.reclaim()
    await (_end_after_fetches if kernel.tears_siblings else _end_before_fetches)(kernel, team, leases)
    return team


async def _end_before_fetches(kernel: BlockDevice, team: Team, leases: Leases) -> None:
    """Waited for in the kernel before the first fetch: nothing of ours lies between the last one and its end.

    Until 6.15 a device whose only worker dies in between never becomes QUIESCED again.
    """
    begun = asyncio.Event()
    end = asyncio.ensure_future(kernel.end_recovery(RECOVERY_DEADLINE_S, begun))
    async with _outlived(end):
        await _begun(begun, end)
        await leases.register(team.epoch)
        await team.ready()
        await _while_serving(team, end)


async def _end_after_fetches(kernel: BlockDevice, team: Team, leases: Leases) -> None:
    """Only once every worker has been seen with all of its tags: see `BlockDevice.tears_siblings`."""
    await leases.register(team.epoch)
    await team.ready()
    end = asyncio.ensure_future(kernel.end_recovery(RECOVERY_DEADLINE_S, asyncio.Event(), team.check_whole))
    async with _outlived(end):
        await _while_serving(team, end)


@asynccontextmanager
async def _outlived(command: "asyncio.Future[None]") -> AsyncIterator[None]:
    """The next attempt kills the other workers, and one of them must have outlived the command."""
    try:
        yield
    finally:
        command.cancel()
        await asyncio.wait({command})
        # Its own failure may have come second, and is nobody's surprise then.
        if not command.cancelled():
            command.exception()


async def _begun(begun: asyncio.Event, command: "asyncio.Future[None]") -> None:
    """Return when a command is with the kernel, or over."""
    waiting: asyncio.Future[bool] = asyncio.ensure_future(begun.wait())
    both: set[asyncio.Future[None] | asyncio.Future[bool]] = {command, waiting}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _while_serving(team: Team, command: "asyncio.Future[None]") -> None:
    """Wait for a command, which waits for the workers' tags.  Raises `DaemonError` if a worker ends before."""
    ended = asyncio.ensure_future(team.ended())
    both: set[asyncio.Future[None] | asyncio.Future[WorkerProcess]] = {command, ended}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not command.done():
            raise DaemonError(ended.result().obituary())
        command.result()
    finally:
        ended.cancel()


async def _fence(team: Team, session: Session | None) -> None:
    """Return when the attached backend has confirmed that nothing of an older epoch runs, or is dead."""
    if session is None or session.is_gone:
        return
    await team.expect(session, fence=True)
    fenced = asyncio.ensure_future(team.linked())
    gone = asyncio.ensure_future(session.gone())
    try:
        await asyncio.wait({fenced, gone}, timeout=FENCE_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if fenced.done():
            fenced.result()
        elif not gone.done():
            _log.error("backend %s did not confirm the fence: cutting it off", session.attach.kind)
            await session.cut_off()
    finally:
        fenced.cancel()
        gone.cancel()
