"""A copy-on-write disk whose every I/O the test executes, on an overlay that remembers what no sync has made durable.

Owns base, overlay, the engine on both, and the shadow of its content.  A process dies (`killed`): what was in flight is
executed as a whole, in part or not.  The power fails (`power_failed`): each sector of the overlay has any content that
it had since the last sync that covers it.
"""

import copy
import itertools
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

from support.fakes.held_ring import FALLOCATE, FSYNC, READ, RWF_DSYNC, WRITE, Entry, HeldRing
from support.fakes.native_rig import DEVICE_NUMBER, EPOCH, NativeRig
from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.bufpool.engine.cow import (
    BASE,
    BLOCK_BYTES,
    DATA,
    MAP_PAGE_COVERS_BYTES,
    CowLayout,
    CowMap,
    CowStorage,
)
from ublkpool.bufpool.wire import (
    DESCRIPTOR_BYTES,
    SEGMENT_POOL,
    Descriptor,
    Flag,
    Kind,
    Op,
    iter_frame,
    pack_frame,
)
from ublkpool.daemon.check.shadow import Change, Reading, Shadow

SECTOR = 512
PAGE = 4096
BLOCK_SECTORS = BLOCK_BYTES // SECTOR
IO_BYTES_MAX = 32 << 10
DEPTH = 8
_LIVE_AT = 8192
_WORD_BYTES = 8


