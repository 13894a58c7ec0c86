"""The driver's side of a queue, modelled on drivers/block/ublk_drv.c: it fails the test at a command that would fail.

Owns the state of each tag, and copies data between requests and the addresses that the core names.  The test decides
when an event happens: `deliver`, `copy`, `consume` and `stop` are one event each.
"""

import enum
import errno
from collections import deque

from support.fakes.queue_rig import SEGMENT_SLICE, SLICE, Side
from ublkpool.bufpool.wire import Op
from ublkpool.ublk import _native
from ublkpool.ublk.queue import Command

_ffi = _native.ffi
SECTOR_BYTES = 512
IOD_FUA = 1 << 13
IOD_NOUNMAP = 1 << 15
IOD_SHMEM_ZC = 1 << 19
NEED_GET_DATA = 1
FETCH, GET_DATA, COMMIT = range(3)
ERRNO_MAX = 4095


class Holder(enum.Enum):
    """The side whose turn it is on a tag."""

    NOBODY = "not fetched"
    DRIVER = "a command is outstanding and no request"
    ASKED = "completed with 1: only NEED_GET_DATA is accepted"
    COPYING = "NEED_GET_DATA is outstanding"
    SERVER = "completed with a request: only COMMIT is accepted"
    GONE = "aborted"


class Request:
    """A client's request; `sector` and `sectors` are in 512 bytes whatever the logical block is."""

    def __init__(self, op: int, sector: int, sectors: int, data: bytes = b"", flags: int = 0) -> None:
        self.op, self.sector, self.sectors, self.flags = op, sector, sectors, flags
        self.data = data
        self.received = bytearray(sectors * SECTOR_BYTES if op == Op.READ else 0)
        self.done = 0
        """Sectors that earlier commits completed."""
        self.result: int | None = None
        """The result once answered: bytes, 0 or a negative errno."""
        self.may_fail = False
        self.client_buffer: int | None = None
        """The offset of its data in the client area, if the client's buffer is from there."""

    @property
    def left(self) -> int:
        return self.sectors - self.done

    @property
    def is_in_place(self) -> bool:
        return self.client_buffer is not None

    def __repr__(self) -> str:
        return f"<op {self.op} at {self.sector}+{self.sectors}, {self.done} done, result {self.result}>"


