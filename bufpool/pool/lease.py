"""Who holds which buffer of a device's pool: the table behind the broker.

Owns ownership: free, or leased to one (queue, epoch).  Pure: no I/O, no clock, no shared memory, so that the
simulation runs the very same table; the broker process is its only user at run time.  Must not know how a
lease travels.

What always holds:

- A slot is free or has one owner; a queue has one owner at a time, and a reclaimed epoch never comes back.
- Free buffers of a class cover what the reserves still lack, so a queue below its reserve never waits.
- While anyone waits, nothing beyond those reserves is free, so nobody can overtake.  Waiters are served one
  buffer at a time in turn over queues; within a queue a wish is only a count, so the first is served first.

Nothing a worker asks can raise: a wrong slot, class or owner is ignored, counted, and kept as a `LeaseError`
to show.  Every change of ownership is also queued for `take_changes`: the broker writes those to the slot
headers before it sends a GRANT, so that its successor never thinks free what a worker holds.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import msgspec

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool.limits import Geometry


class LeaseError(PoolError):
    """A wish or a return that does not fit who holds what."""


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
    """Others wait: the owner should return this many in all, never going below its reserve."""

    owner: Owner
    size_class: int
    owed: int


class Change(NamedTuple):
    """A slot's new owner; None is the broker."""

    slot: int
    owner: Owner | None


class Synced(NamedTuple):
    """What came of comparing the table with a worker's own list."""

    freed: tuple[int, ...]
    """The table's, but not the worker's: a GRANT or RETURN was lost; they are free again."""
    conflicts: tuple[int, ...]
    """The worker's, but not the table's: it must be wrong, and they stay whose they were."""
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
    """Wishes cut to what a queue could ever hold."""
    conflicts: int
    last_error: str


def held_max(count: int, reserve: int, queues: int) -> int:
    """The most of `count` buffers that one of `queues` can ever hold: the reserves of the others are theirs."""
    return count - reserve * (queues - 1)


class _ClassPool:
    """The buffers of one size: counting only, queues are numbers here and every argument is valid."""

    def __init__(self, slots: range, reserve: int, queues: int) -> None:
        # The buffer returned last is granted next: it is the one still in the caches.
        self.free = list(reversed(slots))
        self.held = [0] * queues
        self.wanted = [0] * queues
        self.asked = [0] * queues
        self.waiting: deque[int] = deque()
        self.reserve = reserve
        self.unclaimed = reserve * queues
        self.held_max = held_max(len(slots), reserve, queues)
        self.fair_share = len(slots) // queues

    def lacking(self, queue: int) -> int:
        return max(0, self.reserve - self.held[queue])

    def available(self, queue: int) -> int:
        return len(self.free) - (self.unclaimed - self.lacking(queue))

    def take(self, queue: int) -> int:
        self.unclaimed -= self.lacking(queue) > 0
        self.held[queue] += 1
        return self.free.pop()

    def put(self, queue: int, slot: int) -> None:
        self.free.append(slot)
        self.held[queue] -= 1
        self.unclaimed += self.lacking(queue) > 0
        self.asked[queue] = max(0, self.asked[queue] - 1)

    def wait(self, queue: int, count: int) -> int:
        """Note what the queue wishes beyond what it got; returns what was cut off."""
        room = self.held_max - self.held[queue] - self.wanted[queue]
        accepted = max(0, min(count, room))
        if accepted and not self.wanted[queue]:
            self.waiting.append(queue)
        self.wanted[queue] += accepted
        return count - accepted

    def cancel(self, queue: int) -> None:
        if self.wanted[queue]:
            self.waiting.remove(queue)
            self.wanted[queue] = 0
        self.asked[queue] = 0

    def serve(self) -> dict[int, list[int]]:
        """Give what is free to who waits, one buffer a turn, until a round in which nobody could have one."""
        given: dict[int, list[int]] = {}
        refused = 0
        while refused < len(self.waiting):
            queue = self.waiting.popleft()
            if self.available(queue) > 0:
                given.setdefault(queue, []).append(self.take(queue))
                self.wanted[queue] -= 1
                refused = 0
            else:
                refused += 1
            if self.wanted[queue]:
                self.waiting.append(queue)
        if not self.waiting:
            self.asked = [0] * len(self.asked)
        return given

    def recalls(self) -> list[int]:
        """The queues that should be asked for more than before; `asked` says how much in all.

        Idle holders go down to their reserve first.  Holders that wait themselves only give up what is above
        an even share, and only to waiters below one.
        """
        if not self.waiting:
            return []
        due = sum(self.asked)
        idle = [queue for queue in range(len(self.held)) if not self.wanted[queue]]
        recalled = self._ask(idle, self.reserve, sum(self.wanted) - due)
        poor = sum(
            min(self.wanted[queue], max(0, self.fair_share - self.held[queue])) for queue in self.waiting
        )
        busy_floor = max(self.reserve, self.fair_share)
        return recalled + self._ask(self.waiting, busy_floor, poor - sum(self.asked))

    def _ask(self, queues: Iterable[int], floor: int, count: int) -> list[int]:
        recalled = []
        for queue in sorted(queues, key=lambda each: -self.held[each]):
            more = min(count, self.held[queue] - self.asked[queue] - floor)
            if more > 0:
                self.asked[queue] += more
                count -= more
                recalled.append(queue)
        return recalled


