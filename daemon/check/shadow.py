"""What each block of the disk may hold: the shadow model of a check.  Pure.

A change (a write, a WRITE_ZEROES, a DISCARD) that was answered excludes every change that had been answered before it
began; changes that ran at the same time may have taken effect in either order.  A read may return each change that was
possible at some moment between its start and its end; beside a change of the block that runs it may return parts of
each, since a file's read and write take no turns.
"""

import struct
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Literal, NamedTuple

_HEAD = struct.Struct("<QQ")
_REMEMBERED_MAX = 100_000
"""Changes that can be named in a report."""
_NEIGHBOURS_MAX = 1000
_BESIDE_BLOCKS = 8
WRONG_MAX = 64
FENCE_MARK = 0xFFFF_FFFF
"""In place of a change's number, in buffers of an epoch that is over."""
Kind = Literal["data", "zeros", "anything", "initial"]


class Change:
    """One request that changes blocks, and when it was running by the shadow's clock."""

    __slots__ = ("count", "end", "first", "flushed_at", "fua", "kind", "number", "start")

    def __init__(self, number: int, kind: Kind, first: int, count: int, fua: bool = False) -> None:
        self.number, self.kind, self.first, self.count, self.fua = number, kind, first, count, fua
        self.start = 0
        self.end: int | None = None
        self.flushed_at = 0
        """When a FLUSH that covers it was answered; 0: none was."""

    def __str__(self) -> str:
        name = {"data": "write", "zeros": "WRITE_ZEROES", "anything": "DISCARD", "initial": "nothing"}[
            self.kind
        ]
        return f"{name} #{self.number}" if self.number else "what it held before the check"


class Reading:
    """A read under way: the changes that its blocks may show."""

    def __init__(self, first: int, start: int, possible: list[tuple[Change, ...]]) -> None:
        self.first, self.start, self.possible = first, start, possible
        self.later: list[Change] = []
        """Changes that began after the read did."""


class Found(NamedTuple):
    """The content of a block in words; `change` and `block` if a write of this check made it."""

    words: str
    change: Change | None = None
    block: int | None = None
    is_fence_mark: bool = False


class Wrong(NamedTuple):
    """A block that a read returned with content that it cannot have."""

    block: int
    found: Found
    expected: Change
    """The last change that is answered, of those that the block may hold."""
    was_seen: bool
    """Whether an earlier read found that change there."""
    neighbour: Change | None = None
    """A later WRITE_ZEROES or DISCARD of the blocks beside it, if the block holds zeros."""
    seen_at: int = 0
    """By the shadow's clock, when the last read began that found `expected` there; 0 if none did."""


