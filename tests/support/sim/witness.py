"""Who uses which memory, seen from outside: the kernel through the addresses it was given, a backend through the
requests it was given.

Owns the invariants about buffers and about writes: one user for each piece of memory, no buffer free while a backend
has it, no copy of a write executed after the write was answered.
"""

from support.fakes.driver import SECTOR_BYTES, Request
from support.fakes.queue_rig import POISON, Area
from support.sim.kernel import Memory, Task
from support.sim.worker import PoolMemory
from support.vm.shadow_disk import stamp_of, stamped
from ublkpool.bufpool.wire import SEGMENT_POOL, Descriptor, Op

Key = tuple[int, int, int]
"""Epoch, queue and tag."""


class Witness(Memory):
    """See the module; raises `AssertionError`, or nothing if it is `blind`: then only the data can tell."""

    def __init__(self, blind: bool) -> None:
        self._blind = blind
        self.pools: list[PoolMemory] = []
        self.segments: list[Area] = []
        self.scratch_of: dict[Task, Area] = {}
        self.pool_at: dict[Task, int] = {}
        """The address at which a worker has the pool's data."""
        self._users: dict[int, set[tuple[Key, str]]] = {}
        self._slot_of: dict[tuple[Key, str], int] = {}
        self._running: set[Key] = set()
        self._regions: dict[Key, tuple[int, int]] = {}
        self._answered: set[int] = set()
        self._generation = 0

    def attached(self, generation: int) -> None:
        """A backend was told the generation of its attach."""
        assert generation > self._generation, f"generation {generation} comes after {self._generation}"
        self._generation = generation

    # What the kernel is told

    def accept(self, task: Task, tag: int, address: int, length: int, use: str) -> None:
        key = (task.epoch, task.queue, tag)
        offset = address - self.pool_at[task]
        scratch = self.scratch_of[task]
        if 0 <= offset < self.pools[-1].data_bytes:
            self._accept_slot(key, self._slot_at(offset, length), use)
        elif scratch.address <= address < scratch.address + scratch.size_bytes:
            assert use == "fill" and address + length <= scratch.address + scratch.size_bytes
        else:
            self._accept_region(key, address, length, use)

    def _accept_slot(self, key: Key, slot: int, use: str) -> None:
        if use == "drain":
            users = {user for user, _ in self._users.get(slot, ())}
            assert self._blind or users <= {key}, f"slot {slot}: the kernel reads for {key} what {users} use"
        else:
            self._use(slot, key, "kernel")

    def _accept_region(self, key: Key, address: int, length: int, use: str) -> None:
        inside = any(
            each.address <= address and address + length <= each.address + each.size_bytes
            for each in self.segments
        )
        assert inside, f"{address:#x} with {length} bytes is in no memory that {key} may name"
        if use == "fill":
            for other, (start, end) in self._regions.items():
                apart = end <= address or address + length <= start
                assert self._blind or apart, f"{key} gets the region that {other} has"
            self._regions[key] = (address, address + length)

    def filled(self, task: Task, tag: int) -> None:
        # From here on a region is the worker's and its backend's affair; what is stored is judged by its content.
        self._regions.pop((task.epoch, task.queue, tag), None)

    def release(self, task: Task, tag: int) -> None:
        key = (task.epoch, task.queue, tag)
        assert self._blind or key not in self._running, f"{key} is committed and the backend has not let go"
        self._regions.pop(key, None)
        slot = self._stop(key, "kernel")
        if slot is not None:
            self._poison(slot)

    def worker_ended(self, task: Task) -> None:
        """The kernel is done with the tag's memory; a backend may still execute the request."""
        for key, party in list(self._slot_of):
            if key[:2] == (task.epoch, task.queue) and party == "kernel":
                self._stop(key, party)
        for key in [key for key in self._regions if key[:2] == (task.epoch, task.queue)]:
            del self._regions[key]

    def answered(self, request: Request) -> None:
        """The client has its answer: from now on no copy of this write may be executed."""
        if request.op == Op.WRITE:
            self._answered.add(stamp_of(request.data))

    # What a backend does

    def pool_view(self) -> memoryview:
        return self.pools[-1].view

    def backend_begins(self, descriptor: Descriptor) -> None:
        key = _key(descriptor)
        self._running.add(key)
        if descriptor.segment == SEGMENT_POOL:
            self._use(self._slot_at(descriptor.buffer, descriptor.length), key, "backend")

    def backend_stores(self, descriptor: Descriptor, data: bytes) -> None:
        if descriptor.op != Op.WRITE:
            return
        stamp = stamp_of(data)
        assert self._blind or data == stamped(stamp, descriptor.offset // SECTOR_BYTES, len(data)), (
            f"not the data of a write: {_key(descriptor)} at {descriptor.offset}"
        )
        assert self._blind or stamp not in self._answered, (
            f"stale write: {_key(descriptor)} is stored after it was answered"
        )

    def backend_ends(self, descriptor: Descriptor) -> None:
        key = _key(descriptor)
        self._running.discard(key)
        self._stop(key, "backend")

    # Slots

    def _slot_at(self, offset: int, length: int) -> int:
        for each in self.pools[-1].arena.geometry.classes:
            index, within = divmod(offset - each.base_offset, each.buffer_bytes)
            if 0 <= index < each.count:
                assert within == 0 and length <= each.buffer_bytes, f"{length} bytes at {within} of a buffer"
                return each.first_slot + index
        raise AssertionError(f"offset {offset} is in no buffer")

    def _use(self, slot: int, key: Key, party: str) -> None:
        users = self._users.setdefault(slot, set())
        others = {user for user, _ in users} - {key}
        assert self._blind or not others, f"slot {slot} has two users: {key} and {others}"
        users.add((key, party))
        before = self._slot_of.setdefault((key, party), slot)
        assert before == slot, f"{key} uses slot {slot} and {before}"

    def _stop(self, key: Key, party: str) -> int | None:
        slot = self._slot_of.pop((key, party), None)
        if slot is not None:
            self._users[slot].discard((key, party))
        return slot

    def _poison(self, slot: int) -> None:
        if not self._users[slot]:
            geometry = self.pools[-1].arena.geometry
            start, size = geometry.slot_offset(slot), geometry.classes[geometry.class_of(slot)].buffer_bytes
            self.pools[-1].view[start : start + size] = bytes([POISON]) * size

    def new_pool(self) -> None:
        """The next supervisor has another pool, and every process that used the old one is dead."""
        assert not self._running
        self._users.clear()
        self._slot_of.clear()


def _key(descriptor: Descriptor) -> Key:
    return (descriptor.epoch, descriptor.queue, descriptor.tag)
