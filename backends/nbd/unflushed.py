"""The writes that a server has answered and may lose when it dies, because no FLUSH has covered them.

Pure.  A file system that was told that its writes are done sends them again only if a FLUSH fails, so a server that
dies and comes back without them would corrupt the disk silently.  The backend keeps copies until a FLUSH is answered
and writes them again: each byte once, as the last write has left it.
"""

from collections import deque
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple


class Kept(NamedTuple):
    """An answered write; `data` is None for zeros.  Bytes on the device."""

    number: int
    offset: int
    length: int
    data: bytes | memoryview | None
    no_hole: bool = False

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length

    def part(self, start: int, end: int) -> "Kept":
        """The part from `start` to `end` on the device, without a copy of its data."""
        data = self.data
        if data is not None:
            data = memoryview(data)[start - self.offset : end - self.offset]
        return self._replace(offset=start, length=end - start, data=data)


class Unflushed:
    """The kept writes, oldest first."""

    def __init__(self, bytes_max: int) -> None:
        """`bytes_max` 0: none is kept, and `lost` says so after the server's death."""
        self.bytes_max = bytes_max
        self._kept: deque[Kept] = deque()
        self._next = 0
        self._covered = 0
        self.kept_bytes = 0

    def __len__(self) -> int:
        return self._next - self._covered

    def add(self, offset: int, length: int, data: memoryview | None, no_hole: bool = False) -> None:
        """Note a write that the server has answered."""
        if self.bytes_max:
            entry = Kept(self._next, offset, length, None if data is None else bytes(data), no_hole)
            self._kept.append(entry)
            self.kept_bytes += _cost(entry)
        self._next += 1

    @property
    def mark(self) -> int:
        """What a FLUSH that is sent now will cover; for `flushed`."""
        return self._next

    def flushed(self, mark: int) -> None:
        """Forget what an answered FLUSH has covered."""
        self._covered = max(self._covered, mark)
        while self._kept and self._kept[0].number < mark:
            self.kept_bytes -= _cost(self._kept.popleft())

    def forget(self) -> None:
        """Forget all: they are lost, and that has been told."""
        self.flushed(self._next)

    @property
    def is_full(self) -> bool:
        """Whether a FLUSH is due so that the copies can be dropped."""
        return self.bytes_max > 0 and self.kept_bytes >= self.bytes_max

    @property
    def is_over(self) -> bool:
        """Whether no more writes may be sent before a FLUSH has been answered."""
        return self.bytes_max > 0 and self.kept_bytes >= 2 * self.bytes_max

    def newest(self) -> list[Kept]:
        """What the kept writes have left on the device: parts that do not overlap, in order of their offsets.

        An older write must not reach the server again: if it has lost nothing, and the backend is killed before the
        newer write follows, an answered write would be undone.
        """
        waiting = sorted(self._kept, key=lambda each: each.offset, reverse=True)
        edges = sorted({edge for each in self._kept for edge in (each.offset, each.end)})
        present: list[tuple[int, Kept]] = []
        parts: list[Kept] = []
        for start, end in pairwise(edges):
            while waiting and waiting[-1].offset == start:
                heappush(present, (-waiting[-1].number, waiting.pop()))
            while present and present[0][1].end <= start:
                heappop(present)
            if present:
                _append(parts, present[0][1], start, end)
        return parts


def _append(parts: list[Kept], entry: Kept, start: int, end: int) -> None:
    if parts and parts[-1].number == entry.number and parts[-1].end == start:
        start = parts.pop().offset
    parts.append(entry.part(start, end))


def _cost(entry: Kept) -> int:
    # A write of zeros has no data; the constant bounds how many there are.
    return 256 + (entry.length if entry.data is not None else 0)
