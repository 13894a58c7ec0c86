"""Queue cores on plain memory: pool, slot headers, descriptor arrays and statistics that a test owns.

Knows the core's memory and the real lease table, but not drivers or backends.  `Ledger` records the users of each pool
buffer from the outside, so that a buffer with two users is found whatever the core believes.
"""

import os
from collections import deque
from typing import Any, NamedTuple

import msgspec

from ublkpool.bufpool.pool.lease import Grant, LeaseTable, Owner, Recall
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.pool.size_pool import held_max
from ublkpool.bufpool.wire import SEGMENT_CLIENTS
from ublkpool.ublk import _native, mappings
from ublkpool.ublk.queue import Attention, BufferClass, Command, Memory, Queue, QueueConfig
from ublkpool.ublk.statistics import Statistics, read_statistics
from ublkpool.workers.pool_link import Orders

_ffi, _lib = _native.ffi, _native.lib
DEVICE = 7
SLICE = 5
SEGMENT_SLICE = SEGMENT_CLIENTS + SLICE
POISON = 0xEE
ZEROS = -1
MESSAGES_TO_SETTLE_MAX = 1000


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a device under test; sizes in bytes, counts in buffers."""

    queues: int = 1
    depth: int = 4
    epoch: int = 3
    max_io_bytes: int = 16384
    block_bytes: int = 512
    need_get_data: bool = True
    zero_copy: bool = False
    place_in_backend: bool = False
    reads_own: bool = False
    posts: bool = False
    """Whether backends post regions ahead of need."""
    sizes: tuple[int, ...] = (4096,)
    """The sizes of buffers smaller than the largest."""
    timeout_ms: int = 0
    fail_on_timeout: bool = False
    absent_ms: int = 0
    answers_itself: bool = False
    slice_bytes: int = 0
    """The size of the client area's one slice; 0: no client area."""
    spare: int = 2
    """Buffers of each size above the queues' reserves."""

    @property
    def geometry(self) -> Geometry:
        if not self.leases_buffers:
            return Geometry.build([(self.max_io_bytes, self.queues * self.depth)])
        count = self.queues + self.spare
        return Geometry.build([(size, count) for size in (*self.sizes, self.max_io_bytes)])

    @property
    def reserve(self) -> int:
        return 1 if self.leases_buffers else self.depth

    @property
    def leases_buffers(self) -> bool:
        """Whether a tag has a buffer only while a request needs one."""
        return self.need_get_data or self.zero_copy

    def classes(self) -> tuple[BufferClass, ...]:
        return tuple(
            BufferClass(
                c.base_offset,
                c.buffer_bytes,
                c.count,
                c.first_slot,
                self.reserve,
                1,
                held_max(c.count, self.reserve, self.queues),
            )
            for c in self.geometry.classes
        )


class Area(NamedTuple):
    """Memory that the core may name; its number is a segment's, 0 for scratch, ZEROS for read-only zeros."""

    number: int
    base: Any
    size_bytes: int
    queue: int | None = None

    @property
    def address(self) -> int:
        return int(_ffi.cast("uintptr_t", self.base))

    @property
    def view(self) -> Any:
        return _ffi.buffer(self.base, self.size_bytes)


def new_area(number: int, size_bytes: int, queue: int | None = None) -> Area:
    return Area(number, _ffi.new("uint8_t[]", size_bytes), size_bytes, queue)


def _mapped_area(number: int, size_bytes: int) -> Area:
    fd = mappings.sealed_memory(size_bytes, "test-pool")
    try:
        base = _ffi.cast("uint8_t *", mappings.map_segment(fd, size_bytes))
    finally:
        os.close(fd)
    return Area(number, _ffi.gc(base, lambda at: mappings.unmap_segment(at, size_bytes)), size_bytes)


class Ledger:
    """The (queue, tag) that uses each pool buffer, as observed from outside."""

    def __init__(self) -> None:
        self.user_of: dict[int, tuple[int, int]] = {}
        self._slots_of: dict[tuple[int, int], int] = {}

    def use(self, slot: int, user: tuple[int, int]) -> None:
        assert self.user_of.setdefault(slot, user) == user, (
            f"slot {slot}: {user} uses what {self.user_of[slot]} has"
        )
        assert self._slots_of.setdefault(user, slot) == slot, f"{user} uses {slot} and {self._slots_of[user]}"

    def stop(self, user: tuple[int, int]) -> int | None:
        slot = self._slots_of.pop(user, None)
        if slot is not None:
            del self.user_of[slot]
        return slot


def check_durations(statistics: Statistics) -> None:
    """Check that every request that ended has a duration, whatever ended it."""
    read, write, *others = statistics.requests
    expected = {"read": read, "write": write, "other": sum(others)}
    counted = {name: sum(statistics.latencies[name].counts) for name in expected}
    assert counted == expected


