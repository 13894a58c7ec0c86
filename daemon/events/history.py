"""The newest events in memory, bounded in bytes: what followers and `ublkpool events` are shown."""

from bisect import bisect_right
from collections.abc import Iterable
from operator import attrgetter

from ublkpool.daemon.events.event import Event, encode


class Kept:
    """An event and its line."""

    __slots__ = ("device", "line", "seq", "time")

    def __init__(self, event: Event) -> None:
        self.seq, self.time, self.device = event.seq, event.time, event.device
        self.line = encode(event)


_seq = attrgetter("seq")


class History:
    """Events in the order of their numbers."""

    def __init__(self, bytes_max: int, events: Iterable[Event] = ()) -> None:
        self._bytes_max = bytes_max
        self._kept: list[Kept] = []
        self._bytes = 0
        self.gone_seq = 0
        """The number of the newest event that is kept no more; 0 if there is none."""
        for each in events:
            self.append(Kept(each))

    def append(self, kept: Kept) -> None:
        """Keep the event; the oldest ones go if there are too many bytes."""
        self._kept.append(kept)
        self._bytes += len(kept.line)
        count = 0
        while self._bytes > self._bytes_max and count < len(self._kept) - 1:
            oldest = self._kept[count]
            self._bytes -= len(oldest.line)
            self.gone_seq = oldest.seq
            count += 1
        # A deque would make `after` walk; this moves 8 bytes for each event that is kept.
        del self._kept[:count]

    def after(self, seq: int, most: int) -> list[Kept]:
        """The first `most` events with a higher number, oldest first."""
        start = bisect_right(self._kept, seq, key=_seq)
        return self._kept[start : start + most]

    @property
    def last_seq(self) -> int:
        """The number of the newest event; 0 if there is none."""
        return self._kept[-1].seq if self._kept else self.gone_seq

    @property
    def size_bytes(self) -> int:
        """Of all lines."""
        return self._bytes
