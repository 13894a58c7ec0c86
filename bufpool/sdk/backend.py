"""The base class of backends, and all names that their authors need.

**Answering a write promises that its data survives your own process.**  After a backend dies, the daemon sends its
unanswered requests to the successor, and only those: an answered request is never sent again.  So return from `pwrite`
(or call `complete`) when the data is outside your process: in the page cache, on a disk, in another process, in memory
that another process holds too.  If you set `volatile_cache`, `flush` and a write with `fua` promise that data survives
a *power failure*; without it every answered write promises that as well.

There are four levels, each built on the next:

- **methods**: override `pread`, `pwrite` and friends; they are called one after the other, with `parallel` on several
  threads, and `async def` methods run on an asyncio loop;
- **batches**: override `serve_batch`; it gets the reads and writes that arrived together as columns;
- **requests**: override `submit`, and answer each `Request` later, from any thread;
- **frames**: return a `FrameEngine` from `engine`; it turns frames of the wire into frames, typically in native code.

Every method runs on the thread that called `serve`, except those that `parallel` and `async def` move to other threads
(`runner.py`).  Only `Request.complete`, `Request.fail` and `Device.wake` may be called from other threads.
"""

import errno
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import msgspec

from ublkpool.bufpool.engine.device import Device as Device
from ublkpool.bufpool.sdk.properties import Hint as Hint
from ublkpool.bufpool.sdk.properties import Properties as Properties
from ublkpool.bufpool.sdk.properties import check_properties as check_properties
from ublkpool.bufpool.sdk.requests import Outbox as Outbox
from ublkpool.bufpool.sdk.requests import Request as Request
from ublkpool.bufpool.sdk.requests import errno_of as errno_of
from ublkpool.bufpool.sdk.requests import log as log
from ublkpool.bufpool.sdk.requests import op_name as op_name
from ublkpool.bufpool.wire import Flag, Op

if TYPE_CHECKING:
    from ublkpool.bufpool.sdk.batch import Batch

_READ, _WRITE, _FLUSH, _DISCARD, _WRITE_ZEROES = (int(each) for each in Op)
_FUA, _NOUNMAP = int(Flag.FUA), int(Flag.NOUNMAP)
_ZEROES = bytes(1 << 20)
Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments."""
Moved = int | None | Awaitable[int | None]
"""What a read or write returns: bytes, None for all; a method may be `async def`."""
Done = None | Awaitable[None]
"""What the other methods return; a method may be `async def`."""


SERVING = ("pread", "pwrite", "store_placed", "flush", "trim", "zero")
"""The methods that execute requests: `parallel` threads run them, or an asyncio loop."""
METHODS = (
    *(*SERVING, "open", "started", "resize", "detached", "close"),
    *("place", "read_in_place", "released", "submit"),
)
"""All methods that may be looked at before a backend is opened."""


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a backend that has none."""


class FrameEngine(Protocol):
    """The lowest level: whole frames of the wire in, whole frames out, fences included (docs/PROTOCOL.md)."""

    def fileno(self) -> int:
        """A file descriptor that is readable when `answers` has new frames although `take` was not called."""

    def take(self, queue: int, frame: bytes) -> None:
        """Start the requests of a worker's frame.  Raises `WireError` for a frame that is not valid."""

    def answers(self) -> Iterable[tuple[int, bytes]]:
        """The frames that are ready to be sent, as (queue, frame); called once in each turn of the loop."""

    def running(self) -> int:
        """How many requests are executing; the process ends only when this is 0."""

    def statistics(self) -> msgspec.Struct:
        """A frozen record of counters."""

    def close(self) -> None:
        """Free everything; called when no request is executing."""


