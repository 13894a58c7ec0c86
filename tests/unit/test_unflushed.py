"""The copies of answered writes: each byte is written again once, as the last write has left it."""

import random

import pytest

from ublkpool.backends.nbd.unflushed import Kept, Unflushed

SIZE_BYTES = 4096


def contents(parts: list[Kept]) -> bytearray:
    """A device of 0xFF after these parts, which must not overlap."""
    device = bytearray(b"\xff" * SIZE_BYTES)
    written: set[int] = set()
    for each in parts:
        touched = set(range(each.offset, each.end))
        assert touched and not touched & written, "each byte once"
        written |= touched
        device[each.offset : each.end] = bytes(each.length) if each.data is None else each.data
    return device


@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_again_is_what_the_writes_have_left(seed: int) -> None:
    draw = random.Random(seed)
    unflushed, expected = Unflushed(1 << 20), bytearray(b"\xff" * SIZE_BYTES)
    for number in range(draw.randrange(1, 60)):
        length = draw.choice([1, 2, 16, 100, 1000])
        offset = draw.randrange(SIZE_BYTES - length)
        data = None if draw.random() < 0.3 else bytes([number + 1]) * length
        unflushed.add(offset, length, None if data is None else memoryview(data))
        expected[offset : offset + length] = data or bytes(length)
    assert contents(unflushed.newest()) == expected


def test_a_write_that_is_not_overwritten_stays_whole() -> None:
    unflushed = Unflushed(1 << 20)
    unflushed.add(0, 100, memoryview(b"a" * 100))
    unflushed.add(100, 100, None, no_hole=True)
    unflushed.add(40, 20, memoryview(b"b" * 20))
    shown = [(each.offset, each.length, each.data and bytes(each.data[:1])) for each in unflushed.newest()]
    assert shown == [(0, 40, b"a"), (40, 20, b"b"), (60, 40, b"a"), (100, 100, None)]
    assert unflushed.newest()[-1].no_hole
    unflushed.flushed(unflushed.mark)
    assert unflushed.newest() == []
