"""A backend's links through rings in shared memory, the fast transport.

Owns, for each queue, the connection to its worker, the mapping and both doorbells; the native part owns the indices
(`csrc/port.h`).  A link ends with its connection, which is then made again, at growing intervals, until a worker
listens.  Only `poll` waits, so that the other queues are served meanwhile.
"""

import errno
import fcntl
import logging
import math
import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.bufpool.engine.ring_driver import RingDriver, nothing_to_serve
from ublkpool.bufpool.errors import BackendError, WireError
from ublkpool.bufpool.packets import receive_descriptors
from ublkpool.bufpool.sdk.doors import Door
from ublkpool.bufpool.sdk.links import LinkStatistics, Polled, hello, unread, unread_max

log = logging.getLogger("ublkpool.backend")

RETRY_S = 0.01
RETRY_MAX_S = 0.2
_SETTLE_MS = 1000
"""How long a worker may take to make room for the last answers."""
_READY_MAX = 16
_ANSWER_BYTES_MAX = 256
_FILES = 3
_KIND = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_EDGE = select.EPOLLIN | select.EPOLLET


class QueueRings:
    """The rings of one queue: their memory and both doorbells."""

    def __init__(self, queue: int, packet: bytes, files: list[int]) -> None:
        """Takes over the descriptors of a worker's answer.  Raises `WireError`, having closed them."""
        self._files = files
        if len(files) != _FILES:
            self.close_files()
            raise WireError(f"queue {queue}: rings came with {len(files)} files instead of {_FILES}")
        try:
            self.entries = _entries(queue, packet)
            self._map = _map(queue, files[0], lib.ports_memory_bytes(self.entries))
        except WireError:
            self.close_files()
            raise
        self.memory: Any = ffi.from_buffer("uint8_t[]", self._map, require_writable=True)
        _, self.bell, self.worker_bell = files

    def close_files(self) -> None:
        for file in self._files:
            os.close(file)

    def close(self) -> None:
        ffi.release(self.memory)
        self._map.close()
        self.close_files()


def _entries(queue: int, packet: bytes) -> int:
    try:
        opened = msgspec.json.decode(packet, type=wire.RingOpened)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"queue {queue}: the worker's answer to a ring: {error}") from error
    if not 0 <= opened.entries < 1 << 32 or not lib.ports_memory_bytes(opened.entries):
        raise WireError(f"queue {queue}: {opened.entries} entries are no ring's")
    return opened.entries


