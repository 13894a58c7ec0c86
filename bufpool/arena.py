"""The pool's memory: two POSIX shared memory objects per device, and what the control one contains.

Owns names, allocation, sizes and the control segment's layout.  Must not know leases' rules, sockets or the
kernel. The daemon creates and unlinks; workers and the broker map what they inherit or are sent.

The **data** object holds the buffers and nothing else, and its descriptor goes to the backend.  The
**control** object goes to workers and the broker only.  Both are 0600, allocated in full and populated before
anyone uses them: a page that is missing when the kernel copies would stall the device.  A size is checked
against the header at open. Memory handed out this way is trusted not to be truncated: POSIX shared memory
cannot be sealed.

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

import errno
import mmap
import os
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import msgspec
import posix_ipc

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.huge_pages import HugePages, SharedMap, whole_bytes
from ublkpool.bufpool.lease import Owner
from ublkpool.bufpool.limits import CLASS_COUNT_MAX, PAGE_BYTES, QUEUE_COUNT_MAX, Geometry, SizeClass
from ublkpool.bufpool.way_out import explain

assert sys.byteorder == "little", "slot headers are single 32-bit stores in native byte order"

CONTROL_MAGIC = b"UBLKPOOL"
CONTROL_VERSION = 1
CLASSES_OFFSET = 64
SLOT_HEADER_BYTES = 16
SHM_DIRECTORY = Path("/dev/shm")

_HEADER = struct.Struct("<8sIIIIIIQ")
_CLASS = struct.Struct("<QIIIIQ")
_FIELDS = SLOT_HEADER_BYTES // 4
_OWNER, _EPOCH, _TAG, _SEQUENCE = range(_FIELDS)
_MADV_POPULATE_WRITE = 23
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
    """The name that both objects of a device begin with; `instance` tells daemons on one machine apart."""
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
    """Remove both names, whichever exist; whoever has the objects open keeps the memory."""
    for name in _names(name_prefix):
        try:
            posix_ipc.unlink_shared_memory(name)
        except posix_ipc.ExistentialError:
            continue


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
    """A device's pool: both objects open, the control segment mapped."""

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
        size_bytes = os.fstat(data_fd).st_size
        if size_bytes != self.geometry.total_bytes:
            self.close()
            raise PoolError(
                f"data segment has {size_bytes} bytes and its header says {self.geometry.total_bytes}"
            )
        try:
            self.huge_bytes = _huge_bytes(data_fd, size_bytes)
            """Of the data; as it was when the pool was made, opened or mended here."""
        except OSError as error:
            self.close()
            raise PoolError(f"data segment cannot be mapped: {error}") from error

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
        """Make both objects, allocate and populate them.  Raises `PoolError` and leaves nothing behind."""
        header = ControlHeader(device_number, queues, geometry, tuple(reserve))
        page = header.pack()
        sizes_bytes = (geometry.total_bytes, control_bytes(queues, geometry.slot_count))
        fds: list[int] = []
        names = _names(name_prefix)
        try:
            for name, size_bytes in zip(names, sizes_bytes, strict=True):
                fds.append(_create_object(name))
                _allocate(fds[-1], name, size_bytes)
            os.pwrite(fds[1], page, 0)
            _make_huge(fds[0], names[0], sizes_bytes[0], huge)
        except BaseException:
            # Only names whose creation succeeded are ours to remove: the next one may be another pool's.
            for fd, name in zip(fds, names, strict=False):
                os.close(fd)
                posix_ipc.unlink_shared_memory(name)
            raise
        return cls(fds[0], fds[1], name_prefix, huge)

    @classmethod
    def open(cls, name_prefix: str, huge: HugePages = "off") -> Self:
        """Open a pool as it is; `huge` is for `mend`.  Raises `PoolError` if there is none, or no whole one."""
        fds: list[int] = []
        try:
            fds.extend(posix_ipc.SharedMemory(name).fd for name in _names(name_prefix))
        except posix_ipc.Error as error:
            for fd in fds:
                os.close(fd)
            raise PoolError(f"pool {name_prefix} cannot be opened: {error}") from error
        return cls(fds[0], fds[1], name_prefix, huge)

    @classmethod
    def from_fds(cls, data_fd: int, control_fd: int) -> Self:
        """Use descriptors that were inherited or received; they are the arena's from now on."""
        return cls(data_fd, control_fd)

    def is_whole(self) -> bool:
        """Whether the data has its size: whoever can write to it can change that, and no shared memory of a name can be
        sealed."""
        return os.fstat(self.data_fd).st_size == self.geometry.total_bytes

    def mend(self) -> None:
        """Give the data its size again, allocated and populated; what was cut off is zeros.  Raises `PoolError`."""
        size_bytes = self.geometry.total_bytes
        os.ftruncate(self.data_fd, size_bytes)
        name = f"the pool of device {self.device_number}"
        _allocate(self.data_fd, name, size_bytes)
        # Nobody would be helped by a device that ends now, so none are required any more.
        _make_huge(self.data_fd, name, size_bytes, "off" if self.huge == "off" else "auto")
        self.huge_bytes = _huge_bytes(self.data_fd, size_bytes)

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


