"""A backend on the level of wire descriptors, without a socket: one object is one life of a backend process.

Owns the state of such a process: its requests and its own segment.  Its `Store` outlives it.  It checks that the
worker keeps to the protocol, overwrites released regions and names them again, and can send wrong answers
(`liar.py`).  It does not know whether its answers arrive.
"""

import errno
import random
from typing import NamedTuple

from support.fakes.driver import SECTOR_BYTES, FakeDriver
from support.fakes.queue_rig import DEVICE, POISON, SEGMENT_SLICE, Rig, new_area
from ublkpool.bufpool.wire import SEGMENT_POOL, Descriptor, Flag, Kind, Op, iter_frame

Key = tuple[int, int]


class Store:
    """The data that survives a backend's death, by offset of the device."""

    def __init__(self, base_offset: int, size_bytes: int) -> None:
        self._base = base_offset
        self._bytes = bytearray(size_bytes)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._bytes[offset - self._base : offset - self._base + length])

    def write(self, offset: int, data: bytes) -> None:
        start = offset - self._base
        assert start >= 0 and start + len(data) <= len(self._bytes)
        self._bytes[start : start + len(data)] = data


class Answer(NamedTuple):
    """An executed request's answer, not yet sent."""

    descriptor: Descriptor
    cell: int | None
    """The region that a read's answer names."""
    request: Descriptor


