"""The SDK's lower half: attach to a device, map its memory, exchange frames with its queues.

Owns the attach connection, the ZeroMQ sockets (one DEALER a queue) and the mappings.  Knows nothing of what a request
means; `dispatch.py` and native engines do.  One thread uses an `Attachment`, in the backend's process; it must be
opened after any fork, since neither a ZeroMQ context nor a loop survives one.
"""

import errno
import fcntl
import mmap
import os
import select
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused, BackendError, PoolError, WireError

FRAMES_PER_TURN_MAX = 64
"""Frames read from one queue before the others get their turn."""
ATTACH_ANSWER_TIMEOUT_S = 60.0
_RETRY_INTERVAL_S = 0.05
_LINGER_MS = 1000
_SEGMENTS_MAX = 16
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_FENCE = int(wire.Kind.FENCE)
_ABSENT = (errno.ENOENT, errno.ECONNREFUSED)


class AttachmentStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one attachment since it was opened."""

    frames_received: int
    frames_sent: int
    bytes_received: int
    bytes_sent: int
    reconnects: int


class Ready(NamedTuple):
    """What a `poll` found."""

    queues: list[int]
    descriptors: list[int]
    control: bool


def map_segment(descriptor: int, size_bytes: int) -> mmap.mmap:
    """The segment behind a file descriptor, shared and with every page present."""
    actual_bytes = os.fstat(descriptor).st_size
    if actual_bytes < size_bytes:
        raise BackendError(f"a segment of {size_bytes} bytes was announced, its file has {actual_bytes}")
    return mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


class OwnSegment:
    """Memory that the backend brings: a sealed memfd, fully allocated, mapped here and handed to the daemon."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        """Takes over `descriptor`; see `create` and `adopt`."""
        self.descriptor = descriptor
        self.size_bytes = size_bytes
        self._map = map_segment(descriptor, size_bytes)
        self.view = memoryview(self._map)

    @classmethod
    def create(cls, size_bytes: int, name: str = "ublkpool-backend") -> Self:
        """A new segment of zeros, its size rounded up to whole pages."""
        size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return cls(descriptor, size_bytes)
        except OSError as error:
            os.close(descriptor)
            raise BackendError(f"no memory for a segment of {size_bytes} bytes: {error.strerror}") from error

    @classmethod
    def adopt(cls, descriptor: int) -> Self:
        """A segment that `create` made in an earlier process; takes over the descriptor."""
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            os.close(descriptor)
            raise BackendError("a segment to adopt must be a sealed memfd")
        return cls(descriptor, os.fstat(descriptor).st_size)

    def close(self) -> None:
        """Let go of the memory; views that are still in use keep their mapping alive."""
        os.close(self.descriptor)
        self.view.release()
        _close_map(self._map)


def _close_map(mapping: mmap.mmap) -> None:
    # A request that its backend still holds has a view of this mapping: it goes when that view goes.
    try:
        mapping.close()
    except BufferError:
        return


def _connect(run_dir: Path, wait_s: float) -> socket.socket:
    path = run_dir / "attach.sock"
    deadline = time.monotonic() + wait_s
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(path))
            return connection
        except OSError as error:
            connection.close()
            if error.errno not in _ABSENT or time.monotonic() >= deadline:
                raise BackendError(_unreachable(path, error)) from error
        time.sleep(_RETRY_INTERVAL_S)


def _unreachable(path: Path, error: OSError) -> str:
    if error.errno in _ABSENT:
        return f"no daemon listens at {path}: is ublkpool running, and is this its run directory?"
    return f"cannot reach the daemon at {path}: {error.strerror or error}"


def describe(run_dir: Path, device: str, wait_s: float = 0.0) -> wire.Described:
    """What the daemon knows of `device` before anybody attaches; errors as in `Attachment.open`."""
    question = wire.Describe(v=wire.PROTOCOL_VERSION, device=device)
    with _connect(run_dir, wait_s) as connection:
        packet, _ = _ask(connection, question, [])
    answer = _not_refused(packet)
    if not isinstance(answer, wire.Described):
        raise WireError(f"describe: expected described or refused, got {type(answer).__name__.lower()}")
    return answer


def _ask(
    connection: socket.socket, message: wire.BackendMessage, descriptors: list[int]
) -> tuple[bytes, list[int]]:
    """The daemon's first packet, and the descriptors that came with it."""
    connection.settimeout(ATTACH_ANSWER_TIMEOUT_S)
    try:
        # A daemon that does not want to hear it has said why already.
        with suppress(ConnectionError):
            socket.send_fds(connection, [wire.encode_message(message)], descriptors)
        return _receive(connection)
    except TimeoutError as error:
        raise BackendError(f"the daemon did not answer within {ATTACH_ANSWER_TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise BackendError(f"the daemon closed the connection: {error.strerror}") from error


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    try:
        return _receive_once(connection)
    except ConnectionResetError:
        # That the daemon has not read us comes first, then what it said.
        return _receive_once(connection)


def _receive_once(connection: socket.socket) -> tuple[bytes, list[int]]:
    packet, received, _, _ = socket.recv_fds(
        connection, wire.ATTACH_MESSAGE_BYTES_MAX, _SEGMENTS_MAX, socket.MSG_CMSG_CLOEXEC
    )
    return packet, received


def _exchange(
    connection: socket.socket, attach: wire.Attach, own_segment: OwnSegment | None
) -> tuple[wire.Attached, list[int]]:
    packet, received = _ask(connection, attach, [own_segment.descriptor] if own_segment else [])
    try:
        return _accepted(packet, received), received
    except PoolError:
        _close_all(received)
        raise


def _not_refused(packet: bytes) -> wire.DaemonMessage:
    if not packet:
        raise BackendError("the daemon closed the connection without an answer")
    message = wire.decode_daemon_message(packet)
    if isinstance(message, wire.Refused):
        raise AttachRefused(message.reason)
    return message


def _accepted(packet: bytes, received: Sequence[int]) -> wire.Attached:
    message = _not_refused(packet)
    if not isinstance(message, wire.Attached):
        raise WireError(f"attach: expected attached or refused, got {type(message).__name__.lower()}")
    if message.v != wire.PROTOCOL_VERSION or len(received) != len(message.segments):
        raise WireError(
            f"attach: version {message.v}, {len(message.segments)} segments, {len(received)} files"
        )
    return message


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class Attachment:
    """A backend's connection to one device."""

    def __init__(
        self,
        connection: socket.socket,
        attached: wire.Attached,
        segments: dict[int, mmap.mmap],
        own_segment: OwnSegment | None,
    ) -> None:
        """See `open`."""
        self.attached = attached
        self.own_segment = own_segment
        self.epoch = attached.epoch
        self._connection = connection
        self._maps = segments
        self.segments = {number: memoryview(mapping) for number, mapping in segments.items()}
        self._frames_received = self._frames_sent = 0
        self._bytes_received = self._bytes_sent = 0
        self._handshakes = [0] * attached.queues
        self._linked: set[int] = set()
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(connection.fileno(), zmq.POLLIN)
        self._queues = [self._make_queue() for _ in attached.endpoints]
        # Before anything connects: a first connection that nobody saw would make the next one look like the first.
        self._monitors = [self._watch_connection(queue) for queue in self._queues]
        for queue, endpoint in zip(self._queues, attached.endpoints, strict=True):
            queue.connect(endpoint)
        self._queue_of = {each: number for number, each in enumerate(self._queues)}
        self._monitor_of = {each: number for number, each in enumerate(self._monitors)}

    @classmethod
    def open(
        cls,
        run_dir: Path,
        device: str,
        attach: wire.Attach,
        own_segment: OwnSegment | None = None,
        *,
        wait_s: float = 0.0,
    ) -> Self:
        """Attach to `device`, map its segments, say HELLO on every queue.

        `wait_s`: how long to wait for a daemon that does not listen yet.  Raises `AttachRefused` with the daemon's
        reason, `BackendError` if there is no daemon, `WireError` for an answer that makes no sense.
        """
        attach = msgspec.structs.replace(
            attach, device=device, segment_bytes=own_segment.size_bytes if own_segment else 0
        )
        connection = _connect(run_dir, wait_s)
        try:
            attached, descriptors = _exchange(connection, attach, own_segment)
            try:
                segments = {
                    segment.number: map_segment(descriptor, segment.size_bytes)
                    for segment, descriptor in zip(attached.segments, descriptors, strict=True)
                }
            finally:
                _close_all(descriptors)
            connection.setblocking(False)
            attachment = cls(connection, attached, segments, own_segment)
        except BaseException:
            connection.close()
            raise
        for queue in range(attached.queues):
            attachment._hello(queue)
        return attachment

    def _make_queue(self) -> zmq.Socket[bytes]:
        queue = self._context.socket(zmq.DEALER)
        queue.setsockopt(zmq.ROUTING_ID, bytes.fromhex(self.attached.token))
        queue.setsockopt(zmq.LINGER, _LINGER_MS)
        # The queue's depth bounds what is in flight; a limit here could only block the loop.
        queue.setsockopt(zmq.SNDHWM, 0)
        queue.setsockopt(zmq.RCVHWM, 0)
        queue.setsockopt(zmq.RECONNECT_IVL, 10)
        queue.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        self._poller.register(queue, zmq.POLLIN)
        return queue

    def _watch_connection(self, queue: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
        monitor: zmq.Socket[bytes] = queue.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._poller.register(monitor, zmq.POLLIN)
        return monitor

    def _hello(self, queue: int) -> None:
        hello = wire.Descriptor(
            wire.Kind.HELLO, device=self.attached.device_number, queue=queue, epoch=self.epoch
        )
        self.send(queue, [hello])

    def watch(self, descriptor: int, events: int = select.POLLIN) -> None:
        """Let `poll` report this file descriptor too; `events` as of `select.poll`."""
        self._poller.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """Undo `watch`."""
        self._poller.unregister(descriptor)

    def poll(self, timeout_ms: int | None = None) -> Ready:
        """Wait until something can be done, for ever if `timeout_ms` is None."""
        ready = Ready([], [], False)
        for source, _ in self._poller.poll(timeout_ms):
            if isinstance(source, int):
                if source == self._connection.fileno():
                    ready = ready._replace(control=True)
                else:
                    ready.descriptors.append(source)
            elif source in self._queue_of:
                ready.queues.append(self._queue_of[source])
            else:
                self._link_changed(self._monitor_of[source])
        return ready

    @property
    def linked(self) -> int:
        """How many queues have a worker at the other end."""
        return len(self._linked)

    def _link_changed(self, queue: int) -> None:
        event = parse_monitor_message(self._monitors[queue].recv_multipart())["event"]
        if event == zmq.EVENT_DISCONNECTED:
            self._linked.discard(queue)
            return
        self._linked.add(queue)
        # The first HELLO was queued before the connection stood; after that a connection means a new worker.
        self._handshakes[queue] += 1
        if self._handshakes[queue] > 1:
            self._hello(queue)

    def frames(self, queue: int) -> Iterator[bytes]:
        """The frames that have arrived on a queue, at most `FRAMES_PER_TURN_MAX` of them."""
        receive = self._queues[queue].recv
        for _ in range(FRAMES_PER_TURN_MAX):
            try:
                frame = receive(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._frames_received += 1
            self._bytes_received += len(frame)
            self._note_epoch(frame)
            yield frame

    def _note_epoch(self, frame: bytes) -> None:
        # So that the HELLO to a worker's successor carries the epoch that the last one brought.
        kinds = frame[:: wire.DESCRIPTOR_BYTES]
        if _FENCE in kinds:
            starts = [at * wire.DESCRIPTOR_BYTES for at, kind in enumerate(kinds) if kind == _FENCE]
            epochs = [int.from_bytes(frame[start + 12 : start + 16], "little") for start in starts]
            self.epoch = max(self.epoch, *epochs)

    def receive(self, queue: int) -> list[wire.Descriptor]:
        """The descriptors that have arrived on a queue.  Raises `WireError` for a frame that is none."""
        return [each for frame in self.frames(queue) for each in wire.iter_frame(frame)]

    def send(self, queue: int, descriptors: Sequence[wire.Descriptor]) -> None:
        """Send descriptors, in as few frames as they fit."""
        for start in range(0, len(descriptors), wire.DESCRIPTORS_PER_FRAME_MAX):
            self.send_frame(
                queue, wire.pack_frame(descriptors[start : start + wire.DESCRIPTORS_PER_FRAME_MAX])
            )

    def send_frame(self, queue: int, frame: bytes) -> None:
        """Send a frame as it stands."""
        self._queues[queue].send(frame, zmq.NOBLOCK)
        self._frames_sent += 1
        self._bytes_sent += len(frame)

    def message(self) -> wire.DaemonMessage | None:
        """The daemon's next message on the attach connection, None if the daemon is gone."""
        try:
            packet = self._connection.recv(wire.ATTACH_MESSAGE_BYTES_MAX)
        except ConnectionResetError:
            return None
        return wire.decode_daemon_message(packet) if packet else None

    def stop_receiving(self) -> None:
        """Poll no queue any more; what is still sent to them is the successor's."""
        for queue in self._queues:
            self._poller.unregister(queue)

    def forget_connection(self) -> None:
        """Stop polling the attach connection: its end was seen and would be reported for ever."""
        self._poller.unregister(self._connection.fileno())

    def statistics(self) -> AttachmentStatistics:
        """What went over the queues."""
        return AttachmentStatistics(
            frames_received=self._frames_received,
            frames_sent=self._frames_sent,
            bytes_received=self._bytes_received,
            bytes_sent=self._bytes_sent,
            reconnects=sum(max(0, count - 1) for count in self._handshakes),
        )

    def close(self) -> None:
        """Send what is queued, then leave: sockets, mappings and the attach connection, in this order."""
        for queue, monitor in zip(self._queues, self._monitors, strict=True):
            queue.disable_monitor()
            monitor.close(linger=0)
            queue.close()
        self._context.term()
        for view in self.segments.values():
            view.release()
        for mapping in self._maps.values():
            _close_map(mapping)
        self._connection.close()
