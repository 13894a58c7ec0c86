"""Messages between the supervisor and a worker, over a SOCK_SEQPACKET socketpair made before the fork.

Owns the messages' fields and their coding, for both ends.  Messages are rare; none is about a request.
"""

import socket
from typing import Literal

import msgspec

from ublkpool.bufpool.engine.cow import CowLayout
from ublkpool.bufpool.packets import receive_packet, send_packet

MESSAGE_BYTES_MAX = 16384
StorageKind = Literal["null", "memory", "file", "cow"]


class Expect(msgspec.Struct, tag="expect", tag_field="type", frozen=True):
    """A backend will send HELLO with this token (hexadecimal); its segment's descriptor travels with the message.

    `segment` is 0 if the backend brings none; sizes in bytes.
    """

    token: str
    segment: int
    segment_bytes: int
    reads_own: bool
    user: int
    """The user that may connect to the queue."""
    fence: bool = False
    """The backend served an earlier epoch: send it no request before it has confirmed that none of that epoch runs."""
    id: int = 0
    """The question's number, which the answer repeats."""


class Lost(msgspec.Struct, tag="lost", tag_field="type", frozen=True):
    """The backend is dead or has released every buffer: send its unanswered requests to the next backend."""

    id: int = 0


class NewPool(msgspec.Struct, tag="new_pool", tag_field="type", frozen=True):
    """While no backend is attached: copy the pool to the memory whose descriptor travels with this, and use that."""

    id: int = 0


class GiveUp(msgspec.Struct, tag="give_up", tag_field="type", frozen=True):
    """The device is being deleted: fail requests that would wait for a backend."""


class SetDeadlines(msgspec.Struct, tag="set_deadlines", tag_field="type", frozen=True):
    """Replace the queue's deadlines, in milliseconds, as in `QueueConfig`."""

    timeout_ms: int
    fail_on_timeout: bool
    absent_ms: int
    id: int = 0


class Resize(msgspec.Struct, tag="resize", tag_field="type", frozen=True):
    """The store has grown to at least this size: the engine in the worker serves requests up to there."""

    size_bytes: int
    id: int = 0


class Grow(msgspec.Struct, tag="grow", tag_field="type", frozen=True):
    """Have the store to which the worker is connected grow to this size; `Grown` follows, which a cluster may delay."""

    size_bytes: int


class Hold(msgspec.Struct, tag="hold", tag_field="type", frozen=True):
    """Have requests wait, or go on: see `Queue.hold`.  `Quiet` follows once the backend has none.

    A descriptor that travels with it is the reader of a `RecordGate`: with the gate's end the hold ends, too.
    """

    on: bool
    id: int = 0


class FlushBackend(msgspec.Struct, tag="flush", tag_field="type", frozen=True):
    """Send the backend of a quiet queue a FLUSH; `Flushed` follows."""

    id: int = 0


class Connect(msgspec.Struct, tag="connect", tag_field="type", frozen=True):
    """Connect to the store, and take its lock: see `engine_connected.py`."""

    id: int = 0


class Serve(msgspec.Struct, tag="serve", tag_field="type", frozen=True):
    """The name under which the store is locked is on record: serve requests; `Linked` follows."""


class ToldEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that a prepared worker opens; sizes in bytes."""

    storage: StorageKind
    size_bytes: int
    read_only: bool
    own_bytes: int
    """Of the memory disk."""
    descriptors: int
    """How many have come with `HandOver`."""
    is_block_device: bool = False
    cow: CowLayout | None = None


class HandOver(msgspec.Struct, tag="hand_over", tag_field="type", frozen=True):
    """A descriptor of the store travels with this; `Become` follows the last one."""


class Become(msgspec.Struct, tag="become", tag_field="type", frozen=True, kw_only=True):
    """To a prepared worker, whose device is on record under this name now: serve it, also if the supervisor ends."""

    name: str
    deadlines: SetDeadlines
    engine: ToldEngine | None = None
    """The engine to open, for a worker that has the place for one."""
    id: int = 0


class Report(msgspec.Struct, tag="report", tag_field="type", frozen=True):
    """Another supervisor has taken over: answer with `Standing`."""

    id: int = 0


class Fetched(msgspec.Struct, tag="ready", tag_field="type", frozen=True):
    """Every tag is fetched."""


class Expecting(msgspec.Struct, tag="expecting", tag_field="type", frozen=True):
    """The answer to `Expect`: the queue accepts the backend, or `reason` says why not."""

    reason: str = ""
    id: int = 0


class Linked(msgspec.Struct, tag="linked", tag_field="type", frozen=True):
    """The backend has sent HELLO, and has confirmed the fence if one was asked for."""


class LetGo(msgspec.Struct, tag="let_go", tag_field="type", frozen=True):
    """The answer to `Lost`: no request waits for the old backend any more."""

    id: int = 0


class PoolChanged(msgspec.Struct, tag="pool_changed", tag_field="type", frozen=True):
    """The answer to `NewPool`: the new memory is in use, or `reason` says why not."""

    reason: str = ""
    id: int = 0


class DeadlinesSet(msgspec.Struct, tag="deadlines_set", tag_field="type", frozen=True):
    """The answer to `SetDeadlines`: they hold from now on."""

    id: int = 0


class Resized(msgspec.Struct, tag="resized", tag_field="type", frozen=True):
    """The answer to `Resize`: it is so from now on."""

    id: int = 0


class Holding(msgspec.Struct, tag="holding", tag_field="type", frozen=True):
    """The answer to `Hold`: it is so from now on."""

    id: int = 0


class Flushing(msgspec.Struct, tag="flushing", tag_field="type", frozen=True):
    """The answer to `FlushBackend`: whether it was sent; if not, the queue has no linked backend."""

    was_sent: bool
    id: int = 0


class Connected(msgspec.Struct, tag="connected", tag_field="type", frozen=True):
    """The answer to `Connect`: the name under which the store is locked, or `reason` says why it is not."""

    owner: str = ""
    reason: str = ""
    id: int = 0


class Became(msgspec.Struct, tag="became", tag_field="type", frozen=True):
    """The answer to `Become`: it is so from now on, or `reason` says why not."""

    reason: str = ""
    id: int = 0


class Standing(msgspec.Struct, tag="standing", tag_field="type", frozen=True):
    """The answer to `Report`; every message before it was meant for the earlier supervisor."""

    fetched: bool
    token: str
    """Of the backend that the worker serves or expects, hexadecimal; empty if none."""
    linked: bool | None = None
    """Whether that backend has linked, as of `Linked`; None from a worker of an earlier version."""
    id: int = 0
    knows_new_pool: bool = False
    """Whether the worker understands `NewPool`; false from a worker of an earlier version."""
    knows_deadlines: bool = False
    """Whether the worker understands `SetDeadlines`; false from a worker of an earlier version."""
    knows_hold: bool = False
    """Whether the worker understands `Hold` and `FlushBackend`; false from a worker of an earlier version."""
    knows_gate: bool = False
    """Whether the worker takes a gate with `Hold`; false from a worker of an earlier version."""
    knows_resize: bool = False
    """Whether the worker understands `Resize`; false from a worker of an earlier version."""
    knows_grow: bool = False
    """Whether the worker understands `Grow`; false from a worker of an earlier version."""
    grown_bytes: int = 0
    """The largest size that the worker has told with `Grown`, asked or not; 0: none."""
    has_let_go: bool = False
    """Whether the last hold has ended with the supervisor that had begun it."""


class Grown(msgspec.Struct, tag="grown", tag_field="type", frozen=True):
    """The store to which the worker is connected has this size, and the worker serves requests up to there."""

    size_bytes: int
    is_asked: bool = False
    """Whether this answers `Grow`; otherwise the store has grown by itself."""
    reason: str = ""
    """Of an answer: why the store has not grown; empty if it has."""


class Quiet(msgspec.Struct, tag="quiet", tag_field="type", frozen=True):
    """After `Hold`: the backend has no request of this queue."""


class Flushed(msgspec.Struct, tag="flushed", tag_field="type", frozen=True):
    """After `FlushBackend`: the backend has answered with this result, or is lost (-ENOTCONN)."""

    result: int


class Cut(msgspec.Struct, tag="cut", tag_field="type", frozen=True):
    """The backend broke the protocol; its requests and buffers stay with it until `Lost`."""

    reason: str


class HungUp(msgspec.Struct, tag="hung_up", tag_field="type", frozen=True):
    """The serving backend's connection has ended.  The backend may be dead; if it lives, it must not go on."""


