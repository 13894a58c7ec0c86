"""Attach messages: the JSON packets between a backend or a client of a disk and the daemon.

Owns their fields and validation.  Each is one packet on a SEQPACKET socket; `docs/PROTOCOL.md` describes them for other
languages.
"""

from typing import Literal

import msgspec

from ublkpool.bufpool.errors import WireError

PROTOCOL_VERSION = 1
ATTACH_MESSAGE_BYTES_MAX = 65536
TOKEN_BYTES = 16


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The store that a backend serves a device from; a successor must bring the same identity.

    `value` is compared as a whole, a file's by its parts (`same_store.py`).  It survives changes that keep the data (a
    rename, a reboot, growth) and changes when another store takes its place.  `in_boot` is compared only until the
    machine boots again; a store with an empty `value` and an `in_boot` ends with the boot.
    """

    value: str = ""
    in_boot: str = ""
    strength: Literal["strong", "weak"] = "strong"
    """weak: another store may have the same identity, since the store has nothing better to identify it."""
    store: str = ""
    """A text for people: a path, a serial number."""
    ends_with_device: bool = False
    """The store ends when its device is deleted or the daemon stops; the device may then have another one."""


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
    """Sent only to a daemon whose `Described` has `may_create`; None: the store has no identity."""
    generation_seen: int = 0
    """The highest generation that the store has recorded; the daemon answers with a higher one."""
    survives_death: bool = True
    """False: what was answered is lost when the process ends.  Sent only if `Described` has `knows_survival`."""
    stores_data: bool = True
    """False: reads return anything.  Sent only if `Described` has `is_check`."""
    resizes: bool = False
    """The backend answers `Resize`.  Sent only if `Described` has `knows_resize`."""
    owner: str = ""
    """The name under which this process holds the store's lock in its cluster; on record before the answer.  Sent only
    if `Described` has `former_owner`."""
    optimal_io_bytes: int = 0
    """The length of requests that the store prefers; 0: the physical block.  Sent only if `Described` has
    `knows_optimal_io`."""


class Describe(
    msgspec.Struct, tag="describe", tag_field="type", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Asks what the device is, instead of an attach; the connection is closed after the answer."""

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
    """The device was never served, so a backend may make an empty store for it; None: an older daemon."""
    takes_next: bool = False
    """The operator accepted the next store, whatever it is (`ublkpool rebind`)."""
    knows_survival: bool = False
    """The daemon knows `Attach.survives_death`; False: an older daemon."""
    is_check: bool = False
    """It is no daemon but `ublkpool backend check`, which knows `Attach.stores_data`."""
    knows_resize: bool = False
    """The daemon knows `Attach.resizes`, `Resized` and `Grown`; False: an older daemon."""
    resized_bytes: int = 0
    """The size that `ublkpool resize` gave the device, which a smaller size of the backend's options gives way to."""
    former_owner: str | None = None
    """`Attach.owner` of the last backend, whose process has ended, so that its lock may be broken; empty: none is
    known, or it may live.  None: an older daemon, which does not know `Attach.owner` and `Excluded`."""
    takes_over: bool = False
    """The operator wants the store's lock broken, no matter which client holds it (`ublkpool add --take-over`)."""
    knows_optimal_io: bool = False
    """The daemon knows `Attach.optimal_io_bytes`; False: an older daemon."""
    knows_leaving: bool = False
    """The daemon knows `Leaving`; False: an older daemon."""


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A segment that the daemon hands over; its descriptor travels with the message, in this order."""

    number: int
    size_bytes: int


class Attached(msgspec.Struct, tag="attached", tag_field="type", frozen=True, kw_only=True):
    """The daemon's answer to an attach: what the device is and where its queues listen."""

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
    """For each queue, in order, the path of the unix socket that hands out rings in shared memory."""
    segments: tuple[Segment, ...]
    own_segment: int
    """The number of the backend's own segment in descriptors, 0 without one."""
    post_bytes: tuple[int, ...] = ()
    """The sizes in which regions of it may be posted, ascending, the last for the largest write; empty: none may."""
    spin_us: int = 0
    """How long to poll the rings before sleeping, in microseconds, as the workers do."""
    generation: int = 0
    """Number of this attach, higher than at every earlier attach to this device's name; 0: an older daemon."""


