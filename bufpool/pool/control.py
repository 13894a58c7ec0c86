"""The control segment of a device's pool: its layout, and reading and writing it.

Owns the layout.  Must not know leases' rules, sockets or the kernel.  The broker, the workers and the daemon map it.

The control segment, little-endian; blocks begin at multiples of 4096:

    byte  0                8        12       16       20       24       28       32                40
          +----------------+--------+--------+--------+--------+--------+--------+-----------------+----
       0  | "UBLKPOOL"     | version| device | queues | classes| slots  | 0      | data_bytes      | 0...
          +----------------+--------+--------+--------+--------+--------+--------+-----------------+----
      64  | one class of 32 bytes, up to 8: u64 base_offset, u32 buffer_bytes, u32 count,
          |                                 u32 first_slot, u32 reserve per queue, u64 0
          +---------------------------------------------------------------------------------------------
    1024  | the device's limits, 0 for none: u64 generation, raised after each change (daemon)
          |   u64 I/Os a second, u64 bytes a second, u64 burst in ns                  (daemon)
    1088  |   u64, u64: how far the I/Os and the bytes that passed fill the rates     (workers)
          +---------------------------------------------------------------------------------------------
    4096  | `queues` blocks of 4096: a queue's statistics, written by its worker only
          +---------------------------------------------------------------------------------------------
    4096  | `slots` headers of 16 bytes:  u32 owner      0 free, queue + 1 leased   (broker)
      x   |                               u32 epoch      the lease's                (broker)
     (1 + |                               u32 tag        0 in the stock, tag + 1    (worker; broker if free)
    queues)                               u32 sequence   raised at every grant      (broker)
          +---------------------------------------------------------------------------------------------

Each 32-bit field is written by one store, the owner last at a grant and first at a release: at any moment in which the
broker may die, a slot is either free or entirely its owner's.
"""

import mmap
import os
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple, Self

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool.lease import Owner
from ublkpool.bufpool.pool.limits import CLASS_COUNT_MAX, PAGE_BYTES, QUEUE_COUNT_MAX, Geometry, SizeClass

assert sys.byteorder == "little", "slot headers are single 32-bit stores in native byte order"

CONTROL_MAGIC = b"UBLKPOOL"
CONTROL_VERSION = 1
CLASSES_OFFSET = 64
LIMITS_OFFSET = 1024
"""Earlier versions leave zeros here."""
SLOT_HEADER_BYTES = 16

_HEADER = struct.Struct("<8sIIIIIIQ")
_CLASS = struct.Struct("<QIIIIQ")
_FIELDS = SLOT_HEADER_BYTES // 4
_OWNER, _EPOCH, _TAG, _SEQUENCE = range(_FIELDS)
assert _HEADER.size <= CLASSES_OFFSET
assert _CLASS.size == 32
assert CLASSES_OFFSET + CLASS_COUNT_MAX * _CLASS.size <= LIMITS_OFFSET


class Limits(NamedTuple):
    """What a device's queues let through together; 0: no limit."""

    iops: int = 0
    bytes_per_s: int = 0
    burst_ns: int = 0
    """The time whose worth of I/Os and bytes may pass at once after a pause."""


class SlotHeader(NamedTuple):
    """One slot's header as it lies in the control segment."""

    owner: int
    epoch: int
    tag: int
    sequence: int


class ControlHeader(NamedTuple):
    """The control segment's first page, decoded and checked."""

    device_number: int
    queues: int
    geometry: Geometry
    reserve: tuple[int, ...]

    def pack(self) -> bytes:
        """The header as the first 4096 bytes of the segment."""
        classes, slot_count = self.geometry.classes, self.geometry.slot_count
        total_bytes = self.geometry.total_bytes
        head = (CONTROL_MAGIC, CONTROL_VERSION, self.device_number, self.queues, len(classes), slot_count, 0)
        page = bytearray(PAGE_BYTES)
        _HEADER.pack_into(page, 0, *head, total_bytes)
        for index, (each, reserve) in enumerate(zip(classes, self.reserve, strict=True)):
            fields = (each.base_offset, each.buffer_bytes, each.count, each.first_slot, reserve, 0)
            _CLASS.pack_into(page, CLASSES_OFFSET + index * _CLASS.size, *fields)
        return bytes(page)

    @classmethod
    def unpack(cls, page: bytes) -> Self:
        """Decode the first 4096 bytes.  Raises `PoolError` for anything that `pack` would not write."""
        magic, version, device_number, queues, class_count, slot_count, _, data_bytes = _HEADER.unpack_from(
            page
        )
        if magic != CONTROL_MAGIC:
            raise PoolError("not a control segment of ublkpool")
        if version != CONTROL_VERSION:
            raise PoolError(
                f"control segment of version {version}, this is {CONTROL_VERSION}: remove the old pool"
            )
        if not 1 <= class_count <= CLASS_COUNT_MAX or not 1 <= queues <= QUEUE_COUNT_MAX:
            raise PoolError(f"damaged control segment: {class_count} classes, {queues} queues")
        classes, reserve = [], []
        for index in range(class_count):
            base, size, count, first, each_reserve, _ = _CLASS.unpack_from(
                page, CLASSES_OFFSET + index * _CLASS.size
            )
            classes.append(SizeClass(size, count, first, base))
            reserve.append(each_reserve)
        geometry = Geometry(tuple(classes))
        geometry.check()
        if (geometry.slot_count, geometry.total_bytes) != (slot_count, data_bytes):
            raise PoolError(
                f"damaged control segment: {slot_count} slots and {data_bytes} bytes are not its classes'"
            )
        return cls(device_number, queues, geometry, tuple(reserve))


