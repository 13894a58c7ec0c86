"""The wire: every byte that workers, backends, the broker and the daemon exchange, both halves.

Owns the layout of descriptors and attach messages and their validation; knows nothing of sockets, memory or state.
`docs/PROTOCOL.md` is the same for readers in other languages.

A descriptor is 64 bytes, little-endian:

    byte  0        1        2        4                 8        10       12                16
          +--------+--------+--------+-----------------+--------+--------+-----------------+
      0   | kind   | op     | flags  | device          | queue  | tag    | epoch           |
          +--------+--------+--------+-----------------+--------+--------+-----------------+
     16   | sequence                                   | offset (bytes on the device)      |
          +--------------------------------------------+-----------------+-----------------+
     32   | length (bytes)                             | result (signed) | segment         |
          +--------------------------------------------+-----------------+-----------------+
     48   | buffer (byte offset in the segment)        | reserved, 0                       |
          +--------------------------------------------+-----------------------------------+

(device, queue, tag, epoch, sequence) name one request; an answer repeats all five.  A ZeroMQ frame between a worker
and a backend is 1 to `DESCRIPTORS_PER_FRAME_MAX` descriptors and nothing else.  A frame between a worker and the broker
is one descriptor followed by `length` slot numbers of 4 bytes.
"""

import enum
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, cast

import msgspec

from ublkpool.bufpool.errors import WireError

PROTOCOL_VERSION = 1
DESCRIPTOR_BYTES = 64
DESCRIPTORS_PER_FRAME_MAX = 4096
ATTACH_MESSAGE_BYTES_MAX = 65536
TOKEN_BYTES = 16
SEGMENT_NONE = 0
SEGMENT_POOL = 1
"""Segment number of the device's pool; a backend's own segment gets a higher number at every attach."""
SEGMENT_CLIENTS = 0xFFFFFFF0
"""Segment number of the first slice of the client area, whose memory clients of the disk may change at any time."""
CLIENT_SLICES_MAX = 16

_DESCRIPTOR = struct.Struct("<BBHIHHIQQQiIQQ")
assert _DESCRIPTOR.size == DESCRIPTOR_BYTES


class Kind(enum.IntEnum):
    """What a descriptor says.  Worker to backend below 16, backend to worker below 32, broker below 48."""

    REQUEST = 1
    """Do this.  A write's data already lies at (segment, buffer); a read may be filled there if segment is not 0."""
    PLACE = 2
    """A write of `length` bytes at `offset` is coming: where should its data go?"""
    DATA = 3
    """The data of a placed write now lies in the region that was named.  The region stays
    lent until RELEASE."""
    RELEASE = 4
    """The worker and the kernel are done with a region that the backend named, for a write or a read; until then it
    is lent and keeps its content, whatever was answered."""
    WELCOME = 5
    """The answer to HELLO: requests follow."""
    FENCE = 6
    """Stop everything of an epoch before `epoch`, then answer FENCED."""

    PLACED = 16
    """The answer to PLACE: put it at (segment, buffer)."""
    REJECT = 17
    """The other answer to PLACE: fail the write with `result` (a negative errno)."""
    DONE = 18
    """A request's result: bytes moved (reads and writes), 0, or a negative errno."""
    HELLO = 19
    """First descriptor of a backend on a queue's socket."""
    FENCED = 20
    """The answer to FENCE: nothing of an older epoch is running or will run."""
    POST = 21
    """A write of up to `length` bytes may land at (segment, buffer) without a PLACE; it comes as DATA that names it."""

    LEASE = 32
    """Worker to broker: `length` more buffers of class `op`, please; `sequence` counts the worker's leases of it."""
    GRANT = 33
    """Broker to worker: these slots (perhaps none) of class `op` are yours.  After the LEASE `sequence` and all before
    it `offset` more are on order; what was wished beyond that will not come."""
    RETURN = 34
    """Worker to broker: these slots of class `op` are no longer mine."""
    RECALL = 35
    """Broker to worker: others wait, return what you hold above your reserve of class `op`."""
    SYNC = 36
    """Worker to broker, first message after (re)connecting: of class `op` I hold exactly these slots."""


class Op(enum.IntEnum):
    """Operations, with the kernel's numbers (`UBLK_IO_OP_*`, include/uapi/linux/ublk_cmd.h)."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 5


class Flag(enum.IntFlag):
    """Bits of `flags`."""

    FUA = 1
    """The write must be on stable storage before it is answered."""
    NOUNMAP = 2
    """A WRITE_ZEROES that must keep its blocks allocated."""
    REGION = 4
    """In the DONE of a read: the data lies at (segment, buffer) named here, not in the buffer that was lent."""
    REPLAY = 8
    """This request was given to an earlier backend, which may have executed it."""


RawDescriptor = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int]
"""A descriptor's fields in the wire's order, for who cannot afford names."""


class Descriptor(NamedTuple):
    """One descriptor, decoded; see the module's drawing.  Sizes and offsets are bytes."""

    kind: int
    op: int = 0
    flags: int = 0
    device: int = 0
    queue: int = 0
    tag: int = 0
    epoch: int = 0
    sequence: int = 0
    offset: int = 0
    length: int = 0
    result: int = 0
    segment: int = SEGMENT_NONE
    buffer: int = 0
    reserved: int = 0

    def pack(self) -> bytes:
        """Its 64 bytes.  Raises `WireError` if a field does not fit."""
        try:
            return _DESCRIPTOR.pack(*self)
        except struct.error as error:
            raise WireError(f"descriptor {self} does not fit the wire: {error}") from error

    def answer(self, kind: Kind, result: int = 0) -> "Descriptor":
        """The answer to this request: same identity, another kind, a result (bytes or a negative errno)."""
        return self._replace(kind=kind, result=result, flags=0, segment=SEGMENT_NONE, buffer=0)


