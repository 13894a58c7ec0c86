"""The layer `cache`: reads of a slow backend, kept in memory or on a local disk.

Writes go through: a write is answered when the backend below has it, and the blocks that it touches are forgotten
before it begins and after it ends.  A block that is being read while a write touches it is not kept, so a read never
returns what an answered write has replaced.  What is kept is lost with the process, for the store may change meanwhile.
"""

import math
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Device, Hint, Properties, log
from ublkpool.bufpool.sdk.layers.layer import Layer, Plain
from ublkpool.bufpool.sizes import ByteSize


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`size` is the most bytes that are kept, `block` the bytes that are read at once: a power of two.

    `dir` is a directory on a local disk, where they are kept in a file without a name; without it, in memory.
    """

    size: ByteSize = 64 << 20
    block: Annotated[ByteSize, msgspec.Meta(ge=4096, le=16 << 20)] = 64 << 10
    dir: Path | None = None

    def __post_init__(self) -> None:
        if self.block & (self.block - 1):
            raise ValueError(f"block={self.block} is not a power of two")
        if self.size < self.block:
            raise ValueError(f"size={self.size} is less than one block of {self.block} bytes")


class _Kept:
    """The blocks that are kept, in order of use; the store gets and puts a slot's bytes.  Not thread-safe."""

    def __init__(self, slots: int, get: Callable[[int], bytes], put: Callable[[int, bytes], None]) -> None:
        self._get, self._put = get, put
        self._free = list(range(slots))
        self._slot_of: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slot_of)

    def find(self, block: int) -> bytes | None:
        slot = self._slot_of.get(block)
        if slot is None:
            return None
        self._slot_of.move_to_end(block)
        try:
            return self._get(slot)
        except OSError as error:
            log.error("layer cache: cannot read what it kept: %s", error)
            self.forget(block)
            return None

    def keep(self, block: int, data: bytes) -> None:
        self.forget(block)
        if not self._free:
            self._free.append(self._slot_of.popitem(last=False)[1])
        slot = self._free.pop()
        try:
            self._put(slot, data)
        except OSError as error:
            log.error("layer cache: cannot keep a block: %s", error)
            self._free.append(slot)
        else:
            self._slot_of[block] = slot

    def forget(self, block: int) -> None:
        slot = self._slot_of.pop(block, None)
        if slot is not None:
            self._free.append(slot)

    def forget_between(self, first: int, end: int) -> None:
        """Forget these blocks, of which there may be many more than are kept."""
        many = end - first > len(self._slot_of)
        for block in [each for each in self._slot_of if first <= each < end] if many else range(first, end):
            self.forget(block)


class Cache(Layer):
    """Keeps whole blocks of what was read."""

    Options = CacheOptions

    def __init__(self, options: CacheOptions, *, inner: Plain) -> None:
        super().__init__(options, inner=inner)
        self._block_bytes, self._directory = options.block, options.dir
        self._slots = options.size // options.block
        self._size_bytes = 0
        self._lock = threading.Lock()
        self._writing: Counter[tuple[int, int]] = Counter()
        self._fills: list[_Fill] = []
        self._hits = self._misses = 0
        self._fd = -1

    def open(self, hint: Hint) -> Properties:
        """See `Layer.open`.  Raises `BackendError` if the directory cannot have the file."""
        if self._directory is None:
            memory: dict[int, bytes] = {}
            self._kept = _Kept(self._slots, memory.__getitem__, memory.__setitem__)
        else:
            try:
                self._fd = os.open(self._directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise BackendError(f"layer cache: {self._directory}: {error.strerror}") from error
            self._kept = _Kept(self._slots, self._get, self._put)
        properties = super().open(hint)
        if self.exclusive_bytes:
            # A read of a block reads all its chunks below.
            self.exclusive_bytes = math.lcm(self.exclusive_bytes, self._block_bytes)
        return properties

    def _get(self, slot: int) -> bytes:
        data = os.pread(self._fd, self._block_bytes, slot * self._block_bytes)
        if len(data) != self._block_bytes:
            raise OSError("the file became shorter")
        return data

    def _put(self, slot: int, data: bytes) -> None:
        data = data.ljust(self._block_bytes, b"\0")
        if os.pwrite(self._fd, data, slot * self._block_bytes) != len(data):
            raise OSError("no room")

    def started(self, device: Device) -> None:
        """See `Layer.started`."""
        self._size_bytes = device.size_bytes
        super().started(device)

    def pread(self, buf: memoryview, offset: int) -> int | None:
        """See `Layer.pread`; whole blocks are read from below, and kept."""
        done = 0
        while done < len(buf):
            block, skip = divmod(offset + done, self._block_bytes)
            count = min(len(buf) - done, self._block_bytes - skip)
            data = self._block(block)
            piece = data[skip : skip + count]
            buf[done : done + len(piece)] = piece
            done += len(piece)
            if len(piece) < count:
                break
        return done

    def _block(self, block: int) -> bytes:
        with self._lock:
            found = self._kept.find(block)
            if found is not None:
                self._hits += 1
                return found
            self._misses += 1
            fill = _Fill(block, is_stale=any(first <= block < end for first, end in self._writing))
            self._fills.append(fill)
        start = block * self._block_bytes
        memory = bytearray(min(self._block_bytes, self._size_bytes - start))
        moved: int | None = 0
        try:
            moved = self.inner.pread(memoryview(memory), start)
        finally:
            with self._lock:
                self._fills.remove(fill)
                whole = moved is None or moved == len(memory)
                if whole and not fill.is_stale:
                    self._kept.keep(block, bytes(memory))
        return bytes(memory if moved is None else memory[:moved])

    @contextmanager
    def _changing(self, offset: int, length: int) -> Iterator[None]:
        """For a change of these bytes: their blocks are neither kept nor filled meanwhile."""
        blocks = (offset // self._block_bytes, -(-(offset + length) // self._block_bytes))
        with self._lock:
            self._writing[blocks] += 1
            self._forget(*blocks)
        try:
            yield
        finally:
            with self._lock:
                self._writing -= Counter([blocks])
                self._forget(*blocks)

    def _forget(self, first: int, end: int) -> None:
        self._kept.forget_between(first, end)
        for fill in self._fills:
            fill.is_stale |= first <= fill.block < end

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> int | None:
        """See `Layer.pwrite`."""
        with self._changing(offset, len(buf)):
            return self.inner.pwrite(buf, offset, fua)

    def trim(self, offset: int, length: int) -> None:
        """See `Layer.trim`."""
        with self._changing(offset, length):
            self.inner.trim(offset, length)

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """See `Layer.zero`."""
        with self._changing(offset, length):
            self.inner.zero(offset, length, may_unmap)

    def close(self) -> None:
        """See `Layer.close`."""
        super().close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def statistics(self) -> Mapping[str, int]:
        """See `Layer.statistics`; with the reads of blocks that were kept, and that were not."""
        with self._lock:
            own = {"cache_hits": self._hits, "cache_misses": self._misses, "cache_blocks": len(self._kept)}
        return {**super().statistics(), **own}


class _Fill:
    """A block that is being read from below; stale once a write touches it."""

    __slots__ = ("block", "is_stale")

    def __init__(self, block: int, *, is_stale: bool) -> None:
        self.block, self.is_stale = block, is_stale