def stats_offset(queue: int) -> int:
    """The byte offset of the queue's statistics in the control segment."""
    return PAGE_BYTES * (1 + queue)


def slot_header_offset(queues: int, slot: int) -> int:
    """The byte offset of the slot's header in the control segment of a device with `queues` queues."""
    return PAGE_BYTES * (1 + queues) + SLOT_HEADER_BYTES * slot


def control_bytes(queues: int, slot_count: int) -> int:
    """The control segment's size in bytes, whole pages."""
    return -(-slot_header_offset(queues, slot_count) // PAGE_BYTES) * PAGE_BYTES


class Control:
    """A mapped control segment.

    Only the process that the module's drawing names writes a field of a slot header.
    """

    def __init__(self, fd: int) -> None:
        """Map the segment of `fd`, which stays the caller's.  Raises `PoolError` if it is not whole."""
        size_bytes = os.fstat(fd).st_size
        if size_bytes < PAGE_BYTES:
            raise PoolError(f"control segment of {size_bytes} bytes has no header")
        self._map = mmap.mmap(fd, size_bytes)
        try:
            self.header = ControlHeader.unpack(self._map[:PAGE_BYTES])
            expected_bytes = control_bytes(self.header.queues, self.header.geometry.slot_count)
            if size_bytes != expected_bytes:
                raise PoolError(
                    f"control segment has {size_bytes} bytes and its header says {expected_bytes}"
                )
        except PoolError:
            self._map.close()
            raise
        self._view = memoryview(self._map)
        self._words = self._view.cast("I")
        self._limits = self._view[LIMITS_OFFSET : LIMITS_OFFSET + 8 * (1 + len(Limits._fields))].cast("Q")

    def slot_header(self, slot: int) -> SlotHeader:
        """The slot's header now."""
        first = self._word(slot)
        return SlotHeader(*self._words[first : first + _FIELDS])

    def slot_owners(self) -> Iterator[Owner | None]:
        """The owner of each slot, in order, as the headers say; the argument of `LeaseTable.rebuild`."""
        for slot in range(self.header.geometry.slot_count):
            header = self.slot_header(slot)
            yield Owner(header.owner - 1, header.epoch) if header.owner else None

    def grant(self, slot: int, owner: Owner) -> None:
        """Write the owner into the slot's header; before the GRANT is sent."""
        first = self._word(slot)
        self._words[first + _SEQUENCE] = (self._words[first + _SEQUENCE] + 1) & 0xFFFFFFFF
        self._words[first + _TAG] = 0
        self._words[first + _EPOCH] = owner.epoch
        self._words[first + _OWNER] = owner.queue + 1

    def release(self, slot: int) -> None:
        """Write into the header that the slot is free; before it can be granted again."""
        first = self._word(slot)
        self._words[first + _OWNER] = 0
        self._words[first + _TAG] = 0

    def statistics_block(self, queue: int) -> bytes:
        """A copy of the queue's statistics, whose layout is the worker's.  Raises `PoolError` for an unknown queue."""
        if not 0 <= queue < self.header.queues:
            raise PoolError(f"queue {queue} is none of the {self.header.queues} of this device")
        return self._map[stats_offset(queue) : stats_offset(queue) + PAGE_BYTES]

    @property
    def limits(self) -> Limits:
        """The limits that were set last."""
        return Limits(*self._limits[1:])

    def set_limits(self, limits: Limits) -> None:
        """Set the device's limits, which hold from now on, also for requests that wait; called by the daemon only."""
        # A worker reads the values when the generation has changed.
        for at, value in enumerate(limits, 1):
            self._limits[at] = value
        self._limits[0] = (self._limits[0] + 1) % 2**64

    def close(self) -> None:
        """Unmap.  Harmless twice."""
        self._words.release()
        self._limits.release()
        self._view.release()
        self._map.close()

    def _word(self, slot: int) -> int:
        if not 0 <= slot < self.header.geometry.slot_count:
            raise PoolError(f"slot {slot} is none of the pool's {self.header.geometry.slot_count}")
        return slot_header_offset(self.header.queues, slot) // 4
