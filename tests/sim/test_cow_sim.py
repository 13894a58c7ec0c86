"""Seeded runs of the copy-on-write disk: I/O in any order, short or failed, kills and power failures.

The shadow model of `ublkpool backend check` says what each sector may hold.
"""

import errno
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from support.fakes.cow_disk import BLOCK_SECTORS, SECTOR, CowDisk
from support.fakes.held_ring import FSYNC, WRITE
from support.sim import play as sim_play
from ublkpool.bufpool.engine.cow import MAP_PAGE_COVERS_BYTES
from ublkpool.bufpool.wire import Flag, Op

RUNS = 25
STEPS = 220
BLOCKS = 10
"""The blocks that a run touches: the last of the first page of the map, and as many of the next."""
FIRST = (MAP_PAGE_COVERS_BYTES // SECTOR) - BLOCKS // 2 * BLOCK_SECTORS
SECTORS = BLOCKS * BLOCK_SECTORS
DISK_BYTES = MAP_PAGE_COVERS_BYTES + BLOCKS // 2 * 4096
BASE_BYTES = DISK_BYTES - 2 * 4096 - 1000


def _base(directory: Path) -> Path:
    path = directory / "base"
    with path.open("wb") as file:
        file.truncate(FIRST * SECTOR)
        file.seek(FIRST * SECTOR)
        file.write(random.Random(1).randbytes(BASE_BYTES - FIRST * SECTOR))
    return path


class Run:
    """One seed's run."""

    def __init__(self, seed: int, directory: Path, base: Path) -> None:
        self.rng = random.Random(seed)
        self.counts = Counter[str]()
        self.spared = -1
        """The request whose map write failed: writing the old map back does not fail as well."""
        self.disk = CowDisk(directory, base, DISK_BYTES, rng=self.rng)

    def play(self) -> Counter[str]:
        """Returns how often what happened."""
        disk, rng = self.disk, self.rng
        disk.learn(FIRST, SECTORS)
        try:
            for _ in range(STEPS):
                self._step(rng.random())
            disk.settle()
            disk.learn(FIRST, SECTORS)
            assert not (disk.changes or disk.reads or disk.flushes)
            self.counts["failed"] = disk.failed
        finally:
            disk.close()
        return self.counts

    def _step(self, chance: float) -> None:
        if chance < 0.02:
            self._end()
        elif chance < 0.35 and self.disk.free_tag() is not None:
            self._send()
        elif self.disk.flying:
            self._finish()

    def _end(self) -> None:
        disk = self.disk
        if self.rng.random() < 0.6:
            self.counts["killed"] += 1
            self.counts["killed between data and map"] += any(
                entry.op == WRITE and entry.offset < disk.layout.data_at for entry, _ in disk.flying
            )
            disk.killed()
            return
        self.counts["power failed"] += 1
        disk.power_failed({sector: self.rng.choice(each) for sector, each in disk.overlay.versions.items()})
        disk.learn(FIRST, SECTORS)

    def _send(self) -> None:
        disk, rng = self.disk, self.rng
        count = rng.choice((rng.randint(1, 3 * BLOCK_SECTORS), BLOCK_SECTORS))
        first = FIRST + rng.randrange(SECTORS - count + 1)
        if rng.random() < 0.5:
            first, count = first // BLOCK_SECTORS * BLOCK_SECTORS, -(-count // BLOCK_SECTORS) * BLOCK_SECTORS
            first = min(first, FIRST + SECTORS - count)
        op = rng.choices((Op.WRITE, Op.READ, Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES), (50, 20, 12, 9, 9))[0]
        self.counts[op.name] += 1
        if op == Op.WRITE:
            disk.write(first, count, fua=rng.random() < 0.2)
        elif op == Op.READ:
            disk.read(first, count)
        elif op == Op.FLUSH:
            disk.flush()
        else:
            flags = rng.choice((0, Flag.NOUNMAP, Flag.FUA)) if op == Op.WRITE_ZEROES else 0
            disk.clear(op, first, count, flags=flags)

    def _finish(self) -> None:
        at = self.rng.randrange(len(self.disk.flying))
        entry, _ = self.disk.flying[at]
        chance = self.rng.random()
        if entry.op == FSYNC or chance >= 0.06:
            self.disk.finish(at)
        elif chance < 0.03 and entry.length > SECTOR:
            self.counts["short"] += 1
            self.disk.finish(at, short=True)
        elif entry.op == WRITE and entry.user_data != self.spared:
            self.counts["full"] += 1
            self.spared = entry.user_data if entry.offset < self.disk.layout.durable_at else -1
            self.disk.finish(at, error=errno.ENOSPC)
        else:
            self.disk.finish(at)


@pytest.mark.parametrize("seeds", sim_play.chunks(RUNS), ids=str)
def test_after_any_kills_and_power_failures_the_disk_holds_what_was_answered_and_flushed(
    seeds: range, tmp_path: Path
) -> None:
    base = _base(tmp_path)
    reached = Counter[str]()
    for seed in seeds:
        directory = tmp_path / f"{seed}"
        directory.mkdir()
        try:
            reached.update(Run(seed, directory, base).play())
        except BaseException as error:
            error.add_note(f"replay: UBLKPOOL_SIM_FIRST={seed} UBLKPOOL_SIM_SEEDS=1")
            raise
        shutil.rmtree(directory)
    if len(seeds) >= RUNS:
        _expect_everything(reached)


def _expect_everything(reached: Counter[str]) -> None:
    assert min(reached[each.name] for each in Op if each.name in reached) > 2 * RUNS, reached
    assert reached["killed"] > RUNS and reached["power failed"] > RUNS, reached
    assert reached["killed between data and map"] > 5, reached
    assert reached["short"] > 5 and reached["full"] > RUNS and reached["failed"] > RUNS, reached
