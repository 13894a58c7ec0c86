"""The SDK's upper half: what a backend is.

**Answering a write promises that its data survives your own process.**  A backend that dies with requests unanswered
gets a successor, and the daemon sends it those requests again, and only those: whatever was answered is never sent
twice.  So return from `pwrite` (or call `complete`) when the data is outside your process: in the page cache, on a
disk, in another process, in memory that somebody else holds too.  That it survives a *power failure* is promised by
`flush` and by a write with `fua`, if you set `volatile_cache`; without it every answered write promises that as well.

There are four levels, each built on the next:

- **methods**: override `pread`, `pwrite` and friends; they run one after the other;
- **batches**: override `serve_batch`, which sees all that came at once as columns, and their data without a copy;
- **requests**: override `submit` and answer each `Request` when you like, from any thread;
- **frames**: return a `FrameEngine` from `engine`, which turns frames into frames, typically in native code.

Everything here except `Request.complete` and `Device.wake` happens on one thread, the one that called `serve`.
"""

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import msgspec

from ublkpool.bufpool.engine.device import Device as Device
from ublkpool.bufpool.errors import BackendError, PoolError
from ublkpool.bufpool.sdk.client import OwnSegment
from ublkpool.bufpool.wire import Flag, Identity, Op

if TYPE_CHECKING:
    from ublkpool.bufpool.sdk.batch import Batch

log = logging.getLogger("ublkpool.backend")

_READ, _WRITE, _FLUSH, _DISCARD, _WRITE_ZEROES = (int(each) for each in Op)
_FUA, _NOUNMAP = int(Flag.FUA), int(Flag.NOUNMAP)
_OP_NAMES = {int(op): op.name.lower() for op in Op}
_ZEROES = bytes(1 << 20)


def op_name(op: int) -> str:
    """What people call an operation."""
    return _OP_NAMES.get(op) or f"operation {op}"


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a backend that has none."""


class Hint(NamedTuple):
    """What is known of the device before the attach; `size_bytes` 0 takes the backend's size.

    `may_create`: the device was never served, so a backend that finds no store may make an empty one.  Otherwise a
    store that is missing, empty or too short is a `BackendError`: what would be read from a new one is lost data.
    """

    device: str
    run_dir: Path
    size_bytes: int = 0
    max_io_bytes: int = 0
    placement: Literal["pool", "backend"] = "pool"
    read_only: bool = False
    node: Path | None = None
    """The disk itself, /dev/ublkbN, once there is one; nothing of what a backend stores may lie on it."""
    may_create: bool = True


class Properties(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend tells the daemon about itself; sizes are bytes.

    `size_bytes` 0 takes whatever size the device was created with.  `segment_bytes` asks the SDK for an own segment,
    `segment` brings one; placement `backend` and read buffers `own` need it.  With
    `post_max_bytes` writes land in slots of that segment which the SDK has posted ahead, and nobody is asked for a
    place.  Who overrides `place` as well is asked for those above so many bytes, or that find no slot, and has the
    segment from `Device.own_from` on.

    `identity` says which store this is: the daemon refuses a successor with another one.  A string is a strong
    identity; without one, the kind of the backend is all that a successor must have in common.  `generation_seen` is
    the highest `Device.generation` that the store has on record; the daemon answers with a higher one.
    """

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
    segment: OwnSegment | None = None
    post_max_bytes: int = 0
    identity: Identity | str | None = None
    generation_seen: int = 0


class Outbox:
    """Results on their way from any thread to the loop, and the eventfd that wakes it."""

    __slots__ = ("_awake", "_loop_thread", "descriptor", "results")

    def __init__(self) -> None:
        self.results: deque[tuple[Request, int]] = deque()
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._loop_thread = threading.get_ident()
        self._awake = False

    def put(self, request: "Request", result: int) -> None:
        """Thread-safe."""
        self.results.append((request, result))
        if threading.get_ident() != self._loop_thread:
            self.wake()

    def wake(self) -> None:
        """Thread-safe; many wakes before the loop turns cost one system call."""
        if not self._awake:
            self._awake = True
            os.eventfd_write(self.descriptor, 1)

    def acknowledge(self) -> None:
        """The loop is about to look at `results`.  Order matters: a wake from now on writes again."""
        if self._awake:
            # Not yet written if the waker was interrupted between the two: then this loop turns once too often.
            with suppress(BlockingIOError):
                os.eventfd_read(self.descriptor)
            self._awake = False

    def close(self) -> None:
        """Close the eventfd."""
        os.close(self.descriptor)


