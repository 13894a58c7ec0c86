"""The pool's memory: two segments per device, and what the control one contains.

Owns names, sizes and the control segment's layout.  Must not know leases' rules, sockets or the kernel.  The daemon
creates and unlinks; workers and the broker map what they inherit or are sent.

The **data** segment holds the buffers and nothing else, and a descriptor of it goes to the backend: a memfd whose size
is sealed (`memory.py`), without a name; the holder keeps it for the next daemon.  The **control** segment goes to
workers and the broker only: a POSIX shared memory object, which is found by its name.  Both are 0600, allocated in
full and populated before anyone uses them: a page that is missing when the kernel copies would stall the device.  An
earlier version gave the data a name, too; a pool of that kind is used as it is until its data is replaced.

The control segment, little-endian; blocks begin at multiples of 4096:

    byte  0                8        12       16       20       24       28       32                40
          +----------------+--------+--------+--------+--------+--------+--------+-----------------+----
       0  | "UBLKPOOL"     | version| device | queues | classes| slots  | 0      | data_bytes      | 0...
          +----------------+--------+--------+--------+--------+--------+--------+-----------------+----
      64  | one class of 32 bytes, up to 8: u64 base_offset, u32 buffer_bytes, u32 count,
          |                                 u32 first_slot, u32 reserve per queue, u64 0
          +---------------------------------------------------------------------------------------------
    4096  | `queues` blocks of 4096: a queue's statistics, written by its worker only
          +---------------------------------------------------------------------------------------------
    4096  | `slots` headers of 16 bytes:  u32 owner      0 free, queue + 1 leased   (broker)
      x   |                               u32 epoch      the lease's                (broker)
     (1 + |                               u32 tag        0 in the stock, tag + 1    (worker; broker if free)
    queues)                               u32 sequence   raised at every grant      (broker)
          +---------------------------------------------------------------------------------------------

Each 32-bit field is written by one store, the owner last at a grant and first at a release: whenever the
broker dies, a slot is either free or entirely its owner's.

Python's `mmap` keeps a duplicate of the descriptor (close-on-exec, like the original), so a mapped segment
lives until `close`, whatever became of the descriptor.
"""

import mmap
import os
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, Self

import msgspec
import posix_ipc

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.huge_pages import HugePages
from ublkpool.bufpool.pool.lease import Owner
from ublkpool.bufpool.pool.limits import CLASS_COUNT_MAX, PAGE_BYTES, QUEUE_COUNT_MAX, Geometry, SizeClass
from ublkpool.bufpool.pool.memory import SHM_DIRECTORY, huge_bytes, is_sealed, make_data, make_named

assert sys.byteorder == "little", "slot headers are single 32-bit stores in native byte order"

CONTROL_MAGIC = b"UBLKPOOL"
CONTROL_VERSION = 1
CLASSES_OFFSET = 64
SLOT_HEADER_BYTES = 16

_HEADER = struct.Struct("<8sIIIIIIQ")
_CLASS = struct.Struct("<QIIIIQ")
_FIELDS = SLOT_HEADER_BYTES // 4
_OWNER, _EPOCH, _TAG, _SEQUENCE = range(_FIELDS)
assert _HEADER.size <= CLASSES_OFFSET
assert _CLASS.size == 32
assert CLASSES_OFFSET + CLASS_COUNT_MAX * _CLASS.size <= PAGE_BYTES


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
        """The first 4096 bytes."""
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
        """Raises `PoolError` for anything that `pack` would not have written."""
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
    """Where the queue's block of statistics begins in the control segment."""
    return PAGE_BYTES * (1 + queue)


def slot_header_offset(queues: int, slot: int) -> int:
    """Where the slot's header begins in the control segment of a device with so many queues."""
    return PAGE_BYTES * (1 + queues) + SLOT_HEADER_BYTES * slot