class OpenRing(
    msgspec.Struct, tag="ring", tag_field="type", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """A backend's first packet to a queue whose rings it wants; `token` as in `Attached`."""

    v: int
    token: str


class RingOpened(msgspec.Struct, tag="ring_open", tag_field="type", frozen=True, kw_only=True):
    """The worker's answer, with three descriptors: the memory, the backend's eventfd, the worker's eventfd."""

    entries: int
    """Descriptors in each direction, a power of two."""


class Refused(msgspec.Struct, tag="refused", tag_field="type", frozen=True, kw_only=True):
    """The daemon refuses; the connection is closed after this."""

    reason: str


class Live(msgspec.Struct, tag="live", tag_field="type", frozen=True, kw_only=True):
    """The device's node can be opened."""

    path: str


class Detach(msgspec.Struct, tag="detach", tag_field="type", frozen=True, kw_only=True):
    """The daemon ends this backend: finish the executing requests, close, exit."""

    reason: str
    keep: bool = False
    """The device failed and may be made again: keep what a successor needs."""


class Resize(msgspec.Struct, tag="resize", tag_field="type", frozen=True, kw_only=True):
    """The store shall have at least `size_bytes`, more than the device has now; the backend answers with `Resized`.

    Sent only to a backend whose `Attach` has `resizes`.
    """

    size_bytes: int


class Resized(
    msgspec.Struct, tag="resized", tag_field="type", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """The answer to `Resize`: the store has `size_bytes`, also after a power failure, and requests up to there are
    executed; or `reason` says why not."""

    size_bytes: int
    """As in the question."""
    reason: str = ""


class Grown(
    msgspec.Struct, tag="grown", tag_field="type", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """From a backend: its store has grown to `size_bytes`, under the promise of `Resized`; no answer.

    At most one a second, after the first 16: further ones count as packets that the daemon does not expect.
    """

    size_bytes: int


class Excluded(
    msgspec.Struct, tag="excluded", tag_field="type", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """From a backend that is about to end: another client has taken the store over, so no successor may serve the
    device, whose clients know data that may have changed since; no answer.

    Sent only if `Described` has `former_owner`.
    """

    reason: str


class Leaving(
    msgspec.Struct, tag="leaving", tag_field="type", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """From a backend, once, as its last packet: it has finished its requests and ends since it was told to; no answer.

    Sent only if `Described` has `knows_leaving`.
    """


class LeaseBuffer(
    msgspec.Struct, tag="lease", tag_field="type", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """A client's first packet on the attach socket.  The end of the connection is the end of the lease."""

    v: int
    device: str


class BufferLeased(msgspec.Struct, tag="leased", tag_field="type", frozen=True, kw_only=True):
    """The answer, with the descriptor of a slice of the client area if `size_bytes` is not 0."""

    path: str
    """The disk."""
    size_bytes: int
    """Of the slice; 0: no slice is available, use ordinary memory."""


DaemonMessage = Attached | Described | Refused | Live | Detach | Resize | BufferLeased
BackendMessage = Attach | Describe | LeaseBuffer
SessionMessage = Resized | Grown | Excluded | Leaving
"""What an attached backend may send."""
_encoder = msgspec.json.Encoder()
_backend_decoder: msgspec.json.Decoder[BackendMessage] = msgspec.json.Decoder(BackendMessage)
_session_decoder: msgspec.json.Decoder[SessionMessage] = msgspec.json.Decoder(SessionMessage)
_daemon_decoder: msgspec.json.Decoder[DaemonMessage] = msgspec.json.Decoder(DaemonMessage)


def encode_message(message: BackendMessage | SessionMessage | DaemonMessage) -> bytes:
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


def decode_session_message(packet: bytes) -> SessionMessage:
    """A packet of an attached backend's.  Raises `WireError`."""
    try:
        return _session_decoder.decode(packet)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"backend: {error}") from error


def decode_daemon_message(packet: bytes) -> DaemonMessage:
    """A packet of the daemon's.  Raises `WireError`."""
    try:
        return _daemon_decoder.decode(packet)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"daemon: {error}") from error
