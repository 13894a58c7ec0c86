"""How many buffers of which size a device's pool holds, each number with its reason.

Owns `Geometry` and the arithmetic behind it; knows nothing of memory, processes or sockets.  Pure.

Every buffer of a pool is, at any moment, with exactly one of these holders:

    holder   need_get_data off                     need_get_data on
    -------  ------------------------------------  ----------------------------------------------------------
    a tag    one of the largest size from FETCH    one that fits, from the request's arrival until the kernel
             on, since a write lands there before  has consumed the commit and the backend has let go: `tags`
             the request arrives: `depth` a queue  a queue, fewer the larger the buffer
    stock    none: nothing to pull ahead           pulled before it is needed (or on its way back), so that no
                                                   request waits for a round trip to the broker: `stock`
    broker   none                                  none is needed: what is free waits for a tag or a stock
    dead     none: a dead worker's buffers are reclaimed before its successor is registered

A queue's reserve are the buffers that no other queue can take from it: without need_get_data all that it holds, with
need_get_data one buffer of each size, so that its oldest request always proceeds.  A worker's private scratch buffer is
its own memory and is not counted here.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import msgspec

from ublkpool.bufpool.errors import PoolError

PAGE_BYTES = 4096
CLASS_COUNT_MAX = 8
QUEUE_COUNT_MAX = 4096
DEPTH_MAX = 4096
IO_BYTES_MAX = 32 << 20
_SLOT_COUNT_MAX = (1 << 32) - 1

SMALL_BYTES = 4 << 10
"""File system metadata and database pages: most requests by number."""
MIDDLE_BYTES = 64 << 10
"""Readahead and writeback in pieces."""
LARGE_BYTES = 1 << 20
"""Streaming; a device that allows larger requests gets one more size for them."""


class SizeClass(msgspec.Struct, frozen=True):
    """The buffers of one size: slots from `first_slot`, back to back from byte `base_offset` of the data."""

    buffer_bytes: int
    count: int
    first_slot: int
    base_offset: int

    @property
    def slots(self) -> range:
        return range(self.first_slot, self.first_slot + self.count)


class Geometry(msgspec.Struct, frozen=True):
    """Where every buffer of a pool lies; classes ascend in size, slots are numbered across them."""

    classes: tuple[SizeClass, ...]

    @classmethod
    def build(cls, sizes_and_counts: Sequence[tuple[int, int]]) -> Self:
        """The geometry with these (buffer_bytes, count), which must ascend in whole pages."""
        classes: list[SizeClass] = []
        slot = offset = 0
        for buffer_bytes, count in sizes_and_counts:
            classes.append(SizeClass(buffer_bytes, count, slot, offset))
            slot += count
            offset += buffer_bytes * count
        geometry = cls(tuple(classes))
        geometry.check()
        return geometry

    def check(self) -> None:
        """Raise `PoolError` unless classes ascend in whole pages and lie back to back."""
        if not 1 <= len(self.classes) <= CLASS_COUNT_MAX:
            raise PoolError(f"a pool has 1 to {CLASS_COUNT_MAX} buffer sizes, not {len(self.classes)}")
        slot = offset = size_before_bytes = 0
        for each in self.classes:
            if each.buffer_bytes % PAGE_BYTES or each.buffer_bytes <= size_before_bytes or each.count < 1:
                raise PoolError(
                    f"{each.count} buffers of {each.buffer_bytes} bytes: not ascending whole pages"
                )
            if (each.first_slot, each.base_offset) != (slot, offset):
                raise PoolError(f"buffers of {each.buffer_bytes} bytes do not follow the ones before")
            size_before_bytes = each.buffer_bytes
            slot += each.count
            offset += each.buffer_bytes * each.count
        if slot > _SLOT_COUNT_MAX:
            raise PoolError(f"{slot} buffers are more than slot numbers of 32 bits can name")

    @property
    def slot_count(self) -> int:
        last = self.classes[-1]
        return last.first_slot + last.count

    @property
    def total_bytes(self) -> int:
        last = self.classes[-1]
        return last.base_offset + last.buffer_bytes * last.count

    def class_of(self, slot: int) -> int:
        """The index of the class that `slot` belongs to."""
        for index, each in enumerate(self.classes):
            if slot in each.slots:
                return index
        raise PoolError(f"slot {slot} is none of the pool's {self.slot_count}")

    def slot_offset(self, slot: int) -> int:
        """Where the slot's buffer begins in the data segment."""
        size_class = self.classes[self.class_of(slot)]
        return size_class.base_offset + (slot - size_class.first_slot) * size_class.buffer_bytes


