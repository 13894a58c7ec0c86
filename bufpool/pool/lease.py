"""The table of leases behind the broker: which worker holds which buffer of a device's pool.

Owns ownership: a buffer is free, or leased to one (queue, epoch).  Pure: no I/O, no clock, no shared memory, so that
the simulation runs the same table; only the broker process uses it at run time.  Must not know how a lease travels.

What always holds:

- A slot is free or has one owner; a queue has one owner at a time, and a reclaimed epoch never comes back.
- The free buffers of a class cover what the queues lack of their reserves, so a queue below its reserve never waits.
- While a queue waits, no buffer beyond those reserves is free, so no other queue can overtake it.  Waiting queues are
  served in turn, one buffer at a time; within a queue only the number of wanted buffers counts.

No request of a worker raises: a wrong slot, class or owner is ignored, counted, and kept as a `LeaseError` to show.
Every change of ownership is also queued for `take_changes`: the broker writes the changes to the slot headers before it
sends a GRANT, so that its successor never takes a worker's buffer for free.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import msgspec

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.pool.size_pool import SizePool


class LeaseError(PoolError):
    """A lease or return that contradicts the table."""


class Owner(NamedTuple):
    """A worker: its queue and the device epoch in which it was started."""

    queue: int
    epoch: int


class Grant(NamedTuple):
    """These slots are the owner's from now on."""

    owner: Owner
    size_class: int
    slots: tuple[int, ...]


class Recall(NamedTuple):
    """Another queue waits: the owner should return `owed` buffers in all, but keep its reserve."""

    owner: Owner
    size_class: int
    owed: int


class Change(NamedTuple):
    """A slot's new owner; None: the slot is free."""

    slot: int
    owner: Owner | None


class Synced(NamedTuple):
    """The result of comparing the table with a worker's own list."""

    freed: tuple[int, ...]
    """Slots that only the table counted as the worker's (a GRANT or RETURN was lost); they are free again."""
    conflicts: tuple[int, ...]
    """Slots that only the worker counts as its own: the table is right, and their owners keep them."""
    grants: list[Grant]


class ClassStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """One buffer size, counted in buffers."""

    buffer_bytes: int
    count: int
    free: int
    leased: int
    waiting: int


class LeaseStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A table's state, and its counters in buffers since the broker started."""

    classes: tuple[ClassStatistics, ...]
    granted: int
    returned: int
    reclaimed: int
    rejected: int
    clipped: int
    """Wanted buffers that were not put on order, since the queue could never hold them."""
    conflicts: int
    last_error: str


