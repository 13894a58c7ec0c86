"""What the daemon calls when something has happened: `Events.tell` logs a line and records an event.

Owns the numbers of the events and what waits to be written; `keeper.py` writes.  No call waits.  Runs on the
supervisor's asyncio loop.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ublkpool.daemon.events.event import Event, make_event
from ublkpool.daemon.events.flood import WINDOW_S, FloodLimit
from ublkpool.daemon.events.history import History, Kept
from ublkpool.daemon.events.kinds import Details, EventsSuppressed, Severity

BYTES_DEFAULT = 1 << 20
_LEVELS: dict[Severity, int] = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


LOOKED_AT_MAX = 1024
"""Events that one call of `Events.after` looks at, so that it costs the loop a moment, however few are asked for."""


class Slice(NamedTuple):
    """Events after a number, and the last number that was looked at: the number itself if there is no newer event."""

    lines: Sequence[bytes]
    last_seq: int


class Events:
    """The events of one daemon."""

    def __init__(
        self,
        bytes_max: int = BYTES_DEFAULT,
        earlier: Sequence[Event] = (),
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`earlier` are those of the daemons before; `clock` and `wall` are in seconds."""
        self._history = History(bytes_max, earlier)
        self._flood = FloodLimit(clock)
        self._clock, self._wall = clock, wall
        # Also above numbers that an earlier daemon gave to events which reached no file: it gave them later than this
        # many milliseconds after the epoch, and not a thousand in a second.
        self._next_seq = max(self._history.last_seq + 1, int(wall() * 1000))
        self._unwritten: deque[Kept] = deque()
        self._unwritten_bytes = 0
        # Events that come when so many bytes wait never get into the file.
        self._unwritten_bytes_max = bytes_max // 2
        self._lost = 0
        self.coming = asyncio.Event()
        """Set by the next event; the one after that has another."""
        self.stirred = asyncio.Event()
        """Set when there is something for the keeper: an event to write, or one that came too often."""

    def of(self, device: str) -> "DeviceEvents":
        """The same for one device."""
        return DeviceEvents(self, device)

    def tell(
        self,
        log: logging.Logger,
        details: Details,
        text: str,
        *,
        device: str = "",
        severity: Severity | None = None,
        place: str = "",
    ) -> None:
        """Log the text, after `place` or the device's name, and record the event."""
        prefix = place or device
        log.log(_LEVELS[severity or details.severity], "%s", f"{prefix}: {text}" if prefix else text)
        self.record(details, text, device=device, severity=severity)

    def record(
        self, details: Details, text: str, *, device: str = "", severity: Severity | None = None
    ) -> None:
        """Record the event without a line in the log: another line says the same."""
        self.note_suppressed()
        if self._flood.admits(details.code, device):
            self._append(details, text, device, severity)
        self.stirred.set()

    def note_suppressed(self) -> None:
        """Record how many events came too often, once their window has ended."""
        for each in self._flood.due():
            of = each.code or "any"
            text = f"{each.left_out} more events {of} were not recorded"
            self._append(EventsSuppressed(of=of, count=each.left_out, seconds=WINDOW_S), text, each.device)

    def suppressed_due_s(self) -> float | None:
        """In how many seconds `note_suppressed` is to be called; None while no event came too often."""
        at_s = self._flood.next_s()
        return None if at_s is None else max(0.0, at_s - self._clock())

    def after(self, seq: int, names: frozenset[str] | None = None, since: str = "", most: int = 64) -> Slice:
        """At most `most` events with a higher number, of these devices, that are not older than the time `since`.

        There may be more of them while any event is newer than the last one looked at.
        """
        lines: list[bytes] = []
        last = seq
        for each in self._history.after(seq, max(most, LOOKED_AT_MAX)):
            last = each.seq
            if (names is None or each.device in names) and each.time >= since:
                lines.append(each.line)
                if len(lines) == most:
                    break
        return Slice(lines, last)

    @property
    def gone_seq(self) -> int:
        """The number of the newest event that is in memory no more."""
        return self._history.gone_seq

    def unwritten(self) -> list[Kept]:
        """What waits for the file."""
        return list(self._unwritten)

    def written(self, last_seq: int) -> None:
        """The file has the events up to this number."""
        while self._unwritten and self._unwritten[0].seq <= last_seq:
            self._unwritten_bytes -= len(self._unwritten.popleft().line)

    def take_lost(self) -> int:
        """The number of events that no file has, since the last call."""
        lost, self._lost = self._lost, 0
        return lost

    def _append(self, details: Details, text: str, device: str, severity: Severity | None = None) -> None:
        kept = Kept(make_event(self._next_seq, self._wall(), device, details, text, severity))
        self._next_seq += 1
        self._history.append(kept)
        if self._unwritten_bytes + len(kept.line) <= self._unwritten_bytes_max:
            self._unwritten.append(kept)
            self._unwritten_bytes += len(kept.line)
        else:
            self._lost += 1
        came, self.coming = self.coming, asyncio.Event()
        came.set()


class DeviceEvents:
    """The events of one device."""

    def __init__(self, events: Events, device: str) -> None:
        self._events, self._device = events, device

    def tell(
        self,
        log: logging.Logger,
        details: Details,
        text: str,
        *,
        severity: Severity | None = None,
        place: str = "",
    ) -> None:
        """See `Events.tell`; the line in the log begins with `place` or the device's name."""
        self._events.tell(log, details, text, device=self._device, severity=severity, place=place)

    def record(self, details: Details, text: str, *, severity: Severity | None = None) -> None:
        """See `Events.record`."""
        self._events.record(details, text, device=self._device, severity=severity)