class Shadow:
    """The model of one disk."""

    def __init__(self, block_bytes: int, nonce: int) -> None:
        """`nonce` (32 bits) tells this check's data from an earlier one's."""
        self.block_bytes = block_bytes
        self.clock = 0
        self._repeat = block_bytes // _HEAD.size
        self._nonce = nonce
        self._initial = Change(0, "initial", 0, 0)
        self._initial.end = 0
        self._now: tuple[Change, ...] = (self._initial,)
        self._possible: dict[int, tuple[Change, ...]] = {}
        self._durable: dict[int, tuple[Change, ...]] = {}
        self._learnt: dict[int, bytes] = {}
        self._seen: dict[int, tuple[Change, int]] = {}
        self._changes: dict[int, Change] = {}
        self._unflushed: dict[int, Change] = {}
        self._readings: list[Reading] = []
        self.is_volatile = False
        """Whether the disk has a cache that loses what was not flushed when the power fails."""

    def block_data(self, number: int, block: int) -> bytes:
        """What the write with this number puts into this block."""
        return _HEAD.pack(self._nonce << 32 | number, block) * self._repeat

    def data(self, change: Change) -> bytes:
        """All data of a write."""
        blocks = range(change.first, change.first + change.count)
        return b"".join([self.block_data(change.number, block) for block in blocks])

    def tick(self) -> int:
        """The next moment."""
        self.clock += 1
        return self.clock

    def begin(self, change: Change) -> None:
        """The change was sent."""
        change.start = self.tick()
        self._changes[change.number] = change
        if len(self._changes) > _REMEMBERED_MAX:
            del self._changes[next(iter(self._changes))]
        for block in range(change.first, change.first + change.count):
            self._possible[block] = (*self._possible.get(block, self._now), change)
            self._durable[block] = (*self._durable.get(block, self._now), change)
        for reading in self._readings:
            reading.later.append(change)

    def end(self, change: Change, failed: bool = False) -> None:
        """The change was answered; one that failed may have taken effect or not."""
        change.end = self.tick()
        if failed:
            return
        for block in range(change.first, change.first + change.count):
            self._possible[block] = _without_older(self._possible[block], change)
        if change.fua or not self.is_volatile:
            self._make_durable(change)
        else:
            self._unflushed[change.number] = change

    def flushed(self, start: int) -> None:
        """A FLUSH that began at `start` was answered: what was answered before is durable."""
        now = self.tick()
        for change in [*self._unflushed.values()]:
            if change.end is not None and change.end < start:
                change.flushed_at = now
                del self._unflushed[change.number]
                self._make_durable(change)

    def _make_durable(self, change: Change) -> None:
        for block in range(change.first, change.first + change.count):
            self._durable[block] = _without_older(self._durable[block], change)

    def lost_power(self) -> None:
        """What is not durable may be lost."""
        self._possible = dict(self._durable)
        # A later FLUSH does not bring them back.
        self._unflushed.clear()
        # These reads had no answer, so the next process executes them.
        for reading in self._readings:
            reading.possible = [
                (*possible, *self._durable.get(block, self._now))
                for block, possible in enumerate(reading.possible, reading.first)
            ]

    def begin_read(self, first: int, count: int) -> Reading:
        """A read was sent."""
        possible = [self._possible.get(block, self._now) for block in range(first, first + count)]
        reading = Reading(first, self.tick(), possible)
        self._readings.append(reading)
        return reading

    def give_up_read(self, reading: Reading) -> None:
        """The read failed."""
        self._readings.remove(reading)

    def end_read(self, reading: Reading, data: bytes | bytearray) -> list[Wrong]:
        """The blocks that the read returned with impossible content, at most `WRONG_MAX`."""
        wrong: list[Wrong] = []
        self._readings.remove(reading)
        size, view = self.block_bytes, memoryview(data)
        for index, possible in enumerate(reading.possible):
            block = reading.first + index
            held = bytes(view[index * size : (index + 1) * size])
            later = [each for each in reading.later if each.first <= block < each.first + each.count]
            match = self._match(held, block, (*possible, *later))
            if match is None:
                if self._is_mixed(held, block, (*possible, *later), reading.start):
                    continue
                wrong.append(self._wrong(held, block, possible))
                if len(wrong) == WRONG_MAX:
                    break
                continue
            if match.kind != "anything":
                self._seen[block] = match, reading.start
            if match.end is not None and len(possible) > 1:
                self._observed(block, match, reading.start)
        return wrong

    def _observed(self, block: int, match: Change, start: int) -> None:
        """A read found this answered change, so it came after all that were answered before the read began."""
        possible = self._possible.get(block, self._now)
        if match in possible and match.kind == "data":
            kept = (each for each in possible if each is match or each.end is None or each.end > start)
            self._possible[block] = tuple(kept)

    def _match(self, held: bytes, block: int, changes: Iterable[Change]) -> Change | None:
        # What says least comes last, so that a read teaches as much as it can.
        for change in sorted(changes, key=lambda each: _ORDER[each.kind]):
            if change.kind == "data" and held == self.block_data(change.number, block):
                return change
            if change.kind == "zeros" and not any(held):
                return change
            if change.kind == "anything":
                return change
            if change.kind == "initial" and self._is_initial(held, block):
                return change
        return None

    def _is_mixed(self, held: bytes, block: int, changes: Sequence[Change], start: int) -> bool:
        """Whether one of the changes ran beside a read from `start` on, and each 8 bytes are of one of them."""
        if not any(each.end is None or each.end > start for each in changes):
            return False
        contents = [_words(self._content(each, block)) for each in changes]
        return all(word in found for word, *found in zip(_words(held), *contents, strict=True))

    def _content(self, change: Change, block: int) -> bytes:
        """What the block holds after this change, which is no DISCARD."""
        if change.kind == "data":
            return self.block_data(change.number, block)
        known = self._learnt.get(block) if change.kind == "initial" else None
        return known or bytes(self.block_bytes)

    def _is_initial(self, held: bytes, block: int) -> bool:
        known = self._learnt.get(block)
        if known is None and block not in self._possible:
            self._learnt[block] = held
        return known is None or known == held

    def _wrong(self, held: bytes, block: int, possible: tuple[Change, ...]) -> Wrong:
        answered = [each for each in possible if each.end is not None]
        # After a power failure a block may hold what was flushed or anything later; it must not hold anything older.
        durable = [each for each in answered if each.flushed_at or each.fua]
        expected = max(durable or answered or possible, key=lambda each: each.end or 0)
        seen, seen_at = self._seen.get(block, (None, 0))
        was_seen = expected.kind == "initial" or seen is expected
        neighbour = None if any(held) else self._cleared_beside(block, expected)
        found = self._identify(held, block)
        return Wrong(block, found, expected, was_seen, neighbour, seen_at if seen is expected else 0)

    def _cleared_beside(self, block: int, expected: Change) -> Change | None:
        for each in islice(reversed(self._changes.values()), _NEIGHBOURS_MAX):
            is_beside = each.first - _BESIDE_BLOCKS <= block < each.first + each.count + _BESIDE_BLOCKS
            if each.kind in ("zeros", "anything") and each.start > expected.start and is_beside:
                return each
        return None

    def _identify(self, held: bytes, block: int) -> Found:
        if not any(held):
            return Found("zeros")
        tag, at = _HEAD.unpack_from(held)
        number = tag & 0xFFFF_FFFF
        if tag >> 32 == self._nonce and held == _HEAD.pack(tag, at) * self._repeat:
            if number == FENCE_MARK:
                return Found("the buffer of a request whose epoch is over", is_fence_mark=True)
            change = self._changes.get(number)
            where = "" if at == block else f", which belongs to block {at}"
            return Found(f"the data of write #{number}{where}", change, at)
        if held == self._learnt.get(block):
            return Found("what it held before the check")
        if tag >> 32 == self._nonce:
            return Found(f"parts of {self._parts(held)}")
        return Found(f"bytes that were never written, {held[:8].hex(' ')} ...")

    def _parts(self, held: bytes) -> str:
        """Whose data a block holds that is of more than one write."""
        cells = (_HEAD.unpack_from(held, at)[0] for at in range(0, len(held), _HEAD.size))
        found = [
            f"write #{tag & 0xFFFF_FFFF}" if tag >> 32 == self._nonce else "other bytes" for tag in cells
        ]
        *others, last = dict.fromkeys(found)
        return f"{', '.join(others)} and {last}" if others else last

    def touched(self) -> list[tuple[int, int]]:
        """The runs of blocks that a change or a read has touched, as (first, count)."""
        runs: list[tuple[int, int]] = []
        for block in sorted(self._possible.keys() | self._learnt.keys()):
            if runs and runs[-1][0] + runs[-1][1] == block:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        return runs

    def forget(self) -> None:
        """The disk has ended, and the next begins with unknown content."""
        self._possible, self._durable, self._learnt, self._seen = {}, {}, {}, {}
        self._changes, self._unflushed, self._readings = {}, {}, []


_ORDER = {"data": 0, "zeros": 1, "initial": 2, "anything": 3}


def _words(content: bytes) -> memoryview:
    return memoryview(content).cast("Q")


def _without_older(possible: tuple[Change, ...], change: Change) -> tuple[Change, ...]:
    return tuple(each for each in possible if each is change or each.end is None or each.end > change.start)