class LeaseTable:
    """The owner of each slot of one device; see the module."""

    def __init__(self, geometry: Geometry, reserve: Sequence[int], queues: int) -> None:
        if len(reserve) != len(geometry.classes):
            raise LeaseError(f"{len(reserve)} reserves for {len(geometry.classes)} buffer sizes")
        for size_class, each in zip(geometry.classes, reserve, strict=True):
            if each < 0 or each * queues > size_class.count:
                raise LeaseError(f"{queues} queues reserve {each} each of {size_class.count} buffers")
        self.geometry = geometry
        self._pools = [
            SizePool(size_class.slots, each, queues)
            for size_class, each in zip(geometry.classes, reserve, strict=True)
        ]
        self._queue_of: list[int | None] = [None] * geometry.slot_count
        self._owners: list[Owner | None] = [None] * queues
        self._epoch_min = [0] * queues
        self._changes: list[Change] = []
        self._granted = self._returned = self._reclaimed = 0
        self._rejected = self._clipped = self._conflicts = 0
        self._last_error: LeaseError | None = None

    def register(self, owner: Owner) -> list[Grant]:
        """Make `owner` its queue's worker and grant it its reserves.  Harmless for the same owner again.

        Raises `LeaseError` if the queue still has another owner, or if the epoch was reclaimed.
        """
        if not 0 <= owner.queue < len(self._owners):
            raise LeaseError(f"queue {owner.queue} is none of the {len(self._owners)} of this device")
        current = self._owners[owner.queue]
        if current is not None and current != owner:
            raise LeaseError(
                f"queue {owner.queue} still belongs to epoch {current.epoch}: reclaim that first"
            )
        if owner.epoch < self._epoch_min[owner.queue]:
            raise LeaseError(f"epoch {owner.epoch} of queue {owner.queue} is over")
        self._owners[owner.queue] = owner
        return [grant for index in range(len(self._pools)) for grant in self._fill_reserve(owner, index)]

    def is_current(self, owner: Owner) -> bool:
        """Whether this is the queue's registered worker."""
        return 0 <= owner.queue < len(self._owners) and self._owners[owner.queue] == owner

    def held_count(self, owner: Owner) -> int:
        """How many buffers of any size the owner holds."""
        return sum(pool.held[owner.queue] for pool in self._pools) if self.is_current(owner) else 0

    def lease(self, owner: Owner, size_class: int, want: int) -> tuple[int, ...]:
        """Lease up to `want` buffers that are free for this owner now; it waits for the others, see `on_order`."""
        if not self._may(owner, size_class) or want <= 0:
            self._reject(f"no lease of {want} buffers of class {size_class} for {owner}")
            return ()
        pool = self._pools[size_class]
        count = min(want, max(0, pool.available(owner.queue)))
        slots = self._take(owner, pool, count)
        self._clipped += pool.wait(owner.queue, want - count)
        return slots

    def on_order(self, owner: Owner, size_class: int) -> int:
        """How many buffers the owner waits for: wanted, not yet granted."""
        return self._pools[size_class].wanted[owner.queue] if self._may(owner, size_class) else 0

    def give_back(self, owner: Owner, slots: Iterable[int]) -> list[Grant]:
        """Take these slots from their owner, and grant them to waiting queues."""
        touched: set[int] = set()
        for slot in slots:
            if not self._holds(owner, slot):
                self._reject(f"slot {slot} is not held by {owner}")
                continue
            touched.add(self._free(slot))
            self._returned += 1
        return self._serve(touched)

    def reclaim(self, owner: Owner) -> list[Grant]:
        """Take all slots from a dead owner, once, and grant them to waiting queues; its epoch is over."""
        if not 0 <= owner.queue < len(self._owners):
            self._reject(f"nothing to reclaim from {owner}")
            return []
        self._epoch_min[owner.queue] = max(self._epoch_min[owner.queue], owner.epoch + 1)
        if not self.is_current(owner):
            return []
        self.cancel(owner)
        held = [slot for slot, queue in enumerate(self._queue_of) if queue == owner.queue]
        touched = {self._free(slot) for slot in held}
        self._owners[owner.queue] = None
        self._reclaimed += len(held)
        return self._serve(touched)

    def cancel(self, owner: Owner) -> None:
        """End the owner's waiting."""
        if self.is_current(owner):
            for pool in self._pools:
                pool.cancel(owner.queue)

    def sync(self, owner: Owner, size_class: int, held: Collection[int]) -> Synced:
        """Take over the owner's own list of what it holds of a class, except slots that the table gives to others.

        Its waiting ends, since it asks again, and it is granted what it lacks of its reserve.
        """
        if not self._may(owner, size_class):
            self._reject(f"no sync of class {size_class} for {owner}")
            return Synced((), (), [])
        slots = self.geometry.classes[size_class].slots
        believed = {slot for slot in slots if self._queue_of[slot] == owner.queue}
        claimed = set(held)
        conflicts = tuple(sorted(claimed - believed))
        self._note_conflicts(owner, conflicts)
        freed = tuple(sorted(believed - claimed))
        for slot in reversed(freed):
            self._free(slot)
        self._pools[size_class].cancel(owner.queue)
        return Synced(freed, conflicts, [*self._fill_reserve(owner, size_class), *self._serve([size_class])])

    def rebuild(self, owners: Iterable[Owner | None]) -> tuple[Owner, ...]:
        """Fill a new table from the slot headers, one owner per slot in order; returns the owners that were found.

        A queue's newest epoch counts: it was registered after everything older had been reclaimed.  A slot that names
        an older epoch, or a queue that does not exist, is free.  Raises `LeaseError` for a table in use or a wrong
        count.
        """
        found = list(owners)
        if len(found) != len(self._queue_of) or any(each is not None for each in self._owners):
            raise LeaseError("only a new table can be rebuilt, and from one owner per slot")
        for owner in filter(None, found):
            if 0 <= owner.queue < len(self._owners):
                current = self._owners[owner.queue]
                self._owners[owner.queue] = max(owner, current) if current else owner
        for slot, named in enumerate(found):
            if named is not None:
                self._restore(slot, named)
        self._rebuild_free_lists()
        return tuple(owner for owner in self._owners if owner is not None)

    def recalls(self) -> list[Recall]:
        """The owners to ask for buffers because other queues wait; each call returns only what is new."""
        return [
            Recall(owner, index, pool.recalled[queue])
            for index, pool in enumerate(self._pools)
            for queue in pool.recalls()
            if (owner := self._owners[queue]) is not None
        ]

    def take_changes(self) -> list[Change]:
        """The changes of ownership since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def owner_of(self, slot: int) -> Owner | None:
        """The slot's owner; None: it is free."""
        queue = self._queue_of[slot]
        return None if queue is None else self._owners[queue]

    @property
    def last_error(self) -> LeaseError | None:
        """The newest rejection or conflict."""
        return self._last_error

    def statistics(self) -> LeaseStatistics:
        """The table's state and counters."""
        return LeaseStatistics(
            classes=tuple(
                ClassStatistics(
                    buffer_bytes=size_class.buffer_bytes,
                    count=size_class.count,
                    free=len(pool.free),
                    leased=size_class.count - len(pool.free),
                    waiting=sum(pool.wanted),
                )
                for size_class, pool in zip(self.geometry.classes, self._pools, strict=True)
            ),
            granted=self._granted,
            returned=self._returned,
            reclaimed=self._reclaimed,
            rejected=self._rejected,
            clipped=self._clipped,
            conflicts=self._conflicts,
            last_error="" if self._last_error is None else str(self._last_error),
        )

    def _may(self, owner: Owner, size_class: int) -> bool:
        return self.is_current(owner) and 0 <= size_class < len(self._pools)

    def _holds(self, owner: Owner, slot: int) -> bool:
        known = self.is_current(owner) and 0 <= slot < len(self._queue_of)
        return known and self._queue_of[slot] == owner.queue

    def _reject(self, reason: str) -> None:
        self._rejected += 1
        self._last_error = LeaseError(reason)

    def _note_conflicts(self, owner: Owner, slots: tuple[int, ...]) -> None:
        if slots:
            self._conflicts += len(slots)
            self._last_error = LeaseError(
                f"{owner} claims {len(slots)} slots that are not its own, first {slots[0]}"
            )

    def _take(self, owner: Owner, pool: SizePool, count: int) -> tuple[int, ...]:
        slots = tuple(pool.take(owner.queue) for _ in range(count))
        self._note_taken(owner, slots)
        return slots

    def _note_taken(self, owner: Owner, slots: Sequence[int]) -> None:
        for slot in slots:
            self._queue_of[slot] = owner.queue
            self._changes.append(Change(slot, owner))
        self._granted += len(slots)

    def _free(self, slot: int) -> int:
        """Free a leased slot; returns its class."""
        queue = self._queue_of[slot]
        assert queue is not None
        size_class = self.geometry.class_of(slot)
        self._pools[size_class].put(queue, slot)
        self._queue_of[slot] = None
        self._changes.append(Change(slot, None))
        return size_class

    def _fill_reserve(self, owner: Owner, size_class: int) -> list[Grant]:
        pool = self._pools[size_class]
        count = min(pool.lacking(owner.queue), max(0, pool.available(owner.queue)))
        return [Grant(owner, size_class, self._take(owner, pool, count))] if count else []

    def _serve(self, size_classes: Iterable[int]) -> list[Grant]:
        grants = []
        for size_class in sorted(size_classes):
            for queue, slots in self._pools[size_class].serve().items():
                owner = self._owners[queue]
                assert owner is not None, "only a queue with an owner waits"
                self._note_taken(owner, slots)
                grants.append(Grant(owner, size_class, tuple(slots)))
        return grants

    def _restore(self, slot: int, owner: Owner) -> None:
        if self.is_current(owner):
            self._queue_of[slot] = owner.queue
        else:
            self._changes.append(Change(slot, None))
            self._note_conflicts(owner, (slot,))

    def _rebuild_free_lists(self) -> None:
        for size_class, pool in zip(self.geometry.classes, self._pools, strict=True):
            pool.free = [slot for slot in reversed(size_class.slots) if self._queue_of[slot] is None]
            for slot in size_class.slots:
                queue = self._queue_of[slot]
                if queue is not None:
                    pool.held[queue] += 1
            pool.unclaimed = sum(pool.lacking(queue) for queue in range(len(pool.held)))
