"""The prepared devices of a daemon: `--prepare N`, or `[prepare]` in the config.

Owns how many there are: one that a device has taken, or whose worker has ended, is replaced, after running adds, one at
a time, with a pause that grows after a failure.  They have what devices leave of the memory budget, and end with the
daemon.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.memory_room import mib
from ublkpool.daemon.device.build import discard, prepare
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.memory import memory_of
from ublkpool.daemon.device.prepared import PreparedParts
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.errors import DaemonError, one_line, without_name
from ublkpool.daemon.processes.background import Background, logged
from ublkpool.daemon.processes.backoff import Backoff
from ublkpool.daemon.settings.config import DeviceConfig, Prepare

ADD_PATIENCE_S = 5.0
"""How long a running add delays the next prepared device: one that hangs must not end them for ever."""
RETRY_PAUSE_S = 1.0
RETRY_PAUSE_MAX_S = 60.0
END_DEADLINE_S = 30.0
Adds = Callable[[], Collection["asyncio.Task[None]"]]
_log = logging.getLogger("ublkpool.prepared")
_FAILURES = (DaemonError, PoolError, OSError)


class PreparedStock:
    """The prepared devices of one daemon."""

    def __init__(self, context: DaemonContext, wanted: Prepare | None, adds: Adds) -> None:
        """`wanted` None: none; `adds` gives the tasks that make a device now."""
        self._context = context
        self._wanted = wanted
        self._adds = adds
        self._ready: dict[PreparedParts, asyncio.Task[None]] = {}
        """Each with the task that waits for the end of a worker."""
        self._made: PreparedParts | None = None
        """The one that is being made."""
        self._left: dict[int, Record] = {}
        """By their marks, those of an earlier daemon that are still to be removed."""
        self._ending: set[PreparedParts] = set()
        self._background = Background("prepared devices")
        self._changed = asyncio.Event()
        self._trouble = ""
        self._delays = Backoff(asyncio.get_running_loop().time, RETRY_PAUSE_S, RETRY_PAUSE_MAX_S)
        self._pause_s = 0.0
        """Before the next one, after a failure."""
        context.budget.prepared_bytes = lambda: self.memory_bytes

    @property
    def wanted_count(self) -> int:
        """How many there are to be."""
        return self._wanted.number if self._wanted is not None else 0

    @property
    def ready_count(self) -> int:
        """How many a device can take."""
        return len(self._ready)

    @property
    def memory_bytes(self) -> int:
        """What counts of them for `memory_max`."""
        return sum(each.resources.memory_bytes for each in self._all())

    @property
    def marks(self) -> set[int]:
        """Of the kernel's devices."""
        return {each.resources.mark for each in self._all()} | self._left.keys()

    def _all(self) -> Sequence[PreparedParts]:
        return [*self._ready, *([] if self._made is None else [self._made]), *self._ending]

    def take(self, config: DeviceConfig, disk: Disk) -> PreparedParts | None:
        """One that fits this device, which is the caller's from now on; None if there is none."""
        for each in self._ready:
            if each.fits(config, disk):
                self._ready.pop(each).cancel()
                self._changed.set()
                return each
        return None

    def look(self) -> None:
        """Devices may need more of the memory budget now, or leave more of it."""
        self._changed.set()

    async def broker_restarted(self) -> None:
        """Tell the new broker of their leases; a failure is logged."""
        for each in self._all():
            if (leases := each.resources.leases) is not None:
                with logged(each.config.name):
                    await leases.refresh()

    def begin(self, left: Sequence[Record], remove: Callable[[Record], Awaitable[None]]) -> None:
        """Have those that an earlier daemon `left` removed, then make as many as are wanted."""
        self._left = {each.device_mark: each for each in left}
        self._background.spawn(
            self._keep([self._background.spawn(self._remove_left(each, remove)) for each in left])
        )

    async def _remove_left(self, record: Record, remove: Callable[[Record], Awaitable[None]]) -> None:
        with logged(record.config.name):
            await remove(record)
        self._left.pop(record.device_mark, None)

    async def _keep(self, removing: Sequence["asyncio.Task[None]"]) -> None:
        if removing:
            await asyncio.wait(removing)
        while self._wanted is not None:
            self._changed.clear()
            if not self._context.budget.has_room(0) and self._ready:
                # Devices have more than the budget leaves for this many.
                await self._end(self._take_out())
            elif len(self._ready) >= self._wanted.number:
                await self._changed.wait()
            elif self._pause_s:
                pause_s, self._pause_s = self._pause_s, 0.0
                await asyncio.sleep(pause_s)
            else:
                await self._make_one(self._wanted.shape)

    def _take_out(self) -> PreparedParts:
        prepared, watch = self._ready.popitem()
        watch.cancel()
        return prepared

    async def _make_one(self, shape: DeviceConfig) -> None:
        """Make one, or say why not and have the next one wait."""
        reason = ""
        needed_bytes = memory_of(shape, 0)
        if not self._context.budget.has_room(needed_bytes):
            reason = f"memory_max leaves less than the {mib(needed_bytes)} that one needs"
        else:
            await self._after_adds()
            self._delays.started()
            reason = await self._try(PreparedParts(shape, self._context))
        self._say(reason)
        if reason:
            self._pause_s = self._delays.ended()

    async def _try(self, made: PreparedParts) -> str:
        self._made = made
        try:
            await prepare(made)
        except _FAILURES as error:
            self._end_soon(made)
            return without_name(made.config.name, one_line(error))
        except BaseException:
            self._ending.add(made)
            raise
        finally:
            self._made = None
        self._ready[made] = self._background.spawn(self._until_worker_ends(made))
        return ""

    async def _after_adds(self) -> None:
        """Return when no add runs, since a user waits for that, or at the latest after `ADD_PATIENCE_S`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ADD_PATIENCE_S):
                while running := self._adds():
                    await asyncio.wait(running)

    async def _until_worker_ends(self, prepared: PreparedParts) -> None:
        team = prepared.resources.team
        assert team is not None
        worker = await team.ended()
        del self._ready[prepared]
        self._pause_s = self._delays.ended()
        _log.warning("%s: %s; another takes its place", prepared.config.name, worker.obituary())
        # Not awaited here: `end` cancels this task.
        self._end_soon(prepared)
        self._changed.set()

    def _end_soon(self, prepared: PreparedParts) -> None:
        self._ending.add(prepared)
        self._background.spawn(self._end(prepared))

    async def _end(self, prepared: PreparedParts) -> None:
        """Remove it; one whose kernel device stays is tried again at the daemon's end, and by the next daemon."""
        self._ending.add(prepared)
        with logged(prepared.config.name):
            await discard(prepared)
            self._ending.discard(prepared)

    def _say(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            _log.warning(
                "%d of %d prepared devices: %s; trying again", len(self._ready), self.wanted_count, trouble
            )
        elif self._trouble and not trouble:
            _log.info("devices are prepared again")
        self._trouble = trouble

    async def end(self) -> None:
        """Remove all; what stays is left to the next daemon."""
        self._wanted = None
        self._background.cancel()
        # A task that is cancelled while it makes one has put it among those that end.
        await asyncio.gather(*self._background.tasks, return_exceptions=True)
        while self._ready:
            self._ending.add(self._take_out())
        try:
            await asyncio.wait_for(asyncio.gather(*map(self._end, list(self._ending))), END_DEADLINE_S)
        except TimeoutError:
            _log.error(
                "prepared devices are not removed after %.0f s: left to the next daemon", END_DEADLINE_S
            )
