"""The map of a copy-on-write overlay, and the native disk that it is of; docs/COW.md describes the file.

Owns the map in memory.  The open files are the caller's and outlive it.
"""

import errno
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.bufpool.engine.device import Device
from ublkpool.bufpool.engine.native import slot_bytes
from ublkpool.bufpool.errors import BackendError

BLOCK_BYTES: int = lib.COW_BLOCK_BYTES
MAP_PAGE_COVERS_BYTES: int = lib.COW_PAGE_BLOCKS * BLOCK_BYTES
"""The bytes of the disk that one page of the map is for."""
BASE: int = lib.COW_BASE
DATA: int = lib.COW_DATA
ZERO: int = lib.COW_ZERO


class CowLayout(msgspec.Struct, frozen=True, kw_only=True):
    """`struct cow_layout`: where the overlay has its parts, and sizes in bytes."""

    size_bytes: int
    capacity_bytes: int
    live_at: int
    durable_at: int
    data_at: int
    base_bytes: int


class Run(NamedTuple):
    """Bytes of the disk whose blocks have the same state."""

    offset: int
    length: int
    state: int


class CowMap:
    """The map of one open overlay.  Raises `BackendError` if it is damaged, `OSError` if it cannot be read."""

    def __init__(self, file: int, layout: CowLayout, *, trusts_live: bool) -> None:
        """`trusts_live`: the live copy of the map counts, else the durable one."""
        error = ffi.new("int *")
        self.layout = layout
        described = ffi.new("struct cow_layout *", msgspec.structs.asdict(layout))
        self.raw = lib.cow_map_open(file, described, trusts_live, error)
        if self.raw == ffi.NULL and error[0] == -errno.EBADMSG:
            raise BackendError("the overlay's map is damaged: it has a state that does not exist")
        if self.raw == ffi.NULL:
            raise OSError(-error[0], f"the overlay's map: {os.strerror(-error[0])}")

    def write_live(self) -> None:
        """Make the file's live copy equal to the map.  Raises `OSError`."""
        _check(lib.cow_map_write_live(self.raw))

    def sync(self) -> None:
        """Sync the data, and make the durable copy equal to the map; no request may be running.  Raises `OSError`."""
        _check(lib.cow_map_sync(self.raw))

    def runs(self) -> Iterator[Run]:
        """The disk's bytes by state, in order."""
        state = ffi.new("int *")
        end = -(-self.layout.size_bytes // BLOCK_BYTES)
        at = 0
        while at < end:
            count = lib.cow_map_run(self.raw, at, end, state)
            offset = at * BLOCK_BYTES
            length = min(count * BLOCK_BYTES, self.layout.size_bytes - offset)
            yield Run(offset, length, int(state[0]))
            at += count

    def count_bytes(self, state: int) -> int:
        """The bytes of the disk whose blocks are in a state; a last block counts as whole."""
        end = -(-self.layout.size_bytes // BLOCK_BYTES)
        return lib.cow_map_count(self.raw, end, state) * BLOCK_BYTES

    def close(self) -> None:
        """Free it."""
        if self.raw != ffi.NULL:
            lib.cow_map_close(self.raw)
            self.raw = ffi.NULL


class CowStorage(NamedTuple):
    """The disk of a base, an overlay and its map; placed writes land in slots of the own segment."""

    base: int
    overlay: int
    map: CowMap

    def new(self, device: Device) -> Any:
        """See `native.Storage`."""
        return lib.storage_cow_new(self.base, self.overlay, self.map.raw, slot_bytes(device.max_io_bytes))


class CowFiles(NamedTuple):
    """An overlay and its base, open, for a process that opens the map itself: its live copy in the file counts."""

    overlay: int
    base: int
    layout: CowLayout

    def new(self, device: Device) -> Any:
        """See `native.Storage`: not before `opened`."""
        raise AssertionError("the overlay's map is not open")

    def opened(self) -> CowStorage:
        """With the map, which the caller closes after the engine.  Raises as `CowMap`."""
        return CowStorage(self.base, self.overlay, CowMap(self.overlay, self.layout, trusts_live=True))


def _check(error: int) -> None:
    if error:
        raise OSError(-error, f"the overlay's map: {os.strerror(-error)}")
