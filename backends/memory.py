"""A disk in memory that outlives the process that serves it.

Owns the disk: one sealed memfd, which is the backend's own segment at the same time.  With placement `pool` writes are
copied into it; with placement `backend` a write's place is its own block, so the kernel copies it where it stays, and
reads are answered by naming the block.  No byte is lent twice at once: who overlaps waits.

So that an answered write survives this process, a keeper (`bufpool/keeper.py`) holds the memfd too, and the next
backend of the device adopts it.  Only the device's deletion ends the keeper and the content; `keep=off` does without.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import Literal

import msgspec

from ublkpool.bufpool.backend import Backend, Device, Hint, Properties, log
from ublkpool.bufpool.client import OwnSegment
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.keeper import Keeper, keeper_path
from ublkpool.bufpool.sizes import ByteSize, format_size

_PAGE_BYTES = 4096
_ZEROES = memoryview(bytes(1 << 20))


class MemoryOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`size` 0 takes the size that the device was created with.

    `keep` off loses the content with the process: for measurements only.
    """

    size: ByteSize = 0
    placement: Literal["pool", "backend", "any"] = "any"
    reads: Literal["pool", "own"] = "pool"
    keep: bool = True


class Ranges:
    """Byte ranges that are lent, none overlapping another."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._end_of: dict[int, int] = {}

    def take(self, start: int, length: int) -> bool:
        """Add a range; False if a byte of it is lent already."""
        at = bisect_left(self._starts, start)
        end = start + length
        if at < len(self._starts) and self._starts[at] < end:
            return False
        if at and self._end_of[self._starts[at - 1]] > start:
            return False
        insort(self._starts, start)
        self._end_of[start] = end
        return True

    def give(self, start: int) -> None:
        """Remove the range that begins here."""
        del self._starts[bisect_left(self._starts, start)]
        del self._end_of[start]

    def __len__(self) -> int:
        return len(self._starts)


class MemoryBackend(Backend):
    """A disk in memory that outlives the process that serves it."""

    Options = MemoryOptions

    def __init__(self, options: MemoryOptions) -> None:
        self.options: MemoryOptions = options
        self._keeper: Keeper | None = None
        self._disk = memoryview(b"")
        self._lent = Ranges()
        self._waits = 0

    def open(self, hint: Hint) -> Properties:
        """Adopt the disk that a predecessor left, or make one."""
        size_bytes = self.options.size or hint.size_bytes
        if not size_bytes:
            raise BackendError(f"memory: device {hint.device} has no size of its own: give size=SIZE")
        if size_bytes < 0 or size_bytes % _PAGE_BYTES:
            raise BackendError(f"memory: size={size_bytes} is not a multiple of {_PAGE_BYTES}")
        segment = (
            self._kept(hint, size_bytes)
            if self.options.keep
            else OwnSegment.create(size_bytes, f"disk-{hint.device}")
        )
        self._disk = segment.view
        return Properties(
            size_bytes=size_bytes,
            discard_granularity_bytes=_PAGE_BYTES,
            discard_max_bytes=size_bytes,
            write_zeroes_max_bytes=size_bytes,
            placement=self.options.placement,
            read_buffers=self.options.reads,
            segment=segment,
        )

    def _kept(self, hint: Hint, size_bytes: int) -> OwnSegment:
        self._keeper = Keeper(keeper_path(hint.run_dir, hint.device))
        segment = self._keeper.adopt()
        if segment is None:
            segment = OwnSegment.create(size_bytes, f"disk-{hint.device}")
            self._keeper.keep(segment)
        elif segment.size_bytes != size_bytes:
            held = format_size(segment.size_bytes)
            segment.close()
            raise BackendError(
                f"memory: {self._keeper.path} keeps a disk of {held}, size={format_size(size_bytes)} was asked"
            )
        else:
            log.info("adopted the disk of %s that %s keeps", hint.device, self._keeper.path)
        return segment

    def started(self, device: Device) -> None:
        """The disk may be larger than the device, never smaller."""
        if device.size_bytes > len(self._disk):
            raise BackendError(
                f"memory: size={format_size(len(self._disk))}, "
                f"device {device.name} has {format_size(device.size_bytes)}"
            )

    def pread(self, buf: memoryview, offset: int) -> None:
        """Copy out."""
        buf[:] = self._disk[offset : offset + len(buf)]

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        """Copy in."""
        self._disk[offset : offset + len(buf)] = buf

    def place(self, offset: int, length: int, flags: int) -> int | None:
        """A block's place is the block."""
        return self.read_in_place(offset, length)

    def store_placed(self, region: int, buf: memoryview, offset: int, fua: bool) -> None:
        """The data is where it belongs."""

    def read_in_place(self, offset: int, length: int) -> int | None:
        """A block's place is the block; whoever overlaps waits."""
        if not 0 < length <= len(self._disk) - offset:
            raise OSError(22, "outside the disk")
        if self._lent.take(offset, length):
            return offset
        self._waits += 1
        return None

    def released(self, region: int) -> None:
        """Others may have these blocks now."""
        self._lent.give(region)

    def trim(self, offset: int, length: int) -> None:
        """Reads as zeros afterwards; the memory stays, its segment is promised to be populated."""
        self.zero(offset, length, True)

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """Zeros, in pieces."""
        for start in range(offset, offset + length, len(_ZEROES)):
            piece_bytes = min(len(_ZEROES), offset + length - start)
            self._disk[start : start + piece_bytes] = _ZEROES[:piece_bytes]

    def detached(self) -> None:
        """No successor will come: the content ends here."""
        if self._keeper is not None:
            self._keeper.drop()

    def statistics(self) -> Mapping[str, int]:
        """What is lent, and how often someone had to wait."""
        return {"lent": len(self._lent), "waits": self._waits}