def pack_frame(descriptors: Iterable[Descriptor]) -> bytes:
    """One frame of many descriptors."""
    return b"".join([_DESCRIPTOR.pack(*each) for each in descriptors])


def iter_frame(frame: bytes | bytearray | memoryview) -> Iterator[Descriptor]:
    """The descriptors of a frame, in order.

    Raises `WireError` at once for a frame that is empty, too long, or not a multiple of 64 bytes.
    """
    return map(Descriptor._make, iter_raw(frame))


def iter_raw(frame: bytes | bytearray | memoryview) -> Iterator[RawDescriptor]:
    """As `iter_frame`, without names."""
    size = len(frame)
    if size == 0 or size % DESCRIPTOR_BYTES or size > DESCRIPTOR_BYTES * DESCRIPTORS_PER_FRAME_MAX:
        raise WireError(f"a frame of {size} bytes is not 1 to {DESCRIPTORS_PER_FRAME_MAX} descriptors of 64")
    return cast(Iterator[RawDescriptor], _DESCRIPTOR.iter_unpack(frame))


def pack_answer(
    to: RawDescriptor,
    kind: int,
    result: int = 0,
    flags: int = 0,
    segment: int = SEGMENT_NONE,
    buffer: int = 0,
) -> bytes:
    """The 64 bytes that answer a descriptor: its identity, and what is said."""
    _, op, _, device, queue, tag, epoch, sequence, offset, length, _, _, _, _ = to
    return _DESCRIPTOR.pack(
        kind, op, flags, device, queue, tag, epoch, sequence, offset, length, result, segment, buffer, 0
    )


def pack_slots(descriptor: Descriptor, slots: Sequence[int]) -> bytes:
    """A broker frame: the descriptor with `length` set to the number of slots, then the slots."""
    head = descriptor._replace(length=len(slots)).pack()
    return head + struct.pack(f"<{len(slots)}I", *slots)


def unpack_slots(frame: bytes | memoryview) -> tuple[Descriptor, tuple[int, ...]]:
    """A broker frame's descriptor and slots; a LEASE has none.  Raises `WireError` for any other shape."""
    if len(frame) < DESCRIPTOR_BYTES or len(frame) % 4:
        raise WireError(f"a broker frame of {len(frame)} bytes is no descriptor with slots")
    descriptor = Descriptor._make(_DESCRIPTOR.unpack_from(frame))
    count = (len(frame) - DESCRIPTOR_BYTES) // 4
    if descriptor.kind not in (Kind.LEASE, Kind.RECALL) and count != descriptor.length:
        raise WireError(f"a broker frame says {descriptor.length} slots and brings {count}")
    return descriptor, struct.unpack_from(f"<{count}I", frame, DESCRIPTOR_BYTES)


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which store a backend serves a device from; a successor must bring the same.

    `value` is compared as a whole.  It survives what leaves the data as it was (a rename, a reboot, growth) and changes
    when another store takes its place.  `in_boot` is compared only until the machine boots again; a store with an
    empty `value` and an `in_boot` ends with the boot.
    """

    value: str = ""
    in_boot: str = ""
    strength: Literal["strong", "weak"] = "strong"
    """weak: another store may have the same identity, since there is nothing better to tell it by."""
    store: str = ""
    """What the store is, for people: a path, a serial number."""
    ends_with_device: bool = False
    """The store is given up when its device is deleted or the daemon stops: the device's next one is a new one."""


