"""One hardware queue of the check: the workers' own core and links, and the driver's side of it on plain memory.

Owns the tags on the kernel's side: it delivers requests to the core, copies data to and from the addresses that the
core names, and collects answers.  Used by the check's one thread; never waits.
"""

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.wire import Flag, Op
from ublkpool.daemon.check.requests import Request
from ublkpool.ublk import _native, mappings
from ublkpool.ublk import queue as core
from ublkpool.ublk.queue import Attention, BufferClass, LinkState, Memory, Port, Queue, QueueConfig
from ublkpool.workers.backend_link import BackendLink
from ublkpool.workers.ring_link import RingLink
from ublkpool.workers.tag_state import State

_ffi = _native.ffi
_SECTOR_BYTES = 512
_IOD_FUA, _IOD_NOUNMAP = 1 << 13, 1 << 15
"""include/uapi/linux/ublk_cmd.h: UBLK_IO_F_FUA, UBLK_IO_F_NOUNMAP."""
_NEED_GET_DATA = 1
_GET_DATA, _COMMIT = 1, 2
_MODE = 0o600


class Shape(NamedTuple):
    """What the queues of a device have in common; sizes in bytes."""

    number: int
    queues: int
    depth: int
    max_io_bytes: int
    block_bytes: int
    places_in_backend: bool
    geometry: Geometry
    has_rings: bool
    """Whether the queues offer rings, and only rings; else ZeroMQ."""


class _Ports:
    """Where the ring link leaves its port, in place of a worker's io_uring."""

    def __init__(self, unwatch: Callable[[int], None]) -> None:
        self.port: Port | None = None
        self.bell_in = self.bell_out = -1
        self._unwatch = unwatch

    def use_port(self, port: Port | None, bell_in: int = -1, bell_out: int = -1) -> None:
        if self.port is not None:
            # The ring link closes it next, and the number may then be another descriptor's.
            self._unwatch(self.bell_in)
        self.port, self.bell_in, self.bell_out = port, bell_in, bell_out