class Request:
    """One request, to be answered exactly once.

    `buffer` is the memory of a read (to fill) or a write (to store) and empty for everything else; it may be used
    until the answer.  `region` is the offset in the own segment of a write that was placed there, else -1.
    `flags` are `wire.Flag` bits; `REPLAY` says that an earlier backend may have executed this one already.
    """

    __slots__ = ("_answered", "_outbox", "buffer", "flags", "key", "length", "offset", "op", "region")

    def __init__(
        self,
        op: int,
        flags: int,
        offset: int,
        length: int,
        buffer: memoryview,
        region: int,
        outbox: Outbox,
        key: Any,
    ) -> None:
        """`key` is the engine's name for it."""
        self.op, self.flags = op, flags
        self.offset, self.length = offset, length
        self.buffer = buffer
        self.region = region
        self.key = key
        self._outbox = outbox
        self._answered = False

    @property
    def fua(self) -> bool:
        """Whether the write must be on stable storage before it is answered."""
        return bool(self.flags & _FUA)

    @property
    def answered(self) -> bool:
        """Whether `complete` or `fail` was called."""
        return self._answered

    def complete(self, result: int | None = None) -> None:
        """Answer: bytes moved, or a negative errno; None means all of it.  Thread-safe."""
        if self._answered:
            raise RuntimeError(f"{self!r} was answered twice")
        self._answered = True
        if result is None:
            result = self.length if self.op <= _WRITE else 0
        self._outbox.put(self, result)

    def fail(self, error: BaseException) -> None:
        """Answer with the errno of `error`; what is no `OSError` is logged and becomes EIO.  Thread-safe."""
        self.complete(errno_of(error, f"{op_name(self.op)} at {self.offset}"))

    def __repr__(self) -> str:
        return f"<Request {op_name(self.op)} offset={self.offset} length={self.length} flags={self.flags}>"


class FrameEngine(Protocol):
    """The lowest level: whole frames of the wire in, whole frames out, fences included."""

    def fileno(self) -> int:
        """Readable when `answers` has something new although nothing was taken."""

    def take(self, queue: int, frame: bytes) -> None:
        """Start what a frame of a worker asks for.  Raises `WireError` for one that makes no sense."""

    def answers(self) -> Iterable[tuple[int, bytes]]:
        """The frames that are ready to be sent, as (queue, frame); called once per turn of the loop."""

    def running(self) -> int:
        """How many requests are executing; the process ends when this is 0."""

    def statistics(self) -> msgspec.Struct:
        """A frozen record of counters."""

    def close(self) -> None:
        """Free everything; nothing is running."""


class Backend:
    """Base class of every backend; override what you need.

    A method may raise `OSError`: the request fails with its errno.  Any other exception is logged once with its
    traceback and fails the request with EIO.  Neither ends the loop.
    """

    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    """A frozen `msgspec.Struct`; its fields are the backend's options, `sizes.ByteSize` reads `64M`."""

    def __init__(self, options: msgspec.Struct = NoOptions()) -> None:  # noqa: B008 - frozen
        self.options = options

    def open(self, hint: Hint) -> Properties:
        """Open the storage.  Raises `BackendError` if it cannot be used."""
        raise NotImplementedError

    def started(self, device: Device) -> None:
        """The device is attached; requests follow."""

    def engine(self, device: Device) -> FrameEngine | None:
        """The frame level: an engine of your own, or None to be given requests."""
        return None

    def serve_batch(self, batch: "Batch") -> None:
        """The batch level: do these reads and writes, and say in `batch.result` which of them failed or fell short.

        An exception fails all of them.  What has no data still goes to its method.
        """
        raise NotImplementedError

    def submit(self, batch: Sequence[Request]) -> None:
        """The request level: start these, and answer each when it is done.  Reads come first, then writes."""
        for request in batch:
            try:
                request.complete(perform(self, request))
            except Exception as error:
                request.fail(error)

    def pread(self, buf: memoryview, offset: int) -> int | None:
        """Fill `buf`.  Returns the bytes read, None for all."""
        raise OSError(errno.EOPNOTSUPP, "this backend does not read")

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> int | None:
        """Store `buf`; the module's first paragraph says what returning promises."""
        raise OSError(errno.EOPNOTSUPP, "this backend does not write")

    plain_pread: Callable[[memoryview, int], int | None] | None = None
    """Called instead of `pread`, if that is a shorter way."""
    plain_pwrite: Callable[[memoryview, int], int | None] | None = None
    """Called instead of `pwrite` for writes without FUA, if that is a shorter way."""

    def flush(self) -> None:
        """Make everything that was answered survive a power failure."""

    def trim(self, offset: int, length: int) -> None:
        """These blocks are no longer needed; their content becomes undefined."""

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """Write zeros; they may become a hole if `may_unmap`."""
        for start in range(offset, offset + length, len(_ZEROES)):
            piece_bytes = min(len(_ZEROES), offset + length - start)
            self.pwrite(memoryview(_ZEROES)[:piece_bytes], start, False)

    def place(self, offset: int, length: int, flags: int) -> int | None:
        """Name the byte offset in the own segment where a write's data shall land.

        None: no room now, ask again when a region came back or after `Device.wake`.  An `OSError` fails the write.
        """
        raise OSError(errno.EOPNOTSUPP, "this backend does not place writes")

    def store_placed(self, region: int, buf: memoryview, offset: int, fua: bool) -> int | None:
        """Store a write whose data (`buf`) landed at `region`; a backend that keeps it there has nothing to do."""
        return self.pwrite(buf, offset, fua)

    def read_in_place(self, offset: int, length: int) -> int | None:
        """Name the region of the own segment where a read's data already lies; None: not yet, see `place`."""
        raise OSError(errno.EOPNOTSUPP, "this backend does not read in place")

    def released(self, region: int) -> None:
        """A region that `place` or `read_in_place` named is yours again; told exactly once for each.

        For a write that is some time after its answer: until then leave its data where it is, for if you die the
        daemon may have to take it from there.  While no request waits for a region, it may come as late as with the
        next request.
        """

    def detached(self) -> None:
        """The daemon wants no backend for this device any more: `close` follows, and no successor will."""

    def close(self) -> None:
        """Close the storage.  A successor may attach afterwards."""

    def statistics(self) -> Mapping[str, int]:
        """Counters of the backend's own."""
        return {}