def control_bytes(queues: int, slot_count: int) -> int:
    """The control segment's size, in whole pages."""
    return -(-slot_header_offset(queues, slot_count) // PAGE_BYTES) * PAGE_BYTES


def arena_prefix(instance: str, device_number: int) -> str:
    """The name that the objects of a device begin with; `instance` tells daemons on one machine apart."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", instance):
        raise PoolError(f"instance {instance!r} must be 1 to 64 letters, digits, dots, dashes or underscores")
    return f"/ublkpool-{instance}-{device_number}"


def list_orphans(instance: str) -> list[str]:
    """The prefixes of this instance's pools that exist, whole or in part; `unlink_arena` takes them."""
    stem = re.escape(arena_prefix(instance, 0).removesuffix("0").removeprefix("/"))
    pattern = re.compile(rf"({stem}\d+)-(?:data|ctl)")
    names = (path.name for path in SHM_DIRECTORY.iterdir())
    return sorted({f"/{match[1]}" for name in names if (match := pattern.fullmatch(name))})


def unlink_arena(name_prefix: str) -> None:
    """Remove the names of a pool, as far as they exist; a process that has the objects open keeps the memory."""
    for name in (_data_name(name_prefix), _control_name(name_prefix)):
        _unlink(name)


def _unlink(name: str) -> None:
    with suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(name)


class Control:
    """A mapped control segment: all that the broker needs.

    Fields of a slot's header are written only by the side that the module's drawing names.
    """

    def __init__(self, fd: int) -> None:
        """Map the segment behind `fd`, which stays the caller's.  Raises `PoolError` if it is not whole."""
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

    def slot_header(self, slot: int) -> SlotHeader:
        """The slot's header now."""
        first = self._word(slot)
        return SlotHeader(*self._words[first : first + _FIELDS])

    def slot_owners(self) -> Iterator[Owner | None]:
        """Who holds each slot, in order, as the headers say; what `LeaseTable.rebuild` takes."""
        for slot in range(self.header.geometry.slot_count):
            header = self.slot_header(slot)
            yield Owner(header.owner - 1, header.epoch) if header.owner else None

    def grant(self, slot: int, owner: Owner) -> None:
        """Write that the slot is the owner's; before the GRANT is sent."""
        first = self._word(slot)
        self._words[first + _SEQUENCE] = (self._words[first + _SEQUENCE] + 1) & 0xFFFFFFFF
        self._words[first + _TAG] = 0
        self._words[first + _EPOCH] = owner.epoch
        self._words[first + _OWNER] = owner.queue + 1

    def release(self, slot: int) -> None:
        """Write that the slot is free; before it can be granted again."""
        first = self._word(slot)
        self._words[first + _OWNER] = 0
        self._words[first + _TAG] = 0

    def statistics_block(self, queue: int) -> bytes:
        """A copy of what the queue's worker last wrote there; its layout is the worker's."""
        if not 0 <= queue < self.header.queues:
            raise PoolError(f"queue {queue} is none of the {self.header.queues} of this device")
        return self._map[stats_offset(queue) : stats_offset(queue) + PAGE_BYTES]

    def close(self) -> None:
        """Unmap.  Harmless twice."""
        self._words.release()
        self._view.release()
        self._map.close()

    def _word(self, slot: int) -> int:
        if not 0 <= slot < self.header.geometry.slot_count:
            raise PoolError(f"slot {slot} is none of the pool's {self.header.geometry.slot_count}")
        return slot_header_offset(self.header.queues, slot) // 4


class ArenaStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """An arena's sizes in bytes; `allocated_bytes` less than the sum of the others means missing pages."""

    device_number: int
    data_bytes: int
    control_bytes: int
    allocated_bytes: int


class Arena:
    """A device's pool: both segments open, the control segment mapped."""

    def __init__(
        self, data_fd: int, control_fd: int, name_prefix: str | None = None, huge: HugePages = "off"
    ) -> None:
        """Take over two open descriptors, which `close` closes.  Raises `PoolError`, having closed them."""
        self.data_fd = data_fd
        self.control_fd = control_fd
        self.name_prefix = name_prefix
        self.huge = huge
        try:
            for fd in (data_fd, control_fd):
                os.set_inheritable(fd, False)
            self.control = Control(control_fd)
        except (PoolError, OSError):
            self._close_fds()
            raise
        header = self.control.header
        self.device_number, self.queues = header.device_number, header.queues
        self.geometry, self.reserve = header.geometry, header.reserve
        try:
            self.huge_bytes = self._check_data(data_fd)
            """Of the data; as it was when the pool was made or opened here, or its data replaced."""
        except PoolError:
            self.close()
            raise

    def _check_data(self, fd: int) -> int:
        """How much of it huge pages hold.  Raises `PoolError` if it has not the size that the header says."""
        size_bytes = os.fstat(fd).st_size
        if size_bytes != self.geometry.total_bytes:
            raise PoolError(
                f"data segment has {size_bytes} bytes and its header says {self.geometry.total_bytes}"
            )
        return huge_bytes(fd, size_bytes)

    @classmethod
    def create(
        cls,
        name_prefix: str,
        geometry: Geometry,
        queues: int,
        device_number: int,
        reserve: Sequence[int],
        huge: HugePages = "off",
    ) -> Self:
        """Make both segments, allocate and populate them.  Raises `PoolError` and leaves nothing behind."""
        header = ControlHeader(device_number, queues, geometry, tuple(reserve))
        page = header.pack()
        name = _control_name(name_prefix)
        control_fd = make_named(name, control_bytes(queues, geometry.slot_count))
        try:
            os.pwrite(control_fd, page, 0)
            data_fd = make_data(_what(device_number), geometry.total_bytes, huge)
        except BaseException:
            os.close(control_fd)
            posix_ipc.unlink_shared_memory(name)
            raise
        return cls(data_fd, control_fd, name_prefix, huge)

    @classmethod
    def open(cls, name_prefix: str, data_fd: int | None = None, huge: HugePages = "off") -> Self:
        """Open a pool as it is: the control segment by its name, the data by a descriptor, which stays the caller's.

        Without one the data has a name, too, as earlier versions gave it.  Raises `PoolError` if there is no such pool,
        or no whole one.
        """
        fds = []
        try:
            if data_fd is None:
                fds.append(posix_ipc.SharedMemory(_data_name(name_prefix)).fd)
            else:
                fds.append(os.dup(data_fd))
            fds.append(posix_ipc.SharedMemory(_control_name(name_prefix)).fd)
        except (posix_ipc.Error, OSError) as error:
            for fd in fds:
                os.close(fd)
            raise PoolError(f"pool {name_prefix} cannot be opened: {error}") from error
        return cls(fds[0], fds[1], name_prefix, huge)

    @classmethod
    def from_fds(cls, data_fd: int, control_fd: int) -> Self:
        """Use descriptors that were inherited or received; they are the arena's from now on."""
        return cls(data_fd, control_fd)

    @property
    def is_sealed(self) -> bool:
        """Whether the size of the data is sealed; not so if an earlier version made it."""
        return is_sealed(self.data_fd)

    def new_data(self) -> int:
        """Other memory of this size, made like this one's.  Raises `PoolError`."""
        # The device is there, and would be helped less by none than by small pages.
        huge: HugePages = "off" if self.huge == "off" else "auto"
        return make_data(_what(self.device_number), self.geometry.total_bytes, huge)

    def replace_data(self, fd: int) -> None:
        """Have this memory, whose descriptor is the arena's from now on, in the place of the old.

        Raises `PoolError` if its size is another one; `fd` is closed then.
        """
        try:
            self.huge_bytes = self._check_data(fd)
        except PoolError:
            os.close(fd)
            raise
        os.close(self.data_fd)
        self.data_fd = fd

    def forget_old_data(self) -> None:
        """Remove the name that an earlier version gave the data, which keeps its memory allocated."""
        if self.name_prefix is not None:
            _unlink(_data_name(self.name_prefix))

    def unlink(self) -> None:
        """Remove the names.  The memory lives until everybody has closed it."""
        if self.name_prefix is None:
            raise PoolError("a pool opened by descriptor does not know its names")
        unlink_arena(self.name_prefix)

    def close(self) -> None:
        """Unmap and close here.  Harmless twice."""
        self.control.close()
        self._close_fds()

    def statistics(self) -> ArenaStatistics:
        """Sizes now."""
        stats = [os.fstat(fd) for fd in (self.data_fd, self.control_fd)]
        return ArenaStatistics(
            device_number=self.device_number,
            data_bytes=stats[0].st_size,
            control_bytes=stats[1].st_size,
            allocated_bytes=sum(each.st_blocks for each in stats) * 512,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_fds(self) -> None:
        for fd in (self.data_fd, self.control_fd):
            if fd >= 0:
                os.close(fd)
        self.data_fd = self.control_fd = -1


def open_control(name_prefix: str) -> Control:
    """The control segment of a pool, found by its name.  Raises `PoolError` if there is none."""
    try:
        fd = posix_ipc.SharedMemory(_control_name(name_prefix)).fd
    except posix_ipc.Error as error:
        raise PoolError(f"pool {name_prefix} cannot be opened: {error}") from error
    try:
        return Control(fd)
    finally:
        os.close(fd)


def _what(device_number: int) -> str:
    return f"the pool of device {device_number}"


def _data_name(name_prefix: str) -> str:
    return f"{name_prefix}-data"


def _control_name(name_prefix: str) -> str:
    return f"{name_prefix}-ctl"
