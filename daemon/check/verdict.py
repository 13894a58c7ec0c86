"""Which promise a wrong block breaks, from what the disk went through since the block was right.  Pure."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ublkpool.daemon.check.promises import Broken
from ublkpool.daemon.check.shadow import Change, Wrong

EventKind = Literal["kill", "stop", "fence", "power"]
_TELLING = (
    *("fence", "predecessor", "fua", "flush", "survives-kill", "survives-stop"),
    *("offset", "neighbours", "zeroes", "last-write"),
)
"""The promises about data, the most telling first."""
_RECENT = 3
"""Events back to which a block with foreign data is traced."""
_SURVIVAL = {"kill": "survives-kill", "stop": "survives-stop", "power": "flush"}


class Event(NamedTuple):
    """Something that the check did to the backend, and when by the shadow's clock."""

    kind: EventKind
    clock: int
    words: str
    hit: tuple[tuple[int, int], ...] = ()
    """The blocks (first, count) of changes that were running."""

    def has_hit(self, block: int) -> bool:
        """Whether a change of this block was running."""
        return any(first <= block < first + count for first, count in self.hit)


def broken_by(wrongs: Sequence[Wrong], events: list[Event], block_bytes: int) -> Broken:
    """The most telling of the promises that these blocks break, how, and which others they break.

    Raises `ValueError` without a wrong block.
    """
    by_promise: dict[str, list[Wrong]] = {}
    for wrong in wrongs:
        by_promise.setdefault(_promise(wrong, events), []).append(wrong)
    promise, *others = sorted(by_promise, key=_TELLING.index)
    words = _words(by_promise[promise][0], block_bytes)
    if more := len(by_promise[promise]) - 1:
        words += f"; {more} more like it"
    for other in others:
        words += f"; also broken: {other}, in {len(by_promise[other])} blocks"
    return Broken(promise, words)


def _words(wrong: Wrong, block_bytes: int) -> str:
    block, found, expected, was_seen, neighbour, _ = wrong
    where = f"block {block} (offset {block * block_bytes})"
    if expected.kind == "initial":
        due = "no request touched it, so it should hold what it held before the check"
    else:
        due = f"should hold {_due(expected)}"
    seen = ", which an earlier read found there" if was_seen and expected.kind != "initial" else ""
    beside = f", after {neighbour} of blocks beside it" if neighbour else ""
    return f"{where} {due}{seen}, and holds {found.words}{beside}"


def _due(expected: Change) -> str:
    if expected.kind == "zeros":
        return f"the zeros of {expected}"
    return f"the data of {expected}"


def _promise(wrong: Wrong, events: list[Event]) -> str:
    found, expected = wrong.found, wrong.expected
    if found.is_fence_mark:
        return "fence"
    if (
        found.change is not None
        and found.block == wrong.block
        and (late := _late(found.change, expected, events))
    ):
        return late
    if found.block is not None and found.block != wrong.block:
        # A late write takes what its buffer holds by then, which is another request's data.
        is_late = any(each.kind == "fence" and each.has_hit(wrong.block) for each in events[-_RECENT:])
        return "fence" if is_late else "offset"
    # What a read found after an end was not lost by that end.
    right_at = max(expected.end or 0, wrong.seen_at)
    since = [each for each in events if each.kind in _SURVIVAL and each.clock > right_at]
    # A loss leaves other blocks wrong as well, which are not beside cleared ones; one of them is enough to tell it.
    if since and wrong.neighbour is None:
        return _lost(expected, since)
    if wrong.was_seen or wrong.neighbour is not None:
        return "neighbours"
    return "zeroes" if expected.kind == "zeros" else "last-write"


def _lost(expected: Change, since: list[Event]) -> str:
    """The strongest promise about what survives that this loss breaks."""
    if expected.kind == "data" and expected.fua:
        return "fua"
    # A FLUSH that the end interrupted is answered by the successor, when the write is lost already.
    if 0 < expected.flushed_at < since[0].clock:
        return "flush"
    return _SURVIVAL[since[0].kind]


def _late(found: Change, expected: Change, events: list[Event]) -> str:
    """The promise broken by a request that ran when a process or an epoch ended, and took effect after that."""
    for each in reversed(events):
        ran = found.start < each.clock and (found.end is None or found.end > each.clock)
        if ran and expected.start > each.clock:
            return "fence" if each.kind == "fence" else "predecessor"
    return ""