def layout(size_bytes: int, base_bytes: int) -> CowLayout:
    """An overlay with as few pages of map as its disk needs."""
    pages = -(-size_bytes // MAP_PAGE_COVERS_BYTES)
    durable_at = _LIVE_AT + pages * PAGE
    return CowLayout(
        size_bytes=size_bytes,
        capacity_bytes=pages * MAP_PAGE_COVERS_BYTES,
        live_at=_LIVE_AT,
        durable_at=durable_at,
        data_at=durable_at + pages * PAGE,
        base_bytes=base_bytes,
    )


class Overlay:
    """The overlay's file, and by sector every content since the last sync that covers it, the durable one first."""

    def __init__(self, path: Path, places: CowLayout) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.ftruncate(self.file, places.data_at + places.size_bytes)
        self.versions: dict[int, list[bytes]] = {}

    def write(self, at: int, data: bytes) -> None:
        """Put bytes into the page cache."""
        sectors = range(at // SECTOR, -(-(at + len(data)) // SECTOR))
        for each in sectors:
            self.versions.setdefault(each, [os.pread(self.file, SECTOR, each * SECTOR)])
        os.pwrite(self.file, data, at)
        for each in sectors:
            self.versions[each].append(os.pread(self.file, SECTOR, each * SECTOR))

    def lengths(self) -> dict[int, int]:
        """What a sync that begins now covers."""
        return {sector: len(each) for sector, each in self.versions.items()}

    def synced(self, covered: dict[int, int]) -> None:
        """The sync has ended."""
        for sector, count in covered.items():
            kept = self.versions.get(sector, [])[count - 1 :]
            if len(kept) > 1:
                self.versions[sector] = kept
            else:
                self.versions.pop(sector, None)

    def outcomes(self) -> int:
        """How many contents a power failure may leave."""
        return math.prod(map(len, self.versions.values()))

    def choices(self, rng: random.Random, most: int) -> Iterator[dict[int, bytes]]:
        """The contents of the sectors after a power failure: all of them, or the extremes and a random choice."""
        if self.outcomes() <= most:
            for each in itertools.product(*self.versions.values()):
                yield dict(zip(self.versions, each, strict=True))
            return
        yield {sector: each[0] for sector, each in self.versions.items()}
        yield {sector: each[-1] for sector, each in self.versions.items()}
        for _ in range(most - 2):
            yield {sector: rng.choice(each) for sector, each in self.versions.items()}

    def become(self, sectors: dict[int, bytes]) -> None:
        """These are the durable contents."""
        self.versions = {}
        for sector, data in sectors.items():
            os.pwrite(self.file, data, sector * SECTOR)


class CowDisk:
    """One disk over the lives of its backends.  Requests are of whole sectors."""

    def __init__(
        self, directory: Path, base: bytes | Path, size_bytes: int, *, rng: random.Random | None = None
    ) -> None:
        """`base` as bytes is written to a file."""
        self.rng = rng or random.Random(0)
        self.directory = directory
        path = base if isinstance(base, Path) else directory / "base"
        if isinstance(base, bytes):
            path.write_bytes(base)
        self.base = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.layout = layout(size_bytes, os.fstat(self.base).st_size)
        self.overlay = Overlay(directory / "overlay", self.layout)
        self.shadow = Shadow(SECTOR, nonce=1)
        self.shadow.is_volatile = True
        self.changes: dict[int, tuple[Descriptor, Change]] = {}
        self.reads: dict[int, tuple[Descriptor, Reading]] = {}
        self.flushes: dict[int, int] = {}
        self.failed = 0
        self._sequence = 0
        self._before: dict[int, dict[int, tuple[Change, ...]]] = {}
        """By tag of a change, what its sectors may have held when it was sent."""
        self._unsure: dict[int, set[int]] = {}
        """By tag of a read, the sectors of changes that failed meanwhile: it teaches nothing about them."""
        self._start(trusts_live=True)

    def _start(self, *, trusts_live: bool) -> None:
        self.map = CowMap(self.overlay.file, self.layout, trusts_live=trusts_live)
        if not trusts_live:
            self.map.write_live()
        self.rig = NativeRig(
            CowStorage(self.base, self.overlay.file, self.map),
            size_bytes=self.layout.size_bytes,
            own_bytes=IO_BYTES_MAX,
            pool_bytes=DEPTH * IO_BYTES_MAX,
            depth=DEPTH,
        )
        self.ring = HeldRing()
        self.raw = self.rig.engine.raw
        assert lib.engine_use_ring(self.raw, self.ring.raw) == 0
        self.flying: list[tuple[Entry, dict[int, int]]] = []

    def close(self) -> None:
        """End the engine."""
        self._stop()
        for each in (self.base, self.overlay.file):
            os.close(each)

    def _stop(self) -> None:
        self.rig.close()
        self.map.close()

    # Requests

    def free_tag(self) -> int | None:
        """A tag without a request."""
        used = {*self.changes, *self.reads, *self.flushes}
        return next((tag for tag in range(DEPTH) if tag not in used), None)

    def learn(self, first: int, count: int) -> None:
        """Tell the shadow what these sectors hold before anything is written."""
        for at in range(first, first + count, IO_BYTES_MAX // SECTOR):
            self.read(at, min(IO_BYTES_MAX // SECTOR, first + count - at))
            self.settle()

    def write(self, first: int, count: int, *, fua: bool = False) -> None:
        """Send a write, of sectors."""
        tag = self._tag()
        self._sequence += 1
        change = Change(self._sequence, "data", first, count, fua)
        self._begin(tag, change)
        data = self.shadow.data(change)
        self.rig.pool.view[tag * IO_BYTES_MAX :][: len(data)] = data
        self._send_change(tag, Op.WRITE, change, (first, count), Flag.FUA if fua else 0)

    def clear(self, op: Op, first: int, count: int, *, flags: int = 0) -> None:
        """Send a WRITE_ZEROES or a DISCARD; the latter changes whole blocks only."""
        self._sequence += 1
        begin, end = first, first + count
        if op == Op.DISCARD:
            begin, end = -(-begin // BLOCK_SECTORS) * BLOCK_SECTORS, end // BLOCK_SECTORS * BLOCK_SECTORS
        change = Change(self._sequence, "zeros", begin, max(0, end - begin), bool(flags & Flag.FUA))
        tag = self._tag()
        self._begin(tag, change)
        self._send_change(tag, op, change, (first, count), flags)

    def _begin(self, tag: int, change: Change) -> None:
        sectors = range(change.first, change.first + change.count)
        self._before[tag] = {each: self.shadow._possible.get(each, self.shadow._now) for each in sectors}
        self.shadow.begin(change)

    def _ended(self, tag: int, *, failed: bool) -> None:
        _, change = self.changes.pop(tag)
        self.shadow.end(change, failed)
        if not failed:
            return
        # A read beside it may have seen, or still see, what the failure took back.
        for read in self.reads:
            self._unsure.setdefault(read, set()).update(self._before[tag])
        for sector, before in self._before[tag].items():
            now = self.shadow._possible[sector]
            self.shadow._possible[sector] = (*(each for each in before if each not in now), *now)

    def _send_change(self, tag: int, op: Op, change: Change, where: tuple[int, int], flags: int) -> None:
        asked = self._ask(op, tag, *where, flags)
        self.changes[tag] = asked, change
        self._send(asked)

    def read(self, first: int, count: int) -> None:
        """Send a read; its answer is compared with the shadow."""
        tag = self._tag()
        asked = self._ask(Op.READ, tag, first, count)
        self.reads[tag] = asked, self.shadow.begin_read(first, count)
        self._send(asked)

    def flush(self) -> None:
        """Send a FLUSH."""
        tag = self._tag()
        self.flushes[tag] = self.shadow.tick()
        self._send(self._ask(Op.FLUSH, tag, 0, 0))

    def _tag(self) -> int:
        tag = self.free_tag()
        assert tag is not None
        return tag

    def _ask(self, op: Op, tag: int, first: int, count: int, flags: int = 0) -> Descriptor:
        self._sequence += 1
        buffer = (SEGMENT_POOL, tag * IO_BYTES_MAX) if op in (Op.READ, Op.WRITE) else ()
        return Descriptor(
            *(Kind.REQUEST, op, flags, DEVICE_NUMBER, 0, tag, EPOCH, self._sequence, first * SECTOR),
            *(count * SECTOR, 0, *buffer),
        )

    def _send(self, asked: Descriptor) -> None:
        self.rig.engine.take(0, pack_frame([asked]))
        self._submit()

    # I/O

    def _submit(self) -> None:
        lib.engine_prepare(self.raw)
        # A sync covers what was written before it began.
        self.flying += [(entry, self.overlay.lengths()) for entry in self.ring.taken()]
        self._hear()

    def finish(self, at: int, *, short: bool = False, error: int = 0) -> None:
        """Execute one of the flying entries, `short` only its first sector; or fail it with an errno."""
        entry, covered = self.flying.pop(at)
        result = -error if error else self._executed(entry, covered, SECTOR if short else entry.length)
        lib.engine_complete(self.raw, entry.user_data, result)
        self._submit()

    def _executed(self, entry: Entry, covered: dict[int, int], most: int) -> int:
        if entry.op == FSYNC:
            self.overlay.synced(covered)
            return 0
        if entry.op == FALLOCATE:
            self.overlay.write(entry.offset, bytes(entry.address))
            return 0
        if entry.op == READ:
            data = os.pread(entry.file, min(entry.length, most), entry.offset)
            entry.fill(data)
            return len(data)
        assert entry.op == WRITE and entry.file == self.overlay.file
        data = entry.memory[:most]
        self.overlay.write(entry.offset, data)
        if entry.rw_flags & RWF_DSYNC:
            self._sync_pages(entry.offset, len(data))
        return len(data)

    def _sync_pages(self, at: int, count: int) -> None:
        sectors = range(at // PAGE * PAGE // SECTOR, -(-(at + count) // PAGE) * PAGE // SECTOR)
        lengths = self.overlay.lengths()
        self.overlay.synced({each: lengths[each] for each in sectors if each in lengths})

    def settle(self) -> None:
        """Execute everything that is under way."""
        while self.flying:
            self.finish(0)

    def _hear(self) -> None:
        answers = ffi.new("struct wire_descriptor const **")
        assert lib.engine_error(self.raw) == 0
        while count := lib.engine_answers(self.raw, 0, answers):
            frame = bytes(ffi.buffer(answers[0], count * DESCRIPTOR_BYTES))
            lib.engine_answers_sent(self.raw, 0, count)
            for each in iter_frame(frame):
                self._answered(each)

    def _answered(self, answer: Descriptor) -> None:
        assert answer.kind == Kind.DONE
        tag = answer.tag
        self.failed += answer.result < 0
        if tag in self.changes:
            self._ended(tag, failed=answer.result < 0)
        elif tag in self.reads:
            asked, reading = self.reads.pop(tag)
            if answer.result < 0:
                self.shadow.give_up_read(reading)
                self._unsure.pop(tag, None)
                return
            unsure = {each: self.shadow._possible[each] for each in self._unsure.pop(tag, ())}
            wrong = self.shadow.end_read(
                reading, bytes(self.rig.pool.view[tag * IO_BYTES_MAX :][: asked.length])
            )
            self.shadow._possible.update(unsure)
            assert not wrong, wrong
        else:
            start = self.flushes.pop(tag)
            if answer.result == 0:
                self.shadow.flushed(start)

    # Ends

    def killed(self) -> None:
        """Kill the process; its successor opens the overlay and gets what was not answered again."""
        for entry, covered in self.flying:
            part = self.rng.choice((0, 0, 1, 2)) if entry.op == WRITE else self.rng.choice((0, 2))
            if part:
                # Words of the map are never torn; that sectors are not keeps the shadow simple.
                unit = _WORD_BYTES if entry.offset < self.layout.data_at else SECTOR
                whole = self.rng.randrange(0, entry.length + 1, unit)
                self._executed(entry, covered, whole if part == 1 else entry.length)
        self._stop()
        pool = bytes(self.rig.pool.view)
        self._start(trusts_live=True)
        self.rig.pool.view[:] = pool
        again = sorted(
            [each for each, _ in (*self.changes.values(), *self.reads.values())],
            key=lambda each: each.sequence,
        )
        for asked in again:
            self._send(asked._replace(flags=asked.flags | Flag.REPLAY))
        for tag in [*self.flushes]:
            self._sequence += 1
            self._send(self._ask(Op.FLUSH, tag, 0, 0))

    def power_failed(self, sectors: dict[int, bytes]) -> None:
        """The power fails, which ends all requests, and leaves these contents of sectors."""
        self._stop()
        self.overlay.become(sectors)
        self.shadow.lost_power()
        for _, reading in self.reads.values():
            self.shadow.give_up_read(reading)
        for _, change in self.changes.values():
            self.shadow.end(change, failed=True)
        self.changes, self.reads, self.flushes, self._unsure = {}, {}, {}, {}
        self._start(trusts_live=False)

    # What a successor would find

    def content(self, file: int, first: int, count: int, *, trusts_live: bool) -> bytes:
        """Sectors of the disk by this file's map, read without the engine."""
        found = CowMap(file, self.layout, trusts_live=trusts_live)
        content = bytearray()
        try:
            for run in found.runs():
                begin, end = (
                    max(run.offset, first * SECTOR),
                    min(run.offset + run.length, (first + count) * SECTOR),
                )
                if begin >= end:
                    continue
                data = b""
                if run.state == DATA:
                    data = os.pread(file, end - begin, self.layout.data_at + begin)
                elif run.state == BASE:
                    data = os.pread(self.base, end - begin, begin)
                content += data.ljust(end - begin, b"\0")
        finally:
            found.close()
        return bytes(content)

    def check_power_failures(self, first: int, count: int, most: int) -> int:
        """Every content, or `most` of them, that a power failure now may leave; returns how many were looked at."""
        dead = copy.deepcopy(self.shadow)
        scratch = self.directory / "scratch"
        scratch.write_bytes(self.overlay.path.read_bytes())
        looked = 0
        with scratch.open("r+b") as file:
            for sectors in self.overlay.choices(self.rng, most):
                for sector, data in sectors.items():
                    os.pwrite(file.fileno(), data, sector * SECTOR)
                trial = copy.copy(dead)
                trial.lost_power()
                found = self.content(file.fileno(), first, count, trusts_live=False)
                wrong = trial.end_read(trial.begin_read(first, count), found)
                assert not wrong, wrong
                looked += 1
        return looked

    def check_kill(self, first: int, count: int) -> None:
        """What a successor would find if the process were killed now and nothing in flight were executed."""
        trial = copy.deepcopy(self.shadow)
        found = self.content(self.overlay.file, first, count, trusts_live=True)
        wrong = trial.end_read(trial.begin_read(first, count), found)
        assert not wrong, wrong