class LeaseTable:
    """Who holds which slot of one device; see the module."""

    def __init__(self, geometry: Geometry, reserve: Sequence[int], queues: int) -> None:
        if len(reserve) != len(geometry.classes):
            raise LeaseError(f"{len(reserve)} reserves for {len(geometry.classes)} buffer sizes")
        for size_class, each in zip(geometry.classes, reserve, strict=True):
            if each < 0 or each * queues > size_class.count:
                raise LeaseError(f"{queues} queues reserve {each} each of {size_class.count} buffers")
        self.geometry = geometry
        self._pools = [
            _ClassPool(size_class.slots, each, queues)
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
        """Make `owner` its queue's worker, with its reserves in hand.  Harmless for the same owner again.

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
        """As many of `want` buffers as are free for this owner now; it waits for the others, see `on_order`."""
        if not self._may(owner, size_class) or want <= 0:
            self._reject(f"no lease of {want} buffers of class {size_class} for {owner}")
            return ()
        pool = self._pools[size_class]
        count = min(want, max(0, pool.available(owner.queue)))
        slots = self._take(owner, pool, count)
        self._clipped += pool.wait(owner.queue, want - count)
        return slots

    def on_order(self, owner: Owner, size_class: int) -> int:
        """How many buffers the owner waits for: what of its wishes was neither granted nor cut."""
        return self._pools[size_class].wanted[owner.queue] if self._may(owner, size_class) else 0

    def give_back(self, owner: Owner, slots: Iterable[int]) -> list[Grant]:
        """Take these slots from their owner, and grant them to who waits."""
        touched: set[int] = set()
        for slot in slots:
            if not self._holds(owner, slot):
                self._reject(f"slot {slot} is not held by {owner}")
                continue
            touched.add(self._free(slot))
            self._returned += 1
        return self._serve(touched)

    def reclaim(self, owner: Owner) -> list[Grant]:
        """Take everything from a dead owner, once; its epoch is over.  Grants what came free to who waits."""
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
        """Forget what the owner waits for."""
        if self.is_current(owner):
            for pool in self._pools:
                pool.cancel(owner.queue)

    def sync(self, owner: Owner, size_class: int, held: Collection[int]) -> Synced:
        """Believe the owner's own list of what it holds of a class, where nothing contradicts it.

        What it waited for is forgotten: it asks again.  It is brought up to its reserve.
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
        """Become what the slot headers say, one owner per slot in order; returns the owners that were found.

        A queue's newest epoch counts: it was registered after everything older had been reclaimed, so a slot
        that still names an older one is free, and so is one that names a queue that does not exist.
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
        """Whom to ask for buffers now because others wait; each call says only what is new."""
        return [
            Recall(owner, index, pool.asked[queue])
            for index, pool in enumerate(self._pools)
            for queue in pool.recalls()
            if (owner := self._owners[queue]) is not None
        ]

    def take_changes(self) -> list[Change]:
        """The changes of ownership since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def owner_of(self, slot: int) -> Owner | None:
        """Who holds the slot; None: it is free."""
        queue = self._queue_of[slot]
        return None if queue is None else self._owners[queue]

    @property
    def last_error(self) -> LeaseError | None:
        """The newest of what was rejected or in conflict."""
        return self._last_error

    def statistics(self) -> LeaseStatistics:
        """The table now."""
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

    def _take(self, owner: Owner, pool: _ClassPool, count: int) -> tuple[int, ...]:
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
