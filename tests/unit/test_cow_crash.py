"""The copy-on-write disk, ended at every I/O: what a killed process or a power failure leaves is what was promised."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.fakes.cow_disk import BLOCK_SECTORS, CowDisk
from ublkpool.bufpool.wire import Flag, Op

DISK_BLOCKS = 12
SECTORS = DISK_BLOCKS * BLOCK_SECTORS
BASE_BYTES = 9 * 4096 + 700
"""The base ends inside a block, and the disk is larger."""
OUTCOMES_MAX = 10
Send = Callable[[CowDisk], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[CowDisk]:
    made = CowDisk(tmp_path, random.Random(1).randbytes(BASE_BYTES), DISK_BLOCKS * 4096)
    made.learn(0, SECTORS)
    yield made
    made.close()


def _write(first: int, count: int, *, fua: bool = False) -> Send:
    return lambda disk: disk.write(first, count, fua=fua)


def _clear(op: Op, first: int, count: int, flags: int = 0) -> Send:
    return lambda disk: disk.clear(op, first, count, flags=flags)


def _flush(disk: CowDisk) -> None:
    disk.flush()


SCRIPTS: dict[str, list[list[Send]]] = {
    "a block, flushed, written again": [[_write(8, 8)], [_flush], [_write(8, 8)], [_flush]],
    "parts of blocks of the base": [[_write(3, 2)], [_flush], [_write(6, 12)], [_flush]],
    "the base's last part": [[_write(75, 2)], [_write(73, 1)], [_flush], [_write(80, 4)]],
    "fua": [
        [_write(8, 8, fua=True)],
        [_write(8, 8, fua=True)],
        [_write(9, 2, fua=True)],
        [_write(20, 8, fua=True)],
    ],
    "fua beside changes that no flush has covered": [
        [_write(8, 8)],
        [_flush],
        [_write(16, 8)],
        [_write(8, 8, fua=True)],
        [_write(24, 4, fua=True)],
    ],
    "discarded and written again": [
        [_write(0, 32)],
        [_flush],
        [_clear(Op.DISCARD, 4, 20)],
        [_write(8, 8)],
        [_flush],
        [_clear(Op.DISCARD, 0, 32)],
        [_flush],
        [_write(10, 2)],
    ],
    "zeroes": [
        [_write(0, 24)],
        [_flush],
        [_clear(Op.WRITE_ZEROES, 3, 14)],
        [_clear(Op.WRITE_ZEROES, 30, 12, Flag.FUA)],
        [_clear(Op.WRITE_ZEROES, 0, 24, Flag.NOUNMAP)],
        [_flush],
    ],
    "a flush beside writes": [
        [_write(0, 8), _flush, _write(8, 8), _write(16, 3), _flush],
        [_write(8, 8), _clear(Op.DISCARD, 16, 16), _flush, _write(0, 16)],
    ],
    "the same block at the same time": [
        [_write(1, 2), _write(2, 3), _write(0, 8), _clear(Op.DISCARD, 0, 8)],
        [_flush],
    ],
}


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_end_at_every_moment_leaves_what_was_promised(disk: CowDisk, script: str, order: str) -> None:
    looked = 0
    for together in SCRIPTS[script]:
        for send in together:
            send(disk)
        while disk.flying:
            disk.check_kill(0, SECTORS)
            looked += disk.check_power_failures(0, SECTORS, OUTCOMES_MAX)
            disk.finish(0 if order == "first" else -1)
        disk.check_kill(0, SECTORS)
        looked += disk.check_power_failures(0, SECTORS, OUTCOMES_MAX)
    assert not (disk.changes or disk.reads or disk.flushes or disk.failed)
    assert looked > 50


@pytest.mark.parametrize("done", range(6))
def test_what_a_killed_flush_wrote_is_not_taken_for_synced(disk: CowDisk, done: int) -> None:
    disk.write(8, 8)
    disk.settle()
    disk.flush()
    for _ in range(min(done, len(disk.flying))):
        disk.finish(0)
    disk.killed()
    # The flush is sent again, and the write is answered before it.
    disk.write(8, 8, fua=True)
    while disk.flying:
        disk.finish(-1)
        disk.check_power_failures(0, SECTORS, OUTCOMES_MAX)
    assert not (disk.changes or disk.flushes or disk.failed)
