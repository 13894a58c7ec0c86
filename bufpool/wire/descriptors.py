"""Descriptors: the 64-byte messages of workers, backends and the broker.

Owns their layout and validation; `csrc/wire.h` is the same in C, `docs/PROTOCOL.md` describes it for other languages.

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
from typing import NamedTuple, cast

from ublkpool.bufpool.errors import WireError

DESCRIPTOR_BYTES = 64
DESCRIPTORS_PER_FRAME_MAX = 4096
SEGMENT_NONE = 0
SEGMENT_POOL = 1
"""Segment number of the device's pool; a backend's own segment gets another, higher number at every attach."""
SEGMENT_CLIENTS = 0xFFFFFFF0
"""Segment number of the first slice of the client area, whose memory clients of the disk may change at any time."""
CLIENT_SLICES_MAX = 16

_DESCRIPTOR = struct.Struct("<BBHIHHIQQQiIQQ")
assert _DESCRIPTOR.size == DESCRIPTOR_BYTES


class Kind(enum.IntEnum):
    """The kind of message: worker to backend below 16, backend to worker below 32, broker below 48."""

    REQUEST = 1
    """Execute this.  A write's data lies at (segment, buffer); fill a read there if segment is not 0."""
    PLACE = 2
    """A write of `length` bytes at `offset` is coming: where should its data go?"""
    DATA = 3
    """The data of a placed write now lies in the named region, which stays lent until RELEASE."""
    RELEASE = 4
    """Worker and kernel no longer use a region that the backend named, for a write or a read.  Until then it is lent,
    and keeps its content, whatever was answered."""
    WELCOME = 5
    """The answer to HELLO: requests follow."""
    FENCE = 6
    """Finish or give up every request of an epoch below `epoch`, then answer FENCED."""

    PLACED = 16
    """The answer to PLACE: put it at (segment, buffer)."""
    REJECT = 17
    """The other answer to PLACE: fail the write with `result` (a negative errno)."""
    DONE = 18
    """A request's result: bytes moved (reads and writes), 0, or a negative errno."""
    HELLO = 19
    """First descriptor of a backend on a queue's socket."""
    FENCED = 20
    """The answer to FENCE: no request of an older epoch is executing or will be executed."""
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
"""A descriptor's fields in the wire's order, where a named tuple costs too much."""


class Descriptor(NamedTuple):
    """One decoded descriptor; see the module's drawing.  Sizes and offsets are bytes."""

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
    """The frame of these descriptors."""
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
    """The 64 bytes that answer a descriptor: its identity, another kind, and these fields."""
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