class Attach(
    msgspec.Struct,
    tag="attach",
    tag_field="type",
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """A backend's first message on the attach socket, with its own segment's descriptor if it brings one.

    All sizes are bytes.  `size_bytes` 0 means: whatever the device was created with.  `segment_bytes` is the size of
    the sealed memfd that travels with the message, 0 for none; placement `backend` needs one.  Defaults are not sent:
    an older daemon refuses fields that it does not know.
    """

    v: int
    device: str
    kind: str
    size_bytes: int = 0
    logical_block_bytes: int = 512
    physical_block_bytes: int = 4096
    volatile_cache: bool = False
    read_only: bool = False
    rotational: bool = False
    discard_granularity_bytes: int = 0
    discard_max_bytes: int = 0
    write_zeroes_max_bytes: int = 0
    placement: Literal["pool", "backend", "any"] = "pool"
    read_buffers: Literal["pool", "own"] = "pool"
    segment_bytes: int = 0
    identity: Identity | None = None
    """Only for a daemon whose `Described` has `may_create`; None: this backend's store cannot be told from others."""
    generation_seen: int = 0
    """The highest generation that the store knows of; the daemon answers with a higher one."""


class Describe(
    msgspec.Struct, tag="describe", tag_field="type", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Instead of an attach: what is this device?  The connection is closed after the answer."""

    v: int
    device: str


class Described(msgspec.Struct, tag="described", tag_field="type", frozen=True, kw_only=True):
    """The answer: what the device was created with; `size_bytes` 0 takes the backend's.

    `path` is its disk, /dev/ublkbN, if there is one.
    """

    v: int
    device: str
    size_bytes: int
    max_io_bytes: int
    need_get_data: bool
    placement: Literal["pool", "backend"]
    read_only: bool
    path: str = ""
    may_create: bool | None = None
    """Whether the device was never served, so that a backend may make an empty store for it; None: an older daemon."""


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A segment that the daemon hands over; its descriptor travels with the message, in this order."""

    number: int
    size_bytes: int


class Attached(msgspec.Struct, tag="attached", tag_field="type", frozen=True, kw_only=True):
    """The daemon's answer: what the device is and where its queues listen."""

    v: int
    device: str
    device_number: int
    size_bytes: int
    logical_block_bytes: int
    queues: int
    depth: int
    max_io_bytes: int
    need_get_data: bool
    placement: Literal["pool", "backend"]
    read_only: bool
    epoch: int
    token: str
    """Hexadecimal; its 16 bytes are the ZeroMQ routing id that this backend must use on every queue."""
    endpoints: tuple[str, ...]
    """One ZeroMQ endpoint per queue, in order."""
    rings: tuple[str, ...] = ()
    """Where each queue hands out rings in shared memory: a unix socket's path, in order."""
    segments: tuple[Segment, ...]
    own_segment: int
    """The number by which the backend names its own segment, 0 if it brought none."""
    post_bytes: tuple[int, ...] = ()
    """In which sizes regions of it may be posted, ascending; the last is for the largest write.  Empty: not at all."""
    spin_us: int = 0
    """How long to look into the rings before sleeping, in microseconds, as the workers do."""
    generation: int = 0
    """Of this attach: higher than that of every earlier attach to this device's name; 0: an older daemon."""


class OpenRing(
    msgspec.Struct, tag="ring", tag_field="type", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """What a backend says first to a queue whose rings it wants; `token` as in `Attached`."""

    v: int
    token: str


class RingOpened(msgspec.Struct, tag="ring_open", tag_field="type", frozen=True, kw_only=True):
    """The worker's answer; with it come the memory, the backend's eventfd and the worker's, in this order."""

    entries: int
    """Descriptors in each direction, a power of two."""


class Refused(msgspec.Struct, tag="refused", tag_field="type", frozen=True, kw_only=True):
    """The daemon's other answer; the connection is closed after it."""

    reason: str


class Live(msgspec.Struct, tag="live", tag_field="type", frozen=True, kw_only=True):
    """The device's node can be opened."""

    path: str


class Detach(msgspec.Struct, tag="detach", tag_field="type", frozen=True, kw_only=True):
    """The daemon no longer wants this backend: finish what is running, close, exit."""

    reason: str
    keep: bool = False
    """The device failed and may be made again: what the backend keeps for a successor stays."""


class LeaseBuffer(
    msgspec.Struct, tag="lease", tag_field="type", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """What a client of a disk says first on the clients' socket.  The connection's end is the end of the lease."""

    v: int
    device: str


class BufferLeased(msgspec.Struct, tag="leased", tag_field="type", frozen=True, kw_only=True):
    """The answer; with it comes the descriptor of a slice of the client area, if there is one to be had."""

    path: str
    """The disk."""
    size_bytes: int
    """Of the slice; 0: take memory of your own, what lies there is copied."""


DaemonMessage = Attached | Described | Refused | Live | Detach | BufferLeased
BackendMessage = Attach | Describe | LeaseBuffer
_encoder = msgspec.json.Encoder()
_backend_decoder: msgspec.json.Decoder[BackendMessage] = msgspec.json.Decoder(BackendMessage)
_daemon_decoder: msgspec.json.Decoder[DaemonMessage] = msgspec.json.Decoder(DaemonMessage)


def encode_message(message: BackendMessage | DaemonMessage) -> bytes:
    """One attach-socket packet (JSON, UTF-8)."""
    return _encoder.encode(message)


def decode_backend_message(packet: bytes) -> BackendMessage:
    """A backend's first packet.  Raises `WireError` with a reason that names the field."""
    try:
        message = _backend_decoder.decode(packet)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"attach: {error}") from error
    if message.v != PROTOCOL_VERSION:
        raise WireError(f"attach: protocol version {message.v} is not {PROTOCOL_VERSION}")
    return message


def decode_daemon_message(packet: bytes) -> DaemonMessage:
    """A packet of the daemon's.  Raises `WireError`."""
    try:
        return _daemon_decoder.decode(packet)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"daemon: {error}") from error