class Backend:
    """Base class of every backend; override what you need.

    A method may raise `OSError`: the request fails with its errno.  Any other exception is logged once with its
    traceback, and the request fails with EIO.  Neither ends the loop.
    """

    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    """A frozen `msgspec.Struct` whose fields are the backend's options; type `sizes.ByteSize` reads `64M`."""

    volumes: ClassVar[str] = ""
    """`module:Class`, a subclass of `volumes.Volumes` for `ublkpool volume`; empty: this kind has none."""

    parallel: int = 1
    """How many threads run the methods that serve requests, 1 to 1024; with 1, plain methods run on the loop's thread,
    one after the other.  May be set until `open` returns."""

    exclusive_bytes: int = 0
    """Requests of any queue that touch the same chunk of this many bytes never run at once; 0: no such promise.

    A request takes all its chunks together, in order of arrival, so a method may read, change and write back a chunk
    without a lock.  A FLUSH touches no chunk.  May be set until `open` returns."""

    survives_death: bool = True
    """False: what was answered is lost when this process ends; the daemon then fails the device."""
    stores_data: bool = True
    """False: writes are dropped and reads return anything, so `ublkpool backend check` compares no data."""

    def __init__(self, options: msgspec.Struct = NoOptions()) -> None:  # noqa: B008 - frozen
        self.options = options

    def open(self, hint: Hint) -> Properties | Awaitable[Properties]:
        """Open the store.  Raises `BackendError` if it cannot be used; the text goes to the user."""
        raise NotImplementedError

    def started(self, device: Device) -> Done:
        """The device is attached; requests follow."""

    def resize(self, size_bytes: int) -> Done:
        """Make the store at least `size_bytes` large, which is more than the device has: `ublkpool resize` asks for it.

        A backend that does not override this is not asked.  Return when the size survives a power failure; requests
        beyond the old size come after that.  Called on a thread of its own, beside requests, and again for the same
        size if the daemon heard no answer.  An exception refuses: its text goes to the user, and the device stays as
        it is.  A store that has grown already needs nothing.  An `engine` of your own needs a method
        `resize(size_bytes)` as well; it is called on the loop's thread right after this.
        """
        raise OSError(errno.EOPNOTSUPP, "this backend cannot grow")

    def engine(self, device: Device) -> FrameEngine | None:
        """The frame level: an engine of your own, or None for one of the other levels."""
        return None

    def serve_batch(self, batch: "Batch") -> None:
        """The batch level: execute these reads and writes; set `batch.result` where one failed or fell short.

        An exception fails the whole batch.  Operations without data still go to their methods.
        """
        raise NotImplementedError

    def submit(self, batch: Sequence[Request]) -> None:
        """The request level: start these, and answer each when it is done.  Reads come first, then writes."""
        for request in batch:
            try:
                request.complete(perform(self, request))
            except Exception as error:
                request.fail(error)

    def pread(self, buf: memoryview, offset: int) -> Moved:
        """Fill `buf` with the data at `offset`, in bytes.  Returns the bytes read, None for all."""
        raise OSError(errno.EOPNOTSUPP, "this backend does not read")

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> Moved:
        """Store `buf` at `offset`, in bytes.  Returns the bytes written, None for all; fewer fail the write with EIO.

        The module's first paragraph says what returning promises; with `fua` the data must survive a power failure.
        """
        raise OSError(errno.EOPNOTSUPP, "this backend does not write")

    plain_pread: Callable[[memoryview, int], int | None] | None = None
    """Called instead of `pread` if it is set: a function that saves a call of a method."""
    plain_pwrite: Callable[[memoryview, int], int | None] | None = None
    """Called instead of `pwrite` for writes without FUA if it is set."""

    def flush(self) -> Done:
        """Return when every answered write survives a power failure."""

    def trim(self, offset: int, length: int) -> Done:
        """These bytes are no longer needed; reads may return anything there.  `length` may exceed 4 GiB."""

    def zero(self, offset: int, length: int, may_unmap: bool) -> Done:
        """Make these bytes read as zeros; with `may_unmap` they may become a hole.  `length` may exceed 4 GiB."""
        for write, arguments in self._zero_pieces(offset, length):
            write(*arguments)
        return None

    def _zero_pieces(self, offset: int, length: int) -> Iterator[Call]:
        for start in range(offset, offset + length, len(_ZEROES)):
            piece_bytes = min(len(_ZEROES), offset + length - start)
            yield self.pwrite, (memoryview(_ZEROES)[:piece_bytes], start, False)

    def calls_of(self, request: Request) -> Iterator[Call]:
        """The calls that execute a request, one after the other; the result of a read or write is that of the first.

        The SDK asks for them where it does not call the methods itself, because they run on other threads.  Raises
        `OSError` for an unknown operation.
        """
        op, offset, length = request.op, request.offset, request.length
        if op == _READ:
            yield self.plain_pread or self.pread, (request.buffer, offset)
        elif op == _WRITE:
            yield self._call_of_write(request)
        elif op == _FLUSH:
            yield self.flush, ()
        elif op == _DISCARD:
            yield self.trim, (offset, length)
        elif op == _WRITE_ZEROES:
            yield from self._calls_of_zero(request)
        else:
            raise OSError(errno.EOPNOTSUPP, f"operation {op}")

    def _call_of_write(self, request: Request) -> Call:
        buffer, offset, fua = request.buffer, request.offset, request.fua
        if request.region >= 0 and type(self).store_placed is not Backend.store_placed:
            return self.store_placed, (request.region, buffer, offset, fua)
        if self.plain_pwrite and not fua:
            return self.plain_pwrite, (buffer, offset)
        return self.pwrite, (buffer, offset, fua)

    def _calls_of_zero(self, request: Request) -> Iterator[Call]:
        arguments = (request.offset, request.length, not request.flags & _NOUNMAP)
        if request.fua and type(self).zero_durably is not Backend.zero_durably:
            yield self.zero_durably, arguments
            return
        if type(self).zero is Backend.zero:
            yield from self._zero_pieces(request.offset, request.length)
        else:
            yield self.zero, arguments
        if request.fua:
            yield self.flush, ()

    def callables(self) -> Mapping[str, Callable[..., Any]]:
        """The author's functions by name, which the SDK looks at before it opens the backend."""
        return {name: getattr(self, name) for name in METHODS}

    def zero_durably(self, offset: int, length: int, may_unmap: bool) -> None:
        """As `zero`, and the zeros must survive a power failure: by default with `flush`."""
        self.zero(offset, length, may_unmap)
        self.flush()

    def place(self, offset: int, length: int, flags: int) -> int | None:
        """Name the byte offset in the own segment where a write's data shall land: a multiple of the logical block.

        None means not now: it is called again after a region came back or after `Device.wake`.  An `OSError` fails the
        write.  Called from within a turn of the native loop: do not wait here.
        """
        raise OSError(errno.EOPNOTSUPP, "this backend does not place writes")

    def store_placed(self, region: int, buf: memoryview, offset: int, fua: bool) -> Moved:
        """Store a write whose data (`buf`) landed at `region`; a backend that keeps it there has nothing to do."""
        return self.pwrite(buf, offset, fua)

    def read_in_place(self, offset: int, length: int) -> int | None:
        """Name the region of the own segment where a read's data already lies; None means not yet, as in `place`."""
        raise OSError(errno.EOPNOTSUPP, "this backend does not read in place")

    def released(self, region: int) -> None:
        """A region that `place` or `read_in_place` named is yours again; called exactly once for each.

        A write's region comes back some time after its answer.  Leave the data there until then: if you die before the
        daemon has read your answer, it takes the data from the region.  While no request waits for a region, the
        release may arrive only with the next request.
        """

    def detached(self) -> Done:
        """The device is deleted: `close` follows, and no successor will attach."""

    def close(self) -> Done:
        """Close the store.  A successor may attach afterwards."""

    def statistics(self) -> Mapping[str, int]:
        """Counters of the backend's own."""
        return {}


def asks_for_places(backend: Backend) -> bool:
    """Whether the backend overrides `place`."""
    return type(backend).place is not Backend.place


def perform(backend: Backend, request: Request) -> Any:
    """Call the method for a request; returns the bytes moved, None for all.  Raises what the method raises.

    An `async def` method is not executed by this.
    """
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
    """Call the method for a FLUSH, DISCARD or WRITE_ZEROES.  Raises what it raises, `OSError` for another operation."""
    if op == _FLUSH:
        backend.flush()
    elif op == _DISCARD:
        backend.trim(offset, length)
    elif op == _WRITE_ZEROES:
        zero = backend.zero_durably if flags & _FUA else backend.zero
        zero(offset, length, not flags & _NOUNMAP)
    else:
        raise OSError(errno.EOPNOTSUPP, f"operation {op}")