def _names(name_prefix: str) -> tuple[str, str]:
    return f"{name_prefix}-data", f"{name_prefix}-ctl"


def _create_object(name: str) -> int:
    try:
        fd: int = posix_ipc.SharedMemory(name, flags=posix_ipc.O_CREX, mode=0o600).fd
    except posix_ipc.ExistentialError as error:
        raise PoolError(
            f"{name} exists already: another daemon's, or left by a killed one; unlink it"
        ) from error
    except (posix_ipc.Error, OSError) as error:
        raise PoolError(f"{name} cannot be created: {error}") from error
    os.set_inheritable(fd, False)
    return fd


def _allocate(fd: int, name: str, size_bytes: int) -> None:
    """Allocate, then touch every page: the kernel's copy must never be the first to need one."""
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        with mmap.mmap(fd, size_bytes) as mapping:
            mapping.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise _no_space(name, size_bytes) from error
        raise PoolError(f"{name} of {_mib(size_bytes)} cannot be allocated: {explain(error)}") from error


def _make_huge(fd: int, name: str, size_bytes: int, huge: HugePages) -> None:
    if huge == "off":
        return
    with SharedMap(fd, size_bytes) as mapping:
        mapping.collapse()
        if huge == "require":
            _check_huge(name, size_bytes, mapping.huge_bytes())


def _huge_bytes(fd: int, size_bytes: int) -> int:
    if not whole_bytes(size_bytes):
        return 0
    with SharedMap(fd, size_bytes) as mapping:
        return mapping.huge_bytes()


def _check_huge(name: str, size_bytes: int, huge_bytes: int) -> None:
    wanted_bytes = whole_bytes(size_bytes)
    if not wanted_bytes:
        raise PoolError(
            f"{name} of {_mib(size_bytes)} is smaller than a huge page: use huge_pages auto or off"
        )
    if huge_bytes < wanted_bytes:
        raise PoolError(
            f"{name} has {_mib(huge_bytes)} of {_mib(wanted_bytes)} in huge pages, and huge_pages says require: "
            "free memory, or echo 1 > /proc/sys/vm/compact_memory; "
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled must not be deny"
        )


def _no_space(name: str, size_bytes: int) -> PoolError:
    usage = os.statvfs(SHM_DIRECTORY)
    free = _mib(usage.f_bavail * usage.f_frsize)
    return PoolError(
        f"{name} needs {_mib(size_bytes)} of {SHM_DIRECTORY} where {free} are free: "
        f"lower the device's queues, depth or pool, or mount {SHM_DIRECTORY} with a larger size"
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