class Silent(msgspec.Struct, tag="silent", tag_field="type", frozen=True):
    """A request has waited longer than io_timeout_s, and the device's policy is to wait on."""


class Absent(msgspec.Struct, tag="absent", tag_field="type", frozen=True):
    """No backend has linked within the device's patience: requests fail until one does."""


class Fault(msgspec.Struct, tag="fault", tag_field="type", frozen=True):
    """The worker ends, for this reason."""

    reason: str
    excluded: bool = False
    """Another client has taken the store over: no worker may serve the device after this one."""


ToWorker = (
    Expect
    | Lost
    | NewPool
    | SetDeadlines
    | Resize
    | Grow
    | Hold
    | FlushBackend
    | GiveUp
    | Connect
    | Serve
    | HandOver
    | Become
    | Report
)
FromWorker = (
    Fetched
    | Expecting
    | Linked
    | LetGo
    | PoolChanged
    | DeadlinesSet
    | Resized
    | Holding
    | Flushing
    | Connected
    | Became
    | Standing
    | Grown
    | Quiet
    | Flushed
    | Cut
    | HungUp
    | Silent
    | Absent
    | Fault
)
Question = Expect | Lost | NewPool | SetDeadlines | Resize | Hold | FlushBackend | Connect | Become | Report
Answer = (
    Expecting
    | LetGo
    | PoolChanged
    | DeadlinesSet
    | Resized
    | Holding
    | Flushing
    | Connected
    | Became
    | Standing
)
ANSWERS: dict[type[Question], type[Answer]] = {
    Expect: Expecting,
    Lost: LetGo,
    NewPool: PoolChanged,
    SetDeadlines: DeadlinesSet,
    Resize: Resized,
    Hold: Holding,
    FlushBackend: Flushing,
    Connect: Connected,
    Become: Became,
    Report: Standing,
}
"""The type of the answer to each question; a worker of an earlier version repeats no `id`."""
_encoder = msgspec.json.Encoder()
_to_worker: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker)
_from_worker: msgspec.json.Decoder[FromWorker] = msgspec.json.Decoder(FromWorker)


def decode_from_worker(packet: bytes) -> FromWorker:
    """The supervisor's half.  Raises `msgspec.DecodeError`."""
    return _from_worker.decode(packet)


def send(sock: socket.socket, message: ToWorker | FromWorker, fd: int | None = None) -> None:
    """Send one message, with a duplicate of `fd`.  Raises `OSError`."""
    send_packet(sock, _encoder.encode(message), fd)


def receive_in_worker(sock: socket.socket) -> tuple[ToWorker | None, int | None]:
    """The next message and its descriptor; (None, None) when the supervisor is gone.  Raises `BlockingIOError`."""
    packet, fd = receive_packet(sock, MESSAGE_BYTES_MAX)
    return (_to_worker.decode(packet) if packet else None), fd


def pair() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end and the worker's, non-blocking and close-on-exec."""
    return socket.socketpair(
        socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )


def end_of(fd: int) -> socket.socket:
    """The worker's end, in a worker that was sent it."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=fd)