def _map(queue: int, file: int, needed_bytes: int) -> mmap.mmap:
    try:
        is_sealed = fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError as error:
        raise WireError(f"queue {queue}: the rings' file is no memory: {error.strerror}") from error
    # If the file could shrink, the next access beyond its end would kill this process (SIGBUS).
    if not is_sealed or os.fstat(file).st_size < needed_bytes:
        raise WireError(f"queue {queue}: the rings' memory is less than {needed_bytes} sealed bytes")
    return mmap.mmap(file, needed_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


class RingConnection:
    """One queue's connection to its worker: absent, asked for rings, or with rings."""

    __slots__ = ("connection", "delay_s", "door", "due_s", "path", "queue", "ring")

    def __init__(self, queue: int, path: str) -> None:
        self.queue, self.path = queue, path
        self.door = Door(queue, path)
        self.connection: socket.socket | None = None
        self.ring: QueueRings | None = None
        self.delay_s = RETRY_S
        self.due_s = 0.0

    def put_off(self) -> None:
        """No worker listened: try again after a pause that doubles each time, up to `RETRY_MAX_S`."""
        self.due_s = time.monotonic() + self.delay_s
        self.delay_s = min(2 * self.delay_s, RETRY_MAX_S)


class RingLinks:
    """`Links` through shared memory."""

    def __init__(self, attached: wire.Attached) -> None:
        """Asks every queue for its rings."""
        self._attached = attached
        ports = lib.ports_new(attached.queues, attached.epoch, unread_max(attached))
        if ports == ffi.NULL:
            raise MemoryError
        self._ports: Any = ffi.gc(ports, lib.ports_free)
        self._epoll = select.epoll()
        self._epoll_file = self._epoll.fileno()
        self._links = [RingConnection(queue, path) for queue, path in enumerate(attached.rings)]
        self._link_of: dict[int, RingConnection] = {}
        self._bells: set[int] = set()
        self._driver: RingDriver | None = None
        self._absent = set(self._links)
        self._waiting = ffi.new("uint32_t[]", max(1, attached.queues))
        self._count = ffi.new("uint32_t *")
        self._ready = ffi.new("int32_t[]", _READY_MAX)
        self._frame = ffi.new("uint8_t[]", wire.DESCRIPTOR_BYTES * wire.DESCRIPTORS_PER_FRAME_MAX)
        self._frames_received = self._frames_sent = self._opened = 0
        self._hears = True
        self._connect_due()

    def watch(self, descriptor: int, events: int = select.POLLIN) -> None:
        """See `Links`."""
        self._epoll.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """See `Links`."""
        self._epoll.unregister(descriptor)

    def poll(self, timeout_ms: int | None = None) -> Polled:
        """See `Links`."""
        wait_ms = -1 if timeout_ms is None else timeout_ms
        if self._absent:
            self._connect_due()
            wait_ms = self._until_due(wait_ms)
        if self._driver is not None:
            is_wanted = self._driver.run(wait_ms, self._hears)
            return Polled([], self._look(0) if is_wanted else [])
        descriptors = self._look(wait_ms)
        count = self._count[0]
        return Polled(ffi.unpack(self._waiting, count) if count else [], descriptors)

    def _look(self, wait_ms: int) -> list[int]:
        """Wait, handle ready connections of the links, and return the other ready descriptors.

        The queues with frames are left in `_waiting`.
        """
        count = lib.ports_poll(
            self._ports, self._epoll_file, wait_ms, self._ready, _READY_MAX, self._waiting, self._count
        )
        if count == -errno.EPROTO:
            raise WireError(f"queue {self._waiting[0]}: the worker stored an impossible index in its ring")
        if count < 0:
            raise OSError(-count, f"waiting for rings: {os.strerror(-count)}")
        return [file for file in ffi.unpack(self._ready, count) if not self._is_own(file)] if count else []

    def _is_own(self, file: int) -> bool:
        link = self._link_of.get(file)
        if link is not None:
            self._heard(link)
        return link is not None

    def _until_due(self, wait_ms: int) -> int:
        left_s = min((each.due_s for each in self._absent), default=math.inf) - time.monotonic()
        due_ms = max(0, int(1000 * min(left_s, RETRY_MAX_S)) + 1)
        return due_ms if wait_ms < 0 else min(wait_ms, due_ms)

    def drive(self, engine: Any, serve: Callable[[], None] = nothing_to_serve) -> bool:
        """See `Links`."""
        if self._driver is not None:
            self._driver.settle(_SETTLE_MS)
            self._driver.close()
            self._driver = None
        return engine is None or self._start_driver(engine, serve)

    def _start_driver(self, engine: Any, serve: Callable[[], None]) -> bool:
        attached, watched = self._attached, self._epoll.fileno()
        try:
            self._driver = RingDriver(self._ports, engine, attached.queues, attached.depth, watched, serve)
        except BackendError as error:
            log.warning("native ring loop unavailable (%s): using the slower Python loop", error)
            return False
        self._driver.spin(attached.spin_us)
        for link in self._links:
            if link.ring is not None:
                self._forget_bell(link.ring)
                self._driver.bells(link.queue, link.ring.bell, link.ring.worker_bell)
        return True

    def _connect_due(self) -> None:
        now_s = time.monotonic()
        for link in self._links:
            if link in self._absent and link.due_s <= now_s:
                self._connect(link)

    def _connect(self, link: RingConnection) -> None:
        connection = socket.socket(socket.AF_UNIX, _KIND)
        question = wire.OpenRing(v=wire.PROTOCOL_VERSION, token=self._attached.token)
        try:
            connection.connect(link.path)
            connection.send(msgspec.json.encode(question))
        except OSError as error:
            # No worker listens, its backlog is full, or it has just died.
            connection.close()
            link.put_off()
            link.door.failed(error.errno or 0)
            return
        link.door.reached()
        self._absent.discard(link)
        link.connection = connection
        self._link_of[connection.fileno()] = link
        self._epoll.register(connection, select.EPOLLIN)

    def _heard(self, link: RingConnection) -> None:
        assert link.connection is not None
        if link.ring is not None or not self._hears:
            # The connection ended, the worker sent something unasked, or the rings come after `stop_receiving`.
            self._end(link)
            return
        try:
            packet, files, _ = receive_descriptors(link.connection, _ANSWER_BYTES_MAX, _FILES)
        except BlockingIOError:
            return
        except OSError:
            self._end(link)
            return
        if packet:
            self._open(link, QueueRings(link.queue, packet, files))
        else:
            self._end(link)

    def _open(self, link: RingConnection, ring: QueueRings) -> None:
        link.ring = ring
        link.delay_s = RETRY_S
        self._opened += 1
        lib.ports_open(self._ports, link.queue, ring.memory, ring.entries, ring.bell, ring.worker_bell)
        if self._driver is not None:
            self._driver.bells(link.queue, ring.bell, ring.worker_bell)
        else:
            self._bells.add(ring.bell)
            self._epoll.register(ring.bell, _EDGE)
        self.send_frame(link.queue, hello(self._attached, link.queue, lib.ports_epoch(self._ports)))

    def _end(self, link: RingConnection) -> None:
        assert link.connection is not None
        self._epoll.unregister(link.connection)
        del self._link_of[link.connection.fileno()]
        link.connection.close()
        link.connection = None
        if link.ring is not None:
            lib.ports_end(self._ports, link.queue)
            self._forget_bell(link.ring)
            if self._driver is not None:
                self._driver.bells(link.queue, -1, -1)
            link.ring.close()
            link.ring = None
        if self._hears:
            link.put_off()
            self._absent.add(link)

    def _forget_bell(self, ring: QueueRings) -> None:
        # The worker has this eventfd too: after closing only ours, epoll would keep it under a number that is reused.
        if ring.bell in self._bells:
            self._bells.remove(ring.bell)
            self._epoll.unregister(ring.bell)

    @property
    def linked(self) -> int:
        """See `Links`."""
        return sum(each.ring is not None for each in self._links)

    def frames(self, queue: int) -> Iterator[bytes]:
        """See `Links`; one frame at most."""
        count = lib.ports_take(self._ports, queue, self._frame, wire.DESCRIPTORS_PER_FRAME_MAX)
        if count < 0:
            raise WireError(f"queue {queue}: the worker stored an impossible index in its ring")
        if count:
            self._frames_received += 1
            yield bytes(ffi.buffer(self._frame, count * wire.DESCRIPTOR_BYTES))

    def send_frame(self, queue: int, frame: bytes) -> None:
        """See `Links`.  A frame for a queue without a worker is dropped: it answers a dead worker."""
        self._frames_sent += 1
        error = lib.ports_send(self._ports, queue, frame, len(frame) // wire.DESCRIPTOR_BYTES)
        if error == -errno.ENOBUFS:
            raise WireError(unread(queue, self._attached))
        if error:
            raise WireError(f"queue {queue}: sending into its ring: {os.strerror(-error)}")

    def stop_receiving(self) -> None:
        """See `Links`."""
        self._hears = False
        lib.ports_deafen(self._ports)
        self._absent.clear()
        for link in self._links:
            if link.ring is not None:
                self._forget_bell(link.ring)

    def statistics(self) -> LinkStatistics:
        """See `Links`."""
        counted = ffi.new("struct ports_statistics *")
        lib.ports_count(self._ports, counted)
        return LinkStatistics(
            frames_received=self._frames_received,
            frames_sent=self._frames_sent,
            bytes_received=counted.descriptors_in * wire.DESCRIPTOR_BYTES,
            bytes_sent=counted.descriptors_out * wire.DESCRIPTOR_BYTES,
            reconnects=max(0, self._opened - len(self._links)),
        )

    def close(self) -> None:
        """See `Links`."""
        self.stop_receiving()
        lib.ports_settle(self._ports, _SETTLE_MS)
        for link in self._links:
            if link.connection is not None:
                self._end(link)
        self._epoll.close()
