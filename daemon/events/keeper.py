"""Writes the events into the state directory's file, beside everything else that the daemon does.

Owns when that is tried.  A separate process makes each write, since a file system may keep its caller waiting for ever.
A full, read-only or hanging disk costs events, which are counted, and nothing else.  Runs on the supervisor's asyncio
loop.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ublkpool.daemon.errors import DaemonError, one_line
from ublkpool.daemon.events.event import Event
from ublkpool.daemon.events.event_file import Append, load
from ublkpool.daemon.events.history import Kept
from ublkpool.daemon.events.kinds import DaemonStarted, DaemonStopped, EventsLost
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.plain_call import Call

GATHER_S = 0.1
"""A deed has several events: they are written at once."""
PAUSE_S = 1.0
RETRY_MAX_S = 30.0
WRITE_DEADLINE_S = 10.0
FLUSH_S = 3.0
BATCH_BYTES = 256 << 10
TITLE = "ublkpool-events"
_OWNER = "the events"
_log = logging.getLogger("ublkpool.events")


class Runner(Protocol):
    """Runs a function in a separate process; see `ControlRunner`."""

    async def look(
        self,
        owner: str,
        what: str,
        work: Call,
        result: type[None],
        deadline_s: float = WRITE_DEADLINE_S,
        *,
        title: str = TITLE,
    ) -> None:
        """Raises `DaemonError` if the function fails, takes longer than `deadline_s`, or too many of `owner` hang."""


def earlier_events(directory: Path, bytes_max: int) -> Sequence[Event]:
    """The events of the daemons before; none, and a line in the log, if they cannot be read."""
    try:
        return load(directory, bytes_max)
    except OSError as error:
        _log.warning("%s: the events of earlier daemons cannot be read: %s", directory, one_line(error))
        return ()


def has_died(earlier: Sequence[Event]) -> bool:
    """Whether the last daemon of these events has told no end."""
    ends = (DaemonStarted.code, DaemonStopped.code)
    last = next((each.code for each in reversed(earlier) if each.code in ends), "")
    return last == DaemonStarted.code


class EventKeeper:
    """Writes one daemon's events."""

    def __init__(self, events: Events, directory: Path, runner: Runner, bytes_max: int) -> None:
        self._events, self._directory, self._runner = events, directory, runner
        self._bytes_max = bytes_max
        self._turn = asyncio.Lock()
        self._trouble = ""
        self._pause_s = PAUSE_S

    async def keep(self) -> None:
        """Write what is to be written, until cancelled."""
        while True:
            if not self._events.unwritten():
                await self._stirred()
            await asyncio.sleep(GATHER_S)
            await self._write_waiting()
            await asyncio.sleep(self._pause_s)

    async def flush(self) -> None:
        """At the daemon's end: write what is left, within `FLUSH_S`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                while self._events.unwritten() and await self._write():
                    pass

    async def _write_waiting(self) -> None:
        """Write what waits now, in as many batches as that takes; a write that fails ends it."""
        waiting = self._events.unwritten()
        last_seq = waiting[-1].seq if waiting else 0
        while waiting and waiting[0].seq <= last_seq and await self._write():
            waiting = self._events.unwritten()

    async def _stirred(self) -> None:
        """Return when an event may wait to be written."""
        self._events.stirred.clear()
        try:
            await asyncio.wait_for(self._events.stirred.wait(), self._events.suppressed_due_s())
        except TimeoutError:
            self._events.note_suppressed()

    async def _write(self) -> bool:
        """Write one batch; whether it is in the file."""
        async with self._turn:
            batch = _batch(self._events.unwritten(), min(BATCH_BYTES, self._bytes_max // 4))
            if not batch:
                return True
            append = Call(Append(self._directory, [each.line for each in batch], self._bytes_max))
            try:
                await self._runner.look(
                    _OWNER, "writing the events", append, type(None), WRITE_DEADLINE_S, title=TITLE
                )
            except DaemonError as error:
                self._note_trouble(one_line(error))
                return False
            self._events.written(batch[-1].seq)
            self._end_trouble()
            return True

    def _note_trouble(self, reason: str) -> None:
        self._pause_s = min(RETRY_MAX_S, 2 * self._pause_s)
        if reason != self._trouble:
            self._trouble = reason
            _log.warning("%s: events cannot be written: %s; trying again", self._directory, reason)

    def _end_trouble(self) -> None:
        self._pause_s = PAUSE_S
        if lost := self._events.take_lost():
            reason = self._trouble or "they came too fast"
            self._events.tell(
                _log, EventsLost(count=lost, reason=reason), f"{lost} events are in no file: {reason}"
            )
        self._trouble = ""


def _batch(events: Sequence[Kept], bytes_max: int) -> list[Kept]:
    """The first events that have this many bytes together, or the first one."""
    size = 0
    for count, each in enumerate(events):
        size += len(each.line)
        if size > bytes_max and count:
            return list(events[:count])
    return list(events)