class FakeBackend:
    """One life of a backend: from HELLO on every queue until it is killed."""

    def __init__(
        self, rig: Rig, drivers: list[FakeDriver], store: Store, segment: int, rng: random.Random
    ) -> None:
        plan = rig.plan
        self._rig, self._drivers, self._store, self._rng = rig, drivers, store, rng
        self.reads_own = plan.reads_own
        self._cells = cells = plan.queues * plan.depth * (2 if plan.posts else 1)
        self.segment = new_area(segment, cells * plan.max_io_bytes)
        rig.areas[segment] = self.segment
        self._free = [index * plan.max_io_bytes for index in range(cells)]
        self.named: dict[Key, int] = {}
        """The region of the segment lent to each tag, from PLACED or a read's DONE until RELEASE."""
        self.posted: dict[tuple[int, int], int] = {}
        """The bytes posted to each queue at each offset of the segment, until a write uses them."""
        self.placing: dict[Key, Descriptor] = {}
        self.given: dict[Key, Descriptor] = {}
        self.executed: dict[Key, Answer] = {}
        self.welcomed: set[int] = set()
        self.seen: list[Descriptor] = []
        """All received descriptors, for tests."""
        self.error_rate = 0.0
        """The probability that a request fails."""
        self.reuses_answered = False
        """A breach of the protocol: the backend reuses a write's region from DONE on, before RELEASE."""

    def hello(self, queue: int) -> bytes:
        return Descriptor(Kind.HELLO, device=DEVICE, queue=queue, epoch=self._rig.plan.epoch).pack()

    def receive(self, queue: int, frame: bytes) -> None:
        """Take descriptors from one queue's worker."""
        for each in iter_frame(frame):
            assert (each.device, each.queue, each.reserved) == (DEVICE, queue, 0)
            assert each.epoch == self._rig.plan.epoch
            self.seen.append(each)
            if each.kind == Kind.WELCOME:
                self.welcomed.add(queue)
                continue
            assert queue in self.welcomed, "WELCOME comes first"
            if each.kind == Kind.FENCE:
                continue
            self._accept((queue, each.tag), each)

    def _accept(self, key: Key, each: Descriptor) -> None:
        assert not (key in self.placing or key in self.given or key in self.executed), (
            f"two requests at {key}"
        )
        if each.kind in (Kind.DATA, Kind.RELEASE) and key not in self.named:
            self._use_post(key, each)
        if each.kind == Kind.RELEASE and key not in self.named:
            assert self.reuses_answered
        elif each.kind == Kind.RELEASE:
            assert (each.segment, each.buffer) == (self.segment.number, self.named[key]), (
                "a region it never named"
            )
            self._own_again(self.named.pop(key))
        elif each.kind == Kind.PLACE:
            assert each.op == Op.WRITE and key not in self.named
            self.placing[key] = each
        else:
            self._accept_request(key, each)

    def _use_post(self, key: Key, each: Descriptor) -> None:
        """Handle the end of a posted region: a write used it, or it comes back unused."""
        room = self.posted.pop((key[0], each.buffer), 0) if each.segment == self.segment.number else 0
        assert room >= each.length or self.reuses_answered, f"{each}: nothing is posted there"
        if room:
            self.named[key] = each.buffer

    def _accept_request(self, key: Key, each: Descriptor) -> None:
        assert each.kind == (Kind.DATA if key in self.named else Kind.REQUEST)
        if each.kind == Kind.DATA:
            assert (each.segment, each.buffer) == (self.segment.number, self.named[key])
        elif each.segment == SEGMENT_POOL:
            self._rig.ledger.use(self._rig.slot_at(each.buffer, each.length), key)
        elif each.segment == SEGMENT_SLICE:
            assert each.buffer == self._drivers[key[0]].request_at(key[1]).client_buffer
        else:
            assert each.segment == 0 and (self.reads_own if each.op == Op.READ else each.op != Op.WRITE)
        self.given[key] = each

    def _own_again(self, cell: int) -> None:
        size = self._rig.plan.max_io_bytes
        cell -= cell % size
        self.segment.view[cell : cell + size] = bytes([POISON]) * size
        self._free.append(cell)

    def _take_cell(self, length: int) -> int | None:
        """A free region for a request, not always at the beginning of a cell."""
        if not self._free:
            return None
        block = self._rig.plan.block_bytes
        room = (self._rig.plan.max_io_bytes - length) // block
        return self._free.pop() + self._rng.randint(0, room) * block

    def post(self, queue: int) -> bytes | None:
        """A region to post for any write; None if enough are posted, so that PLACE finds regions."""
        plan = self._rig.plan
        size = self._rng.choice([each.buffer_bytes for each in plan.geometry.classes])
        same = [at for (of, at), posted in self.posted.items() if (of, posted) == (queue, size)]
        if len(same) >= plan.depth or 2 * (len(self.posted) + 1) > self._cells or not self._free:
            return None
        cell = self._take_cell(size)
        assert cell is not None
        self.posted[queue, cell] = size
        self._drivers[queue].posted.add((self.segment.number, cell))
        return self.post_at(queue, cell, size).pack()

    def post_at(self, queue: int, buffer: int, size: int) -> Descriptor:
        """A POST, valid or not."""
        return Descriptor(Kind.POST, 0, 0, DEVICE, queue, 0, self._rig.plan.epoch, 0, 0, size, 0, self.segment.number,
                          buffer)  # fmt: skip

    def place(self, key: Key) -> bytes | None:
        """Answer a PLACE; None while no region is free."""
        each = self.placing[key]
        cell = self._take_cell(each.length)
        if cell is None:
            return None
        del self.placing[key]
        self.named[key] = cell
        self._drivers[key[0]].named[key[1]] = (self.segment.number, cell)
        return each.answer(Kind.PLACED)._replace(segment=self.segment.number, buffer=cell).pack()

    def reject(self, key: Key, result: int) -> bytes:
        """Refuse to place a write."""
        self._drivers[key[0]].request_at(key[1]).may_fail = True
        return self.placing.pop(key).answer(Kind.REJECT, result).pack()

    def execute(self, key: Key, blocks: int | None = None) -> bool:
        """Execute a request, or `blocks` of it, without answering; False while no region is free."""
        each = self.given[key]
        length = each.length if blocks is None else min(each.length, blocks * self._rig.plan.block_bytes)
        result, cell = length, None
        if self._rng.random() < self.error_rate:
            self._drivers[key[0]].request_at(key[1]).may_fail = True
            result = -errno.ENOSPC
        elif each.op == Op.READ:
            if each.segment == 0:
                cell = self._take_cell(each.length)
                if cell is None:
                    return False
            self._fill(each, cell, length)
            # 7.x reports to the client that everything was read.
            self._drivers[key[0]].request_at(key[1]).may_fail |= (
                each.segment == SEGMENT_SLICE and length < each.length
            )
        else:
            self._change(each, length)
            result = length if each.op == Op.WRITE else 0
            if result < each.length and each.op == Op.WRITE:
                # A write that was stored in part fails, because 7.x would report it as complete.
                self._drivers[key[0]].request_at(key[1]).may_fail = True
        del self.given[key]
        self.executed[key] = Answer(self._answer(each, result, cell), cell, each)
        return True

    def _answer(self, each: Descriptor, result: int, cell: int | None) -> Descriptor:
        answer = each.answer(Kind.DONE, result)
        if cell is None:
            return answer
        return answer._replace(flags=Flag.REGION, segment=self.segment.number, buffer=cell)

    def _fill(self, each: Descriptor, cell: int | None, length: int) -> None:
        data = self._store.read(each.offset, length)
        start = each.buffer if cell is None else cell
        view = self._rig.areas[each.segment].view if cell is None else self.segment.view
        view[start : start + length] = data

    def _change(self, each: Descriptor, length: int) -> None:
        if each.op == Op.WRITE:
            data = self._rig.areas[each.segment].view[each.buffer : each.buffer + length]
            request = self._drivers[each.queue].request_at(each.tag)
            done_bytes = request.done * SECTOR_BYTES
            assert data == request.data[done_bytes : done_bytes + length], f"not the data of {request}"
            self._store.write(each.offset, data)
        elif each.op in (Op.DISCARD, Op.WRITE_ZEROES):
            self._store.write(each.offset, bytes(each.length))
        else:
            assert each.op == Op.FLUSH, "the worker answers unknown operations itself"

    def answer(self, key: Key) -> bytes:
        """The answer to an executed request; its region stays lent."""
        answer = self.executed.pop(key)
        if answer.cell is not None:
            self.named[key] = answer.cell
        elif key in self.named and self.reuses_answered:
            self._own_again(self.named.pop(key))
        return answer.descriptor.pack()

    def scribble(self, queue: int) -> None:
        """After its link is cut, a backend may still write into every read buffer that it was lent."""
        for key, answer in self.executed.items():
            each = answer.request
            if each.queue == queue and each.op == Op.READ and each.segment == SEGMENT_POOL:
                slot = self._rig.slot_at(each.buffer, each.length)
                assert self._rig.ledger.user_of.get(slot) == key, f"slot {slot} was freed under {key}"
                self._rig.pool.view[each.buffer : each.buffer + each.length] = bytes([POISON]) * each.length

    def forget(self, key: Key) -> None:
        """Forget an executed request that a wrong answer ended; a region that a read did not name was never lent."""
        answer = self.executed.pop(key)
        if answer.cell is not None:
            self._own_again(answer.cell)