def asks_for_places(backend: Backend) -> bool:
    """Whether its author names places for writes."""
    return type(backend).place is not Backend.place


def perform(backend: Backend, request: Request) -> int | None:
    """Call the method for a request."""
    op = request.op
    if op == _READ:
        return backend.pread(request.buffer, request.offset)
    if op == _WRITE:
        fua = bool(request.flags & _FUA)
        if request.region >= 0:
            return backend.store_placed(request.region, request.buffer, request.offset, fua)
        return backend.pwrite(request.buffer, request.offset, fua)
    perform_without_data(backend, op, request.flags, request.offset, request.length)
    return None


def perform_without_data(backend: Backend, op: int, flags: int, offset: int, length: int) -> None:
    """Call the method for a request that has no buffer."""
    if op == _FLUSH:
        backend.flush()
    elif op == _DISCARD:
        backend.trim(offset, length)
    elif op == _WRITE_ZEROES:
        backend.zero(offset, length, not flags & _NOUNMAP)
        if flags & _FUA:
            backend.flush()
    else:
        raise OSError(errno.EOPNOTSUPP, f"operation {op}")


_logged: set[tuple[type[BaseException], tuple[str, int]]] = set()


def errno_of(error: BaseException, what: str) -> int:
    """The negative errno that answers a request which failed with `error`; bugs are logged, each kind once."""
    if isinstance(error, OSError) and error.errno:
        return -error.errno
    if isinstance(error, PoolError):
        return -error.errno
    where = _innermost(error)
    if (type(error), where) not in _logged:
        _logged.add((type(error), where))
        log.error("%s failed with a bug, answered EIO (said once)", what, exc_info=error)
    return -errno.EIO


def _innermost(error: BaseException) -> tuple[str, int]:
    """The file and line that raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace is not None else ("", 0)


def check_properties(properties: Properties) -> Properties:
    """The properties, with a size in whole blocks: a store that was grown may end in the middle of one.

    Raises `BackendError` naming the first property that no device can have.
    """
    block = properties.logical_block_bytes
    if block & (block - 1) or not 512 <= block <= 4096:
        raise BackendError(f"a logical block of {block} bytes: it must be a power of two, 512 to 4096")
    rest_bytes = properties.size_bytes % block
    if properties.size_bytes < 0 or rest_bytes == properties.size_bytes > 0:
        raise BackendError(f"a size of {properties.size_bytes} bytes is not one block of {block}")
    if rest_bytes:
        log.warning("the last %d bytes are not a block and not served", rest_bytes)
        properties = msgspec.structs.replace(properties, size_bytes=properties.size_bytes - rest_bytes)
    needs_segment = properties.placement == "backend" or properties.read_buffers == "own"
    if needs_segment and not (properties.segment_bytes or properties.segment):
        raise BackendError("placement backend and read buffers own need a segment (segment_bytes)")
    if properties.post_max_bytes and (properties.placement == "pool" or properties.read_buffers == "own"):
        raise BackendError(
            "post_max_bytes is for placement backend or any, with reads into buffers of the pool"
        )
    return properties
