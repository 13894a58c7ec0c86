"""The SDK's lower half: attach to a device, map its memory, exchange frames with its queues.

Owns the attach connection, the mappings and the links to the queues, over one of the transports.  Does not interpret
requests: engines do.  One thread uses a `DeviceConnection`, in the backend's process; open it after any fork, since
neither a ZeroMQ context nor a loop survives one.
"""

import errno
import mmap
import os
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, Self

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused, BackendError, PoolError, WireError
from ublkpool.bufpool.huge_pages import SharedMap
from ublkpool.bufpool.memory_room import check_room
from ublkpool.bufpool.packets import receive_descriptors
from ublkpool.bufpool.sdk.links import Links, LinkStatistics
from ublkpool.bufpool.sdk.ring_links import RingLinks
from ublkpool.bufpool.seals import is_sealed, seal
from ublkpool.bufpool.way_out import explain, too_long_for_sockets

Transport = Literal["auto", "ring", "zeromq"]
"""How descriptors travel: `auto` uses rings if the daemon offers them, otherwise ZeroMQ."""
ATTACH_ANSWER_TIMEOUT_S = 60.0
_RETRY_INTERVAL_S = 0.05
_SEGMENTS_MAX = 32
_ABSENT = (errno.ENOENT, errno.ECONNREFUSED)


class PollResult(NamedTuple):
    """The result of `poll`: queues with frames, readable watched descriptors, a message on the attach connection."""

    queues: list[int]
    descriptors: list[int]
    control: bool


def map_segment(descriptor: int, size_bytes: int) -> SharedMap:
    """Map a segment, shared, writable, every page present.  Raises `BackendError` if its file is shorter, `OSError`."""
    actual_bytes = os.fstat(descriptor).st_size
    if actual_bytes < size_bytes:
        raise BackendError(f"a segment of {size_bytes} bytes was announced, its file has {actual_bytes}")
    return SharedMap(descriptor, size_bytes)


class OwnSegment:
    """Memory that the backend brings: a sealed memfd, fully allocated, mapped here; the daemon gets its descriptor."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        """Takes over `descriptor`; see `create` and `adopt`."""
        self.descriptor = descriptor
        self.size_bytes = size_bytes
        self._map = map_segment(descriptor, size_bytes)
        self.view = self._map.view

    @classmethod
    def create(cls, size_bytes: int, name: str = "ublkpool-backend") -> Self:
        """A new segment of zeros, its size rounded up to whole pages.  Raises `PoolError` without enough memory."""
        size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        check_room(f"the backend's own memory ({name})", size_bytes, "lower the backend's size= or segment=")
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
            seal(descriptor)
            return cls(descriptor, size_bytes)
        except OSError as error:
            os.close(descriptor)
            raise BackendError(f"no memory for a segment of {size_bytes} bytes: {explain(error)}") from error

    @classmethod
    def adopt(cls, descriptor: int) -> Self:
        """A segment that `create` made in an earlier process; takes over the descriptor.

        Raises `BackendError`, having closed it, if it is not a sealed memfd.
        """
        if not is_sealed(descriptor):
            os.close(descriptor)
            raise BackendError("a segment to adopt must be a sealed memfd")
        return cls(descriptor, os.fstat(descriptor).st_size)

    def close(self) -> None:
        """Close and unmap; a view that is still in use keeps its mapping alive."""
        os.close(self.descriptor)
        self._map.close()


def _connect(run_dir: Path, wait_s: float) -> socket.socket:
    path = run_dir / "attach.sock"
    if reason := too_long_for_sockets(run_dir):
        raise BackendError(f"run directory {reason}")
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
    return f"cannot reach the daemon at {path}: {explain(error)}"


def connect_and_ask(
    run_dir: Path, question: wire.BackendMessage, wait_s: float = 0.0
) -> tuple[socket.socket, wire.DaemonMessage, list[int]]:
    """Connect to the attach socket, ask, and return the connection, the answer and the descriptors that came with it.

    Waits up to `wait_s` seconds for a daemon that does not listen yet.  Raises `AttachRefused` with the daemon's
    reason, `BackendError` without a daemon, `WireError` for an answer that is not valid.
    """
    connection = _connect(run_dir, wait_s)
    descriptors: list[int] = []
    try:
        packet, descriptors = _ask(connection, question, [])
        return connection, _not_refused(packet), descriptors
    except PoolError:
        connection.close()
        _close_all(descriptors)
        raise


def describe(run_dir: Path, device: str, wait_s: float = 0.0) -> wire.Described:
    """The daemon's description of `device` before an attach; raises as `connect_and_ask`."""
    question = wire.Describe(v=wire.PROTOCOL_VERSION, device=device)
    connection, answer, _ = connect_and_ask(run_dir, question, wait_s)
    connection.close()
    if not isinstance(answer, wire.Described):
        raise WireError(f"describe: expected described or refused, got {type(answer).__name__.lower()}")
    return answer


