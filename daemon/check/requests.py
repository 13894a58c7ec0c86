"""Seeded requests of every kind and size for one disk.  Pure."""

import random
from typing import NamedTuple

from ublkpool.bufpool import wire
from ublkpool.bufpool.wire import Flag, Op
from ublkpool.daemon.check.shadow import Change, Reading

_ZONE_REQUESTS = 2
"""A zone's size, in largest requests."""
_LONG_REQUESTS = 3
"""The largest DISCARD or WRITE_ZEROES, in largest reads or writes."""


class Offer(NamedTuple):
    """What the backend offers, and the size of the disk; bytes."""

    size_bytes: int
    block_bytes: int
    max_io_bytes: int
    read_only: bool
    volatile_cache: bool
    discard_max_bytes: int
    write_zeroes_max_bytes: int

    @classmethod
    def of(cls, attach: wire.Attach, size_bytes: int, max_io_bytes: int) -> "Offer":
        return cls(
            size_bytes,
            attach.logical_block_bytes,
            max_io_bytes,
            attach.read_only,
            attach.volatile_cache,
            attach.discard_max_bytes,
            attach.write_zeroes_max_bytes,
        )


class Request:
    """A request of the block layer, from its submission to its answer; `offset` and `length` are bytes."""

    __slots__ = (
        "change",
        "data",
        "done",
        "error",
        "flags",
        "is_answered",
        "is_short",
        "length",
        "offset",
        "op",
        "queue",
        "reading",
        "received",
        "sent_s",
        "start",
    )

    def __init__(self, op: Op, offset: int, length: int, flags: int = 0) -> None:
        self.op, self.offset, self.length, self.flags = op, offset, length, flags
        self.data = b""
        self.received = bytearray(length if op == Op.READ else 0)
        self.done = 0
        """Bytes that are answered already, by short answers."""
        self.error = 0
        """The errno of its failure."""
        self.is_short = self.is_answered = False
        self.change: Change | None = None
        self.reading: Reading | None = None
        self.start = 0
        """Of a FLUSH, by the shadow's clock."""
        self.sent_s = 0.0
        self.queue = 0

    def __str__(self) -> str:
        fua = " with FUA" if self.flags & Flag.FUA else ""
        number = f" #{self.change.number}" if self.change else ""
        where = f" of {self.length} bytes at {self.offset}" if self.length else ""
        return f"{self.op.name}{number}{fua}{where}"


class Requests:
    """A seeded source of requests."""

    def __init__(self, rng: random.Random, offer: Offer) -> None:
        self._rng = rng
        self.offer = offer
        self.zones = _zones(rng, offer)
        """(offset, bytes) of the parts of the disk that requests go to; its first and last blocks are among them."""
        self._recent: list[tuple[int, int]] = []

    def next(self) -> Request:
        """The next request: where an earlier one was, or anywhere in a zone."""
        op = self._op()
        if op == Op.FLUSH:
            return Request(op, 0, 0)
        if self._recent and self._rng.random() < 0.4:
            offset, length = self._rng.choice(self._recent)
        else:
            offset, length = self._range(op)
        length = min(length, self._most(op))
        self._recent = [*self._recent[-7:], (offset, length)]
        return Request(op, offset, length, self._flags(op))

    def again(self, request: Request) -> Request:
        """A write where this request was."""
        length = min(request.length, self._most(Op.WRITE))
        return Request(Op.WRITE, request.offset, length, self._flags(Op.WRITE))

    def _op(self) -> Op:
        offer, draw = self.offer, self._rng.random()
        if offer.read_only or draw < 0.35:
            return Op.READ
        if draw < 0.42 and offer.volatile_cache:
            return Op.FLUSH
        if draw < 0.48 and offer.discard_max_bytes >= offer.block_bytes:
            return Op.DISCARD
        if draw < 0.56 and offer.write_zeroes_max_bytes >= offer.block_bytes:
            return Op.WRITE_ZEROES
        return Op.WRITE

    def _flags(self, op: Op) -> int:
        flags = 0
        if op in (Op.WRITE, Op.WRITE_ZEROES) and self.offer.volatile_cache and self._rng.random() < 0.2:
            flags |= Flag.FUA
        if op == Op.WRITE_ZEROES and self._rng.random() < 0.3:
            flags |= Flag.NOUNMAP
        return flags

    def _most(self, op: Op) -> int:
        offer = self.offer
        long = _LONG_REQUESTS * offer.max_io_bytes
        most = {
            Op.DISCARD: min(long, offer.discard_max_bytes),
            Op.WRITE_ZEROES: min(long, offer.write_zeroes_max_bytes),
        }
        return most.get(op, offer.max_io_bytes) // offer.block_bytes * offer.block_bytes

    def _range(self, op: Op) -> tuple[int, int]:
        rng, block = self._rng, self.offer.block_bytes
        start, size = rng.choice(self.zones)
        most = min(self._most(op), size) // block
        blocks = min(
            most, rng.choice((1, 1, 2, max(1, 4096 // block), rng.randint(1, 32), rng.randint(1, most)))
        )
        if rng.random() < 0.04:
            blocks = most
        at = rng.randint(0, size // block - blocks)
        if rng.random() < 0.1:
            # The disk's first and last blocks are where sizes go wrong.
            at = rng.choice((0, size // block - blocks))
        return start + at * block, blocks * block


def _zones(rng: random.Random, offer: Offer) -> list[tuple[int, int]]:
    block = offer.block_bytes
    size = min(offer.size_bytes, _ZONE_REQUESTS * offer.max_io_bytes) // block * block
    last = offer.size_bytes - size
    middle = rng.randint(0, last // block) * block
    starts = sorted({0, middle, last})
    # Zones that overlap would be read twice.
    return [
        (at, size)
        for index, at in enumerate(starts)
        if not index or at >= starts[index - 1] + size or at == last
    ]
