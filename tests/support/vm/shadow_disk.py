"""A client with a model of the disk: every write carries a stamp, every read is compared sector by sector.

Owns the model.  Writes in flight never overlap (as in a file system); a read may return any write that was in flight at
the same time, else exactly the last acknowledged one.  A failed write may be there or not until the next acknowledged
one.
"""

import random
import struct
from collections.abc import Callable

from support.fakes.driver import IOD_FUA, IOD_NOUNMAP, SECTOR_BYTES, Request
from ublkpool.bufpool.wire import Op

_STAMP = struct.Struct("<QQ")
_REPEAT = SECTOR_BYTES // _STAMP.size
UNSUPPORTED_OP = 15
ZERO = 0
_WRITERS = (Op.WRITE, Op.DISCARD, Op.WRITE_ZEROES)


def sector_bytes(stamp: int, sector: int) -> bytes:
    """A sector's content after the write with this stamp; 0 is a sector of zeroes."""
    return _STAMP.pack(stamp, sector) * _REPEAT if stamp else bytes(SECTOR_BYTES)


def stamped(stamp: int, sector: int, nbytes: int) -> bytes:
    """The data of a write with this stamp from `sector` on."""
    return b"".join(sector_bytes(stamp, sector + each) for each in range(nbytes // SECTOR_BYTES))


def stamp_of(data: bytes) -> int:
    """The stamp of a write's data."""
    stamp: int = _STAMP.unpack_from(data)[0]
    return stamp


class ShadowDisk:
    """The model of `sectors` sectors from `first_sector` on, all zero at first."""

    def __init__(
        self, rng: random.Random, first_sector: int, sectors: int, max_sectors: int, block: int
    ) -> None:
        self._rng = rng
        self._first, self._sectors = first_sector, sectors
        self._max_blocks, self._block = max_sectors // block, block
        self._may_be: list[set[int]] = [{ZERO} for _ in range(sectors)]
        self._writing: set[int] = set()
        self._stamp_of: dict[Request, int] = {}
        self._readers: dict[Request, list[set[int]]] = {}
        self._last_stamp = 0

    def whole_blocks(self, sectors: int) -> int:
        """At least this many sectors, in whole blocks."""
        return -(-sectors // self._block) * self._block

    def request(self) -> Request | None:
        """A random request, or None if it would overlap a write in flight."""
        op = self._rng.choices((Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES, UNSUPPORTED_OP),
                               (40, 40, 4, 3, 3, 2))[0]  # fmt: skip
        count = self._rng.randint(1, self._max_blocks) * self._block
        if self._rng.random() < 0.5:
            count = self._block
        at = self._rng.randrange((self._sectors - count) // self._block + 1) * self._block
        sectors = range(at, at + count)
        if op in _WRITERS and not self._writing.isdisjoint(sectors):
            return None
        return self._begin(op, sectors)

    def _begin(self, op: int, sectors: range) -> Request:
        if op == Op.FLUSH:
            sectors = range(0)
        flags = {Op.WRITE: IOD_FUA, Op.WRITE_ZEROES: IOD_NOUNMAP}.get(
            Op(op) if op in list(Op) else Op.READ, 0
        )
        request = Request(op, self._first + sectors.start, len(sectors), flags=self._rng.choice((0, flags)))
        if op in _WRITERS:
            self._begin_writing(request, sectors)
        elif op == Op.READ:
            self._readers[request] = [set(self._may_be[each]) for each in sectors]
        return request

    def _begin_writing(self, request: Request, sectors: range) -> None:
        stamp = ZERO
        if request.op == Op.WRITE:
            self._last_stamp += 1
            stamp = self._last_stamp
            request.data = stamped(stamp, self._first + sectors.start, len(sectors) * SECTOR_BYTES)
        self._stamp_of[request] = stamp
        self._writing.update(sectors)
        for each in sectors:
            self._may_be[each].add(stamp)
        for reader, may_be in self._readers.items():
            start = reader.sector - self._first
            for each in range(max(start, sectors.start), min(start + reader.sectors, sectors.stop)):
                may_be[each - start].add(stamp)

    def end(self, request: Request) -> None:
        """Take an answered request: check what it read, or record what it wrote."""
        assert request.result is not None
        ok = request.result >= 0
        if request.op == Op.READ:
            self._check(request, self._readers.pop(request), ok)
        elif request in self._stamp_of:
            stamp = self._stamp_of.pop(request)
            at = request.sector - self._first
            self._writing.difference_update(range(at, at + request.sectors))
            for each in range(at, at + request.sectors if ok else at):
                self._may_be[each] = {stamp}

    def check_stored(self, read: Callable[[int, int], bytes]) -> None:
        """Check with no request in flight that `read(offset, length)`, bytes, returns the last acknowledged writes."""
        for index, may_be in enumerate(self._may_be):
            sector = self._first + index
            found = read(sector * SECTOR_BYTES, SECTOR_BYTES)
            stamp, _ = _STAMP.unpack_from(found)
            assert stamp in may_be and found == sector_bytes(stamp, sector), (
                f"sector {sector} was left with stamp {stamp}, not one of {may_be}"
            )

    def _check(self, request: Request, may_be: list[set[int]], ok: bool) -> None:
        for index, stamps in enumerate(may_be if ok else ()):
            sector = request.sector + index
            found = bytes(request.received[index * SECTOR_BYTES : (index + 1) * SECTOR_BYTES])
            stamp, named = _STAMP.unpack_from(found)
            assert stamp in stamps and found == sector_bytes(stamp, sector), (
                f"{request}: sector {sector} holds stamp {stamp} of sector {named}, not one of {stamps}"
            )