def _ask(
    connection: socket.socket, message: wire.BackendMessage, descriptors: list[int]
) -> tuple[bytes, list[int]]:
    """The daemon's first packet, and the descriptors that came with it.  Raises `BackendError`."""
    connection.settimeout(ATTACH_ANSWER_TIMEOUT_S)
    try:
        # A daemon that refuses before it has read the question closes the connection; its answer is still there.
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
        # The kernel reports first that the daemon left our packet unread; the daemon's answer comes after that.
        return _receive_once(connection)


def _receive_once(connection: socket.socket) -> tuple[bytes, list[int]]:
    packet, received, _ = receive_descriptors(connection, wire.ATTACH_MESSAGE_BYTES_MAX, _SEGMENTS_MAX)
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


def make_links(attached: wire.Attached, transport: Transport) -> Links:
    """Links over the wanted transport.  Raises `BackendError` for `ring` if the daemon offers no rings."""
    if transport == "zeromq" or (transport == "auto" and not attached.rings):
        return _zeromq_links(attached)
    if not attached.rings:
        raise BackendError("transport=ring: this daemon offers no rings; transport=zeromq is always there")
    return RingLinks(attached)


def _zeromq_links(attached: wire.Attached) -> Links:
    # Imported here: loading ZeroMQ takes longer than the whole SDK, and a backend over rings does not need it.
    from ublkpool.bufpool.sdk.zeromq_links import ZeroMQLinks

    return ZeroMQLinks(attached)


class DeviceConnection:
    """A backend's connection to one device."""

    def __init__(
        self,
        connection: socket.socket,
        attached: wire.Attached,
        segments: dict[int, SharedMap],
        own_segment: OwnSegment | None,
        links: Links,
    ) -> None:
        """See `open`."""
        self.attached = attached
        self.own_segment = own_segment
        self.links = links
        self._connection = connection
        self._maps = segments
        self.segments = {number: mapping.view for number, mapping in segments.items()}
        links.watch(connection.fileno())

    @classmethod
    def open(
        cls,
        run_dir: Path,
        device: str,
        attach: wire.Attach,
        own_segment: OwnSegment | None = None,
        *,
        wait_s: float = 0.0,
        transport: Transport = "auto",
    ) -> Self:
        """Attach to `device`, map its segments, send HELLO on every queue.

        Waits up to `wait_s` seconds for a daemon that does not listen yet.  Raises `AttachRefused` with the daemon's
        reason, `BackendError` without a daemon or without this transport, `WireError` for an answer that is not valid.
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
            return cls(connection, attached, segments, own_segment, make_links(attached, transport))
        except BaseException:
            connection.close()
            raise

    def poll(self, timeout_ms: int | None = None) -> PollResult:
        """Wait for frames, watched descriptors or the daemon; for ever if `timeout_ms` is None.

        Raises as `Links.poll`.
        """
        queues, descriptors = self.links.poll(timeout_ms)
        control = self._connection.fileno() if descriptors else -1
        if control not in descriptors:
            return PollResult(queues, descriptors, False)
        return PollResult(queues, [each for each in descriptors if each != control], True)

    def receive(self, queue: int) -> list[wire.Descriptor]:
        """The descriptors that have arrived on a queue.  Raises `WireError` for a frame that is not valid."""
        return [each for frame in self.links.frames(queue) for each in wire.iter_frame(frame)]

    def send(self, queue: int, descriptors: Sequence[wire.Descriptor]) -> None:
        """Send descriptors, in as few frames as they fit."""
        for start in range(0, len(descriptors), wire.DESCRIPTORS_PER_FRAME_MAX):
            frame = wire.pack_frame(descriptors[start : start + wire.DESCRIPTORS_PER_FRAME_MAX])
            self.links.send_frame(queue, frame)

    def message(self) -> wire.DaemonMessage | None:
        """The daemon's next message on the attach connection, None if the daemon is gone."""
        try:
            packet = self._connection.recv(wire.ATTACH_MESSAGE_BYTES_MAX)
        except ConnectionResetError:
            return None
        return wire.decode_daemon_message(packet) if packet else None

    def tell(self, message: wire.SessionMessage) -> None:
        """Send a message on the attach connection; it is lost if the daemon is gone or does not read."""
        with suppress(OSError):
            self._connection.send(wire.encode_message(message))

    def fileno(self) -> int:
        """The descriptor of the attach connection."""
        return self._connection.fileno()

    def forget_connection(self) -> None:
        """Stop polling the attach connection: after its end, every `poll` would report it."""
        self.links.unwatch(self._connection.fileno())

    def statistics(self) -> LinkStatistics:
        """Counters of the links."""
        return self.links.statistics()

    def close(self) -> None:
        """Send what is queued, then close the links, the mappings and the attach connection, in this order."""
        self.links.close()
        for mapping in self._maps.values():
            mapping.close()
        self._connection.close()
