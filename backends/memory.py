"""A disk in memory that outlives the process that serves it.

Owns the disk: one sealed memfd, which is also the backend's own segment.  With placement `pool` writes are copied into
it; with placement `backend` a write lands in its own block, so the kernel copies the data to where it stays.  With
`reads=own` reads are answered by naming the block.  No byte is lent twice at the same time: overlapping requests wait.
The native engine does all of that; this module makes, adopts and ends the disk.

So that an answered write survives this process, a keeper (`bufpool/sdk/keeper.py`) holds the memfd, too, and the
device's next backend adopts it.  The device's deletion ends keeper and content; `keep=off` uses no keeper.
"""

import os
from typing import Literal

import msgspec

from ublkpool.bufpool.engine.native import MemoryStorage, NativeEngine
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, FrameEngine, Hint, Properties, log
from ublkpool.bufpool.sdk.client import OwnSegment
from ublkpool.bufpool.sdk.inside import Growth
from ublkpool.bufpool.sdk.keeper import Keeper, keeper_path
from ublkpool.bufpool.sdk.properties import Inside
from ublkpool.bufpool.sdk.store_identity import memory_identity
from ublkpool.bufpool.sizes import ByteSize, format_size
from ublkpool.bufpool.wire import Identity

MEMSET_BYTES_MAX = 16 << 20
"""The longest DISCARD and WRITE_ZEROES inside a worker, which does nothing else meanwhile, for some milliseconds."""
_PAGE_BYTES = 4096


class MemoryOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`size` 0 takes the size that the device was created with; of a larger kept disk the first bytes are served.

    With `keep` off the content ends with the process: for measurements only.
    """

    size: ByteSize = 0
    placement: Literal["pool", "backend", "any"] = "any"
    reads: Literal["pool", "own"] = "pool"
    keep: bool = True


class MemoryBackend(Backend):
    """A disk in memory that outlives the process that serves it."""

    Options = MemoryOptions

    def __init__(self, options: MemoryOptions) -> None:
        self.options: MemoryOptions = options
        self._keeper: Keeper | None = None
        self._disk_bytes = self._segment_bytes = 0

    def open(self, hint: Hint) -> Properties:
        """Adopt the disk that a predecessor left, or make one."""
        size_bytes = self._size(hint)
        segment = (
            self._kept(hint, size_bytes)
            if self.options.keep
            else OwnSegment.create(size_bytes, f"disk-{hint.device}")
        )
        return self._properties(hint, segment, self._identity(hint, segment))

    def _size(self, hint: Hint) -> int:
        """The disk's bytes.  Raises `BackendError`."""
        size_bytes = hint.asked_bytes(self.options.size)
        if not size_bytes:
            raise BackendError(f"memory: device {hint.device} has no size of its own: give size=SIZE")
        if size_bytes < 0 or size_bytes % _PAGE_BYTES:
            raise BackendError(f"memory: size={size_bytes} is not a multiple of {_PAGE_BYTES}")
        return size_bytes

    def _properties(self, hint: Hint, segment: OwnSegment, identity: Identity) -> Properties:
        size_bytes = self._size(hint)
        self._disk_bytes, self._segment_bytes = size_bytes, segment.size_bytes
        return Properties(
            size_bytes=size_bytes,
            discard_granularity_bytes=_PAGE_BYTES,
            discard_max_bytes=size_bytes,
            write_zeroes_max_bytes=size_bytes,
            placement=self.options.placement,
            read_buffers=self.options.reads,
            segment=segment,
            identity=identity,
        )

    def _identity(self, hint: Hint, segment: OwnSegment) -> Identity:
        """With `keep=off` every process has a new disk, so all of them have the same identity."""
        if self.options.keep:
            return memory_identity(segment.descriptor, hint.device)
        return Identity(
            value="memory:unkept", strength="weak", store="memory with keep=off", ends_with_device=True
        )

    def _kept(self, hint: Hint, size_bytes: int) -> OwnSegment:
        self._keeper = Keeper(keeper_path(hint.run_dir, hint.device))
        segment = self._keeper.adopt()
        if segment is None and not (hint.may_create or hint.takes_next):
            raise BackendError(
                f"memory: the disk of {hint.device} ended with its keeper, and a new one would be empty; "
                f"accept that with: ublkpool rebind {hint.device}"
            )
        if segment is None:
            segment = OwnSegment.create(size_bytes, f"disk-{hint.device}")
            self._keeper.keep(segment)
        elif segment.size_bytes < size_bytes:
            held = format_size(segment.size_bytes)
            segment.close()
            raise BackendError(
                f"memory: {self._keeper.path} keeps a disk of {held}, fewer than size={format_size(size_bytes)}: "
                f"ask for {held}, or delete the device first, and with it what is kept"
            )
        else:
            log.info("adopted the disk of %s that %s keeps", hint.device, self._keeper.path)
        return segment

    def started(self, device: Device) -> None:
        """Raises `BackendError` if the device is larger than the disk."""
        if device.size_bytes > self._disk_bytes:
            raise BackendError(
                f"memory: size={format_size(self._disk_bytes)}, "
                f"device {device.name} has {format_size(device.size_bytes)}"
            )

    def resize(self, size_bytes: int) -> None:
        """Serve more of a kept disk that is larger than the device; the disk itself never grows.

        Raises `BackendError` beyond that: the workers have the sealed memory mapped.
        """
        if size_bytes > self._segment_bytes:
            raise BackendError(
                f"memory: the disk is sealed memory of {format_size(self._segment_bytes)} and cannot grow: "
                "add another device of the new size and copy the data"
            )

    def engine(self, device: Device) -> FrameEngine:
        """The native engine on the disk."""
        return NativeEngine(device, MemoryStorage(names_reads=self.options.reads == "own"))

    def open_inside(self, hint: Hint, kept: int | None) -> Inside:
        """A disk for a device's workers, which the daemon keeps instead of a keeper; see `bufpool/sdk/inside.py`."""
        size_bytes = self._size(hint)
        if kept is not None:
            segment = OwnSegment.adopt(kept)
        elif hint.may_create or hint.takes_next:
            segment = OwnSegment.create(size_bytes, f"disk-{hint.device}")
        else:
            raise BackendError(
                f"memory: the disk of {hint.device} ended with the daemon that kept it, and a new one would be empty; "
                f"accept that with: ublkpool rebind {hint.device}"
            )
        properties = msgspec.structs.replace(
            self._properties(hint, segment, memory_identity(segment.descriptor, hint.device)),
            read_buffers="own",
            discard_max_bytes=min(size_bytes, MEMSET_BYTES_MAX),
            write_zeroes_max_bytes=min(size_bytes, MEMSET_BYTES_MAX),
        )
        return Inside(properties, MemoryStorage(names_reads=True), (segment.descriptor,))

    def grow_inside(self, growth: Growth) -> None:
        """As `resize`.  Raises `BackendError`."""
        assert growth.kept is not None
        self._segment_bytes = os.fstat(growth.kept).st_size
        self.resize(growth.wanted_bytes)

    def detached(self) -> None:
        """The device is deleted: end the keeper and the content."""
        if self._keeper is not None:
            self._keeper.drop()