class KernelQueue:
    """A queue of one epoch."""

    def __init__(
        self,
        shape: Shape,
        number: int,
        epoch: int,
        pool: Any,
        directory: Path,
        answered: Callable[[Request], None],
        unwatch: Callable[[int], None],
    ) -> None:
        """`pool` is the address of the pool's memory; `answered` is called with each request that is over.

        `unwatch` is called with a descriptor of `filenos` that is about to be closed while the queue lives.
        """
        self.number = number
        self._shape = shape
        self._answered = answered
        self._tags: list[Request | None] = [None] * shape.depth
        self._copies: dict[int, int] = {}
        self._waiting: deque[Request] = deque()
        self._free: deque[int] = deque()
        self._is_started = False
        self.holds_copies = False
        """Whether data of writes is not copied now: the backend has named its place and waits for it."""
        self._descriptors = _ffi.new("struct uq_iod[]", shape.depth)
        self._block = _ffi.new("struct uq_block *")
        self._headers = _ffi.new("struct uq_slot[]", shape.geometry.slot_count)
        self._scratch = _ffi.new("uint8_t[]", shape.max_io_bytes)
        self.core = Queue(
            _config(shape, number, epoch),
            Memory(self._descriptors, pool, self._headers, self._scratch, self._block),
        )
        self._ports = _Ports(unwatch)
        self._rings: RingLink | None = None
        self._frames: BackendLink | None = None
        if shape.has_rings:
            self._rings = RingLink(ring_path(directory, number), self.core, _MODE, None)
            self._rings.serve_on(self._ports)
        else:
            self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            self._frames = BackendLink(self._context, frame_path(directory, number), self.core, _MODE, None)

    def filenos(self) -> list[int]:
        """The descriptors that become readable when `turn` may have work."""
        if self._frames is not None:
            return [*self._frames.filenos()]
        assert self._rings is not None
        return [self._rings.fileno(), *([self._ports.bell_in] if self._ports.port else [])]

    def start_once(self) -> None:
        """Fetch every tag, if this has not been done: requests are delivered from now on."""
        if self._is_started:
            return
        self._is_started = True
        for index, each in enumerate(self._shape.geometry.classes):
            share = each.count // self._shape.queues
            first = each.first_slot + self.number * share
            self.core.stock_add(index, range(first, first + share))
        self.core.start()

    def expect(
        self, token: bytes, segment: int, fd: int | None, size_bytes: int, reads_own: bool, fence: bool
    ) -> bool:
        """Whether the backend with this token can come.  `fd` is its own segment.  Raises `OSError`."""
        base = core.NULL if fd is None else mappings.map_segment(fd, size_bytes)
        self.core.unmap_idle_segments()
        if not self.core.expect(segment, base, size_bytes, reads_own, fence):
            if fd is not None:
                mappings.unmap_segment(base, size_bytes)
            return False
        self._listen_to(token)
        return True

    def _listen_to(self, token: bytes) -> None:
        user = os.geteuid() if token else None
        for link in (self._rings, self._frames):
            if link is not None:
                link.expect(token, user)

    def lost(self) -> None:
        """The backend's process is dead: what it had not answered waits for the next."""
        self._listen_to(b"")
        self.core.lost()

    @property
    def is_linked(self) -> bool:
        return self.core.link is LinkState.UP

    @property
    def stale_answers(self) -> int:
        """Answers to requests that were over."""
        return int(self._block.stats.stale_answers)

    def violation(self) -> str:
        """How the backend broke the protocol, empty if it did not."""
        return self.core.violation() if self.core.has_violation else ""

    @property
    def was_hung_up(self) -> bool:
        """Whether the backend's connection to this queue has ended."""
        return self.core.link is LinkState.CUT

    def is_any(self, state: State) -> bool:
        """Whether a request is in this state."""
        return any(
            self.core.tag_state(tag) == state for tag, each in enumerate(self._tags) if each is not None
        )

    def is_executing(self, changes: bool) -> bool:
        """Whether the backend has a request that `changes` blocks, or a request of any kind."""
        return any(
            self.core.tag_state(tag) == State.SERVING
            for tag, each in enumerate(self._tags)
            if each is not None and (each.change is not None or not changes)
        )

    def submit(self, request: Request) -> None:
        """The block layer sends a request; it waits if no tag is free."""
        self._waiting.append(request)

    def unanswered(self) -> list[Request]:
        """Requests without an answer, on tags first."""
        return [each for each in self._tags if each is not None] + [*self._waiting]

    def turn(self) -> bool:
        """Exchange descriptors, do what the driver would; whether anything moved."""
        before = self._block.stats.descriptors_in + self._block.stats.descriptors_out
        if self._rings is not None:
            self._rings.turn()
            if (port := self._ports.port) is not None and port.turn(self.core):
                os.eventfd_write(self._ports.bell_out, 1)
        if self._frames is not None:
            self._frames.turn()
        moved = self._consume()
        moved = self._copy() or moved
        moved = self._deliver() or moved
        if self.core.attention() & Attention.FAULT:
            raise RuntimeError(f"the check's own queue failed: {self.core.fault()}")
        self.core.clear(Attention.LINK)
        return moved or before != self._block.stats.descriptors_in + self._block.stats.descriptors_out

    def doze(self) -> bool:
        """Whether this side may sleep until a descriptor of `filenos` is readable; `wake` ends that."""
        return self._ports.port is None or self._ports.port.doze(self.core)

    def wake(self) -> None:
        """This side is awake."""
        if (port := self._ports.port) is not None:
            port.wake()
            with suppress(BlockingIOError):
                os.eventfd_read(self._ports.bell_in)

    def _deliver(self) -> bool:
        moved = False
        while self._waiting and self._free:
            tag, request = self._free.popleft(), self._waiting.popleft()
            self._tags[tag] = request
            each = self._descriptors[tag]
            flags = _IOD_FUA if request.flags & Flag.FUA else 0
            flags |= _IOD_NOUNMAP if request.flags & Flag.NOUNMAP else 0
            each.op_flags = int(request.op) | flags
            each.start_sector = (request.offset + request.done) // _SECTOR_BYTES
            each.sectors = (request.length - request.done) // _SECTOR_BYTES
            each.address = 0
            self.core.complete(tag, _NEED_GET_DATA if request.op == Op.WRITE else 0)
            moved = True
        return moved

    def _copy(self) -> bool:
        """Copy writes' data where the core said, as NEED_GET_DATA does."""
        if self.holds_copies or not self._copies:
            return False
        copies, self._copies = self._copies, {}
        for tag, address in copies.items():
            request = self._tags[tag]
            assert request is not None
            data = request.data[request.done :]
            _ffi.memmove(_ffi.cast("uint8_t *", address), data, len(data))
            self.core.complete(tag, 0)
        return True

    def _consume(self) -> bool:
        commands = self.core.take_commands()
        for tag, op, result, address in commands:
            if op == _GET_DATA:
                self._copies[tag] = address
                continue
            if op == _COMMIT:
                self._commit(tag, result, address)
            self._free.append(tag)
        return bool(commands)

    def _commit(self, tag: int, result: int, address: int) -> None:
        request, self._tags[tag] = self._tags[tag], None
        assert request is not None
        if result < 0:
            request.error = -result
        elif request.op in (Op.READ, Op.WRITE):
            if request.op == Op.READ:
                moved = _ffi.buffer(_ffi.cast("uint8_t *", address), result)
                request.received[request.done : request.done + result] = moved
            request.done += result
            if request.done < request.length:
                # As the block layer does: the rest is sent again.
                request.is_short = True
                self._waiting.appendleft(request)
                return
        request.is_answered = True
        self._answered(request)

    def close(self) -> None:
        """The worker is dead: links and rings end with it, and so do the descriptors of `filenos`."""
        if self._rings is not None:
            self._rings.close()
        if self._frames is not None:
            self._frames.close()
            self._context.term()


def ring_path(directory: Path, number: int) -> Path:
    """The unix socket at which a queue hands out its rings."""
    return directory / f"{number}.ring"


def frame_path(directory: Path, number: int) -> Path:
    """The unix socket of a queue's ZeroMQ endpoint."""
    return directory / f"{number}"


def _config(shape: Shape, number: int, epoch: int) -> QueueConfig:
    classes = []
    for each in shape.geometry.classes:
        share = each.count // shape.queues
        # A queue keeps its share for good, so the check needs no broker.
        classes.append(
            BufferClass(each.base_offset, each.buffer_bytes, each.count, each.first_slot, share, 1, share)
        )
    return QueueConfig(
        device_number=shape.number,
        queue=number,
        depth=shape.depth,
        epoch=epoch,
        max_io_bytes=shape.max_io_bytes,
        block_bytes=shape.block_bytes,
        need_get_data=True,
        place_in_backend=shape.places_in_backend,
        timeout_ms=0,
        fail_on_timeout=False,
        hello_timeout_ms=0,
        classes=tuple(classes),
    )