class Side:
    """One queue's core and the memory around it."""

    def __init__(self, rig: "Rig", number: int) -> None:
        plan = rig.plan
        self.rig, self.number = rig, number
        self.owner = Owner(number, plan.epoch)
        self.descriptors = _ffi.new("struct uq_iod[]", plan.depth)
        self.block = _ffi.new("struct uq_block *")
        self.statistics = _ffi.addressof(self.block, "stats")
        self.scratch = new_area(0, plan.max_io_bytes, number)
        self.zeros = new_area(ZEROS, plan.max_io_bytes, number)
        config = QueueConfig(
            device_number=DEVICE,
            queue=number,
            depth=plan.depth,
            queues=plan.queues,
            epoch=plan.epoch,
            max_io_bytes=plan.max_io_bytes,
            block_bytes=plan.block_bytes,
            need_get_data=plan.need_get_data,
            zero_copy=plan.zero_copy,
            place_in_backend=plan.place_in_backend,
            timeout_ms=plan.timeout_ms,
            fail_on_timeout=plan.fail_on_timeout,
            absent_ms=plan.absent_ms,
            answers_itself=plan.answers_itself,
            slice_bytes=plan.slice_bytes,
            slices=1 << SLICE if plan.slice_bytes else 0,
            classes=plan.classes(),
        )
        memory = Memory(
            self.descriptors,
            rig.pool.base,
            rig.headers,
            self.scratch.base,
            self.block,
            limits=rig.limits,
        )
        self.queue = Queue(config, memory._replace(zeros=self.zeros.base) if plan.answers_itself else memory)

    def describe(self, tag: int, op: int, flags: int, sector: int, sectors: int, address: int = 0) -> None:
        """Fill the tag's descriptor as the kernel does; `flags` are shifted for `op_flags`."""
        each = self.descriptors[tag]
        each.op_flags, each.start_sector, each.sectors, each.address = op | flags, sector, sectors, address

    def commands(self, most: int | None = None) -> list[Command]:
        """The commands that are written but not consumed."""
        buffer = _ffi.new("struct uq_command[]", self.queue.config.depth)
        limit = self.queue.config.depth if most is None else most
        count = _lib.uq_commands(self.queue.raw, buffer, limit)
        return [Command(c.tag, c.op, c.result, c.address) for c in buffer[0:count]]

    def consumed(self, count: int) -> None:
        _lib.uq_commands_taken(self.queue.raw, count)

    def idle_segments(self) -> list[int]:
        """The numbers of dead backends' segments that the core has released."""
        base, size = _ffi.new("uint8_t **"), _ffi.new("uint64_t *")
        found = []
        while number := _lib.uq_segment_idle(self.queue.raw, base, size):
            found.append(int(number))
        return found

    def block_bytes(self) -> bytes:
        """A copy of its statistics block, as the daemon reads it."""
        return bytes(_ffi.buffer(self.block))

    def check_durations(self) -> None:
        """Check that each request that ended has a duration, and each wait for a buffer."""
        statistics = read_statistics(self.block_bytes())
        check_durations(statistics)
        waits = sum(statistics.latencies["buffer_wait"].counts)
        over = self.statistics.buffers_waited - self.statistics.buffers_waiting
        assert waits == over or (self.rig.plan.place_in_backend and waits > over)

    def check(self) -> None:
        """Check: no fault, one owner for every buffer, and gauges that match."""
        queue, rig = self.queue, self.rig
        assert not queue.attention() & Attention.FAULT, f"queue {self.number}: {queue.fault()}"
        wants = list(queue.stock_wants())
        assert bool(queue.attention() & Attention.STOCK) == bool(wants), f"queue {self.number} wants {wants}"
        held = [slot for index in range(len(queue.config.classes)) for slot in queue.stock_held(index)]
        assert len(set(held)) == len(held), f"queue {self.number} holds a buffer twice: {sorted(held)}"
        for slot in held:
            assert rig.table.owner_of(slot) == self.owner, f"slot {slot} is not queue {self.number}'s"
        lent = [slot for slot in held if rig.headers[slot].tag]
        assert (self.statistics.buffers_held, self.statistics.buffers_lent) == (len(held), len(lent))
        assert {s for s, user in rig.ledger.user_of.items() if user[0] == self.number} <= set(lent)


class Granted(NamedTuple):
    """A GRANT in transit."""

    grant: Grant
    sequence: int
    on_order: int