class QueueShare(NamedTuple):
    """The buffers of one size that one queue needs, summed over their holders."""

    buffer_bytes: int
    tags: int
    stock: int
    reserve: int

    @property
    def total(self) -> int:
        return self.tags + self.stock


def pool_geometry(
    queues: int,
    depth: int,
    max_io_bytes: int,
    need_get_data: bool,
    placement: Literal["pool", "backend"],
    pool_bytes: int | None = None,
) -> tuple[Geometry, tuple[int, ...]]:
    """The geometry of a device's pool, and the reserve of each class in buffers per queue.

    `pool_bytes` scales the part above the reserves, up to what the queues can hold at all.  Raises
    `PoolError` if it is below what progress needs.
    """
    _check_device(queues, depth, max_io_bytes, need_get_data, placement)
    buffer_bytes_max = _whole_pages(max_io_bytes)
    if need_get_data:
        shares = [_share(size, depth, placement) for size in _sizes(buffer_bytes_max)]
    else:
        shares = [QueueShare(buffer_bytes_max, tags=depth, stock=0, reserve=depth)]
    counts = _counts(shares, queues, depth, pool_bytes)
    sizes = [share.buffer_bytes for share in shares]
    return Geometry.build(list(zip(sizes, counts, strict=True))), tuple(share.reserve for share in shares)


def _check_device(queues: int, depth: int, max_io_bytes: int, need_get_data: bool, placement: str) -> None:
    if not 1 <= queues <= QUEUE_COUNT_MAX:
        raise PoolError(f"{queues} queues: a device has 1 to {QUEUE_COUNT_MAX}")
    if not 1 <= depth <= DEPTH_MAX:
        raise PoolError(f"depth {depth}: a queue has 1 to {DEPTH_MAX} tags")
    if not 1 <= max_io_bytes <= IO_BYTES_MAX:
        raise PoolError(f"max_io of {max_io_bytes} bytes: a request has 1 to {IO_BYTES_MAX} bytes")
    if placement == "backend" and not need_get_data:
        raise PoolError(
            "placement backend needs need_get_data: without it writes land before anyone is asked"
        )


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _sizes(buffer_bytes_max: int) -> list[int]:
    smaller = [size for size in (SMALL_BYTES, MIDDLE_BYTES, LARGE_BYTES) if size < buffer_bytes_max]
    return [*smaller, buffer_bytes_max]


def _share(buffer_bytes: int, depth: int, placement: str) -> QueueShare:
    tags = _tags(buffer_bytes, depth)
    if placement == "backend":
        # Writes land in the backend's own memory, so that only reads come here, and not all of those.
        tags = max(1, tags // 2)
    # A quarter of what is in flight arrives during the round trip that refills the stock.
    return QueueShare(buffer_bytes, tags, stock=max(1, tags // 4), reserve=1)


def _tags(buffer_bytes: int, depth: int) -> int:
    """How many tags of a queue may hold such a buffer at once; with more, bandwidth would be the limit."""
    if buffer_bytes <= SMALL_BYTES:
        return depth
    if buffer_bytes <= MIDDLE_BYTES:
        return max(1, depth // 4)
    if buffer_bytes <= LARGE_BYTES:
        return min(depth, max(2, depth // 16))
    return min(depth, 2)


def _counts(shares: Sequence[QueueShare], queues: int, depth: int, pool_bytes: int | None) -> list[int]:
    reserved = [queues * share.reserve for share in shares]
    extra = [queues * (share.total - share.reserve) for share in shares]
    if pool_bytes is None:
        return [sum(pair) for pair in zip(reserved, extra, strict=True)]
    bytes_min = sum(share.buffer_bytes * count for share, count in zip(shares, reserved, strict=True))
    if pool_bytes < bytes_min:
        raise PoolError(
            f"pool of {pool_bytes} bytes is too small: {_reserve_sum(shares, queues)} need {bytes_min}"
        )
    extra_bytes = sum(share.buffer_bytes * count for share, count in zip(shares, extra, strict=True))
    scaled = [count * (pool_bytes - bytes_min) // max(1, extra_bytes) for count in extra]
    # Buffers beyond one for each tag and the stock would never be used.
    caps = [queues * (depth + share.stock) for share in shares]
    return [min(cap, sum(pair)) for cap, *pair in zip(caps, reserved, scaled, strict=True)]


def _reserve_sum(shares: Sequence[QueueShare], queues: int) -> str:
    each = " + ".join(f"{share.reserve} x {share.buffer_bytes >> 10} KiB" for share in shares)
    return f"{queues} queues of {each}"