class FakeDriver:
    """One hardware queue on the kernel's side."""

    def __init__(self, side: Side) -> None:
        self.side = side
        depth = side.rig.plan.depth
        self.holders = [Holder.NOBODY] * depth
        self.requests: list[Request | None] = [None] * depth
        self.addresses = [0] * depth
        self.named: dict[int, tuple[int, int]] = {}
        """The (segment, offset) that the backend named for a tag's write."""
        self.posted: set[tuple[int, int]] = set()
        """The (segment, offset) of each region posted for any write."""
        self.again: deque[Request] = deque()
        """Requests, or their remaining parts, that the block layer will send again."""
        self.sent_back: set[int] = set()
        """Tags whose data could not be copied; the server notices only at the next request."""
        self.finished: list[Request] = []
        self.stopping = False
        self.copied_bytes = 0
        self.registered: set[int] = set()
        """Tags whose request's pages are in the server's io_uring: with zero copy, from the delivery to the commit."""

    def tags(self, holder: Holder) -> list[int]:
        return [tag for tag, each in enumerate(self.holders) if each is holder]

    @property
    def zero_copy(self) -> bool:
        return self.side.rig.plan.zero_copy

    @property
    def outstanding(self) -> int:
        """Requests without an answer: delivered, or to be sent again."""
        return sum(each is not None for each in self.requests) + len(self.again)

    def request_at(self, tag: int) -> Request:
        found = self.requests[tag]
        assert found is not None, f"tag {tag} carries no request"
        return found

    def deliver(self, tag: int, request: Request, copied: int | None = None) -> None:
        """Deliver a request to a fetched tag; without need_get_data `copied` limits the sectors copied at once."""
        assert self.holders[tag] is Holder.DRIVER and request.result is None
        self.requests[tag] = request
        self._describe(tag, request.left)
        if request.op == Op.WRITE and self.side.rig.plan.need_get_data:
            self._complete(tag, Holder.ASKED, NEED_GET_DATA)
            return
        if self.zero_copy:
            if request.op in (Op.READ, Op.WRITE):
                self.registered.add(tag)
        elif request.op == Op.WRITE:
            self._copy_in(tag, copied)
        self._complete(tag, Holder.SERVER, 0)

    def copy(self, tag: int, sectors: int | None = None) -> None:
        """Copy a write's data, or `sectors` of it; 0 requeues the request."""
        assert self.holders[tag] is Holder.COPYING
        if sectors == 0:
            self.again.appendleft(self.request_at(tag))
            self._release(tag)
            self.holders[tag] = Holder.DRIVER
            self.sent_back.add(tag)
            return
        self._copy_in(tag, sectors)
        self._complete(tag, Holder.SERVER, 0)

    def consume(self, most: int | None = None) -> int:
        """io_uring_enter(2) takes commands; returns their number."""
        commands = self.side.commands(most)
        for command in commands:
            self._consume(command)
        self.side.consumed(len(commands))
        if self.stopping:
            self._abort()
        return len(commands)

    def stop(self) -> None:
        """Stop the device: abort what is outstanding now, and at every later command."""
        self.stopping = True
        while self.again:
            self._answer(self.again.popleft(), -errno.EIO)
        self._abort()

    def _describe(self, tag: int, sectors: int) -> None:
        request = self.request_at(tag)
        flags, address = request.flags, self.addresses[tag]
        if request.client_buffer is not None:
            flags |= IOD_SHMEM_ZC
            address = SLICE << 32 | request.client_buffer
        self.side.describe(tag, request.op, flags, request.sector + request.done, sectors, address)

    def _complete(self, tag: int, holder: Holder, result: int) -> None:
        self.holders[tag] = holder
        self.sent_back.discard(tag)
        self.side.queue.complete(tag, result)

    def _copy_in(self, tag: int, sectors: int | None) -> None:
        request = self.request_at(tag)
        if request.is_in_place:
            # From here on the server sees its own address (ublk_get_data), or still that of the data.
            if self.side.rig.plan.need_get_data:
                self.side.descriptors[tag].address = self.addresses[tag]
            return
        count = request.left if sectors is None else min(sectors, request.left)
        start = request.done * SECTOR_BYTES
        data = request.data[start : start + count * SECTOR_BYTES]
        _ffi.memmove(_ffi.cast("uint8_t *", self.addresses[tag]), data, len(data))
        self.copied_bytes += len(data)
        self._describe(tag, count)

    def _consume(self, command: Command) -> None:
        tag, holder = command.tag, self.holders[command.tag]
        expected = {FETCH: Holder.NOBODY, GET_DATA: Holder.ASKED, COMMIT: Holder.SERVER}[command.op]
        assert holder is expected, f"{command} while {holder.value}"
        if command.op == COMMIT:
            self._commit(command)
            self._release(tag)
        if command.op == GET_DATA:
            self._accept(command, self.request_at(tag).left * SECTOR_BYTES)
            self.holders[tag] = Holder.COPYING
            return
        if self.zero_copy:
            assert not command.address, f"{command}: EINVAL, there is no buffer"
            self.registered.discard(tag)
        elif not self.side.rig.plan.need_get_data:
            self._accept(command, self.side.rig.plan.max_io_bytes)
        self.holders[tag] = Holder.DRIVER

    def _accept(self, command: Command, length: int) -> None:
        """Record the address of a write's data, which must be the agreed one."""
        if command.op == GET_DATA and self.request_at(command.tag).is_in_place:
            assert command.address, f"{command}: no address"
            self.addresses[command.tag] = command.address
            return
        area, offset = self.side.rig.locate(self.side.number, command.address, length)
        if area.number == 1:
            slot = self.side.rig.slot_at(offset, length)
            self.side.rig.ledger.use(slot, (self.side.number, command.tag))
        elif area.number:
            place = (area.number, offset)
            if command.tag not in self.named and place in self.posted:
                self.posted.remove(place)
                self.named[command.tag] = place
            assert self.named.get(command.tag) == place, f"{command}: another region was named"
        self.addresses[command.tag] = command.address

    def _commit(self, command: Command) -> None:
        request = self.request_at(command.tag)
        lent = not self.side.rig.plan.leases_buffers or (request.op == Op.READ and not self.zero_copy)
        assert command.address or not lent, f"{command}: no address for {request}"
        assert command.result >= -ERRNO_MAX
        if command.result < 0:
            self._answer(request, command.result)
        elif request.op not in (Op.READ, Op.WRITE):
            self._answer(request, 0)
        else:
            self._moved(command, request)

    def _moved(self, command: Command, request: Request) -> None:
        limit = self.side.descriptors[command.tag].sectors * SECTOR_BYTES
        assert 0 < command.result <= limit, f"{command}: the driver answers EIO or sends it again for ever"
        assert command.result % self.side.rig.plan.block_bytes == 0
        if request.client_buffer is not None or self.zero_copy:
            assert command.result == limit, f"{command}: the driver tells the client that all of it was done"
        if self.zero_copy:
            assert command.tag in self.registered
        elif request.client_buffer is not None:
            self._take_in_place(request, request.client_buffer)
        elif request.op == Op.READ:
            self._copy_out(command, request)
        request.done += command.result // SECTOR_BYTES
        if request.left:
            self.again.append(request)
        else:
            self._answer(request, request.sectors * SECTOR_BYTES)

    def _take_in_place(self, request: Request, at: int) -> None:
        if request.op == Op.READ:
            area = self.side.rig.areas[SEGMENT_SLICE]
            request.received[:] = area.view[at : at + len(request.received)]

    def _copy_out(self, command: Command, request: Request) -> None:
        area, offset = self.side.rig.locate(self.side.number, command.address, command.result)
        assert area.number, f"{command}: nothing was read into scratch"
        if area.number == 1:
            slot = self.side.rig.slot_at(offset, command.result)
            assert self.side.rig.ledger.user_of.get(slot) == (self.side.number, command.tag)
        start = request.done * SECTOR_BYTES
        request.received[start : start + command.result] = area.view[offset : offset + command.result]

    def _answer(self, request: Request, result: int) -> None:
        assert request.result is None, f"{request} is answered again, with {result}"
        request.may_fail |= self.stopping
        request.result = result
        self.finished.append(request)

    def _release(self, tag: int) -> None:
        """Overwrite the tag's buffer, which no side may use from here on."""
        self.requests[tag] = None
        self.named.pop(tag, None)
        slot = self.side.rig.ledger.stop((self.side.number, tag))
        if slot is not None:
            self.side.rig.poison(slot)

    def _abort(self) -> None:
        for tag in self.tags(Holder.COPYING):
            self._answer(self.request_at(tag), -errno.EIO)
        while self.again:
            self._answer(self.again.popleft(), -errno.EIO)
        for tag in self.tags(Holder.COPYING) + self.tags(Holder.DRIVER):
            self._release(tag)
            self._complete(tag, Holder.GONE, -errno.ENODEV)