class Rig:
    """A device: its pool, the real lease table, and a core per queue."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.geometry = plan.geometry
        # A file mapping, as a real pool is, so that other memory can replace its pages.
        self.pool = _mapped_area(1, self.geometry.total_bytes)
        self.headers = _ffi.new("struct uq_slot[]", self.geometry.slot_count)
        self.limits = _ffi.new("struct uq_limits *")
        self.ledger = Ledger()
        self.table = LeaseTable(
            self.geometry, (plan.reserve,) * len(self.geometry.classes), queues=plan.queues
        )
        self.sides = [Side(self, number) for number in range(plan.queues)]
        self.areas = {1: self.pool}
        if plan.slice_bytes:
            self.areas[SEGMENT_SLICE] = new_area(SEGMENT_SLICE, plan.slice_bytes)
        self.mail: list[deque[Granted | Recall]] = [deque() for _ in self.sides]
        self.wishes: list[deque[tuple[int, int, int]]] = [deque() for _ in self.sides]
        """LEASEs in transit: class, sequence, count."""
        self.orders = [[Orders() for _ in self.geometry.classes] for _ in self.sides]
        self._seen = [[0 for _ in self.geometry.classes] for _ in self.sides]
        for side in self.sides:
            self._post(self.table.register(side.owner))
        for number in range(plan.queues):
            while self.deliver_mail(number):
                pass

    def limit(self, iops: int = 0, bytes_per_s: int = 0, burst_ns: int = 0) -> None:
        """What the daemon does to set the device's limits."""
        self.limits.per_s, self.limits.burst_ns = (iops, bytes_per_s), burst_ns
        self.limits.generation += 1

    def slot_at(self, offset: int, length: int) -> int:
        """The slot of a pool address; asserts that one buffer covers all of it."""
        for each in self.geometry.classes:
            index, within = divmod(offset - each.base_offset, each.buffer_bytes)
            if 0 <= index < each.count:
                assert within == 0 and length <= each.buffer_bytes, f"{length} bytes at {within} of a buffer"
                return each.first_slot + index
        raise AssertionError(f"offset {offset} is in no buffer")

    def locate(self, queue: int, address: int, length: int) -> tuple[Area, int]:
        """The area and offset of an address that the core gave to the driver; asserts that it is allowed."""
        side = self.sides[queue]
        for area in (side.scratch, side.zeros, *self.areas.values()):
            offset = address - area.address
            if offset >= 0 and offset + length <= area.size_bytes:
                return area, offset
        raise AssertionError(f"{address:#x} with {length} bytes is in no memory of queue {queue}")

    def poison(self, slot: int) -> None:
        """Overwrite a buffer that no side may use any more."""
        offset = self.geometry.slot_offset(slot)
        size = self.geometry.classes[self.geometry.class_of(slot)].buffer_bytes
        _ffi.memmove(self.pool.base + offset, bytes([POISON]) * size, size)

    def _post(self, messages: "list[Grant] | list[Recall]") -> None:
        for each in messages:
            queue = each.owner.queue
            if isinstance(each, Grant):
                on_order = self.table.on_order(each.owner, each.size_class)
                self.mail[queue].append(Granted(each, self._seen[queue][each.size_class], on_order))
            else:
                self.mail[queue].append(each)

    def ask(self, number: int) -> None:
        """Do a worker's stock-keeping: leases go to `wishes`, returns arrive at once."""
        side = self.sides[number]
        for size_class, want in list(side.queue.stock_wants()):
            if want > 0:
                side.queue.stock_asked(size_class, want)
                self.wishes[number].append((size_class, self.orders[number][size_class].ask(want), want))
            else:
                self.hear_wishes(number)
                self._give_back(side, size_class, -want)
        self._post(self.table.recalls())

    def hear_wishes(self, number: int) -> None:
        """Deliver the queue's LEASEs to the broker; the answers go to `mail`."""
        owner = self.sides[number].owner
        while self.wishes[number]:
            size_class, sequence, want = self.wishes[number].popleft()
            self._seen[number][size_class] = sequence
            self._post([Grant(owner, size_class, self.table.lease(owner, size_class, want))])
        self._post(self.table.recalls())

    def settle(self, number: int) -> None:
        """Deliver messages between queue and broker until none is left."""
        for _ in range(MESSAGES_TO_SETTLE_MAX):
            self.ask(number)
            self.hear_wishes(number)
            if not self.deliver_mail(number):
                return
        raise AssertionError(f"queue {number} and the broker talk for ever")

    def _give_back(self, side: Side, size_class: int, count: int) -> None:
        slots = side.queue.stock_take(size_class, count)
        for slot in slots:
            assert slot not in self.ledger.user_of, (
                f"slot {slot} returned, {self.ledger.user_of[slot]} has it"
            )
        self._post(self.table.give_back(side.owner, slots))

    def give_all_back(self) -> None:
        """Return every free buffer of every stock, as at a clean stop."""
        for side in self.sides:
            self.hear_wishes(side.number)
            self.table.cancel(side.owner)
        for side in self.sides:
            while self.deliver_mail(side.number):
                pass
            for size_class in range(len(self.geometry.classes)):
                self._give_back(side, size_class, self.geometry.slot_count)

    def deliver_mail(self, number: int) -> bool:
        """Deliver one message of the broker to the queue; returns whether one was waiting."""
        if not self.mail[number]:
            return False
        message, queue = self.mail[number].popleft(), self.sides[number].queue
        if isinstance(message, Granted):
            _, size_class, slots = message.grant
            queue.stock_add(size_class, slots)
            orders = self.orders[number][size_class]
            queue.stock_on_order(size_class, orders.granted(message.sequence, message.on_order))
        else:
            queue.stock_recall(message.size_class, message.owed)
        return True
