"""The backend below all layers, as plain methods, whatever its own level is.

Owns what a backend of another level needs: the asyncio loop of `async def` methods, or for batches, requests and
native engines an engine that gets one request at a time, with a buffer of its own.  Methods are called on the thread of
the layer that calls them, so a backend with `parallel` keeps its threads.
"""

import mmap
import select
from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.sdk.backend import (
    Backend,
    Device,
    FrameEngine,
    Hint,
    Outbox,
    Properties,
    Request,
    check_properties,
    log,
    op_name,
)
from ublkpool.bufpool.sdk.calls import CallEngine
from ublkpool.bufpool.sdk.client import OwnSegment
from ublkpool.bufpool.sdk.event_loop import EventLoop
from ublkpool.bufpool.sdk.layers.layer import Plain, behave_as
from ublkpool.bufpool.sdk.runner import check_methods, is_async
from ublkpool.bufpool.wire import Flag, Kind, Op

ASYNC_PARALLEL = 32
"""Threads of the layers over a backend with `async def` methods: each waits for one of its coroutines."""
_NOTHING = memoryview(b"")


class Bottom(Plain):
    """A backend of any level with plain methods that return when the request is done."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self._events = EventLoop()
        self._own: OwnSegment | None = None
        self._outbox: Outbox | None = None
        self._engine: _OneByOne | None = None

    @property
    def has_own_level(self) -> str:
        """The method that takes the backend's requests itself; empty if it has plain methods."""
        names = ("engine", "serve_batch", "submit")
        kind = type(self.backend)
        return next((name for name in names if getattr(kind, name) is not getattr(Backend, name)), "")

    def open(self, hint: Hint) -> Properties:
        """Open the backend; data is in buffers of the pool, so that each layer sees it."""
        check_methods(self.backend)
        opened: Properties = self._events.settle(self.backend.open(hint))
        properties = check_properties(opened)
        check_methods(self.backend)
        self._own = properties.segment
        if self._own is None and properties.segment_bytes:
            self._own = OwnSegment.create(properties.segment_bytes)
        behave_as(self, self.backend)
        if is_async(self.backend):
            self.parallel = ASYNC_PARALLEL
        return msgspec.structs.replace(
            properties,
            placement="pool",
            read_buffers="pool",
            segment=None,
            segment_bytes=0,
            post_max_bytes=0,
        )

    def started(self, device: Device) -> None:
        """Start the backend on a device of its own, whose pool has one buffer."""
        # The layers and the engine below them know the size of the start: beyond it they would fail requests.
        device = replace(device, resized=_keeps_size)
        self._outbox = Outbox()
        if not self.has_own_level:
            self._events.start(is_async(self.backend))
            self._events.settle(self.backend.started(device))
            return
        if type(self.backend).engine is not Backend.engine:
            log.warning(
                "%s: layers replace the native path: each request runs in Python, one at a time, with one more copy",
                device.name,
            )
        self._engine = _OneByOne(self.backend, device, self._own, self._events)

    def pread(self, buf: memoryview, offset: int) -> int | None:
        """See `Backend.pread`."""
        return self._do(Op.READ, 0, offset, len(buf), buf)

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> int | None:
        """See `Backend.pwrite`."""
        return self._do(Op.WRITE, Flag.FUA if fua else 0, offset, len(buf), buf)

    def flush(self) -> None:
        """See `Backend.flush`."""
        self._do(Op.FLUSH, 0, 0, 0, _NOTHING)

    def trim(self, offset: int, length: int) -> None:
        """See `Backend.trim`."""
        self._do(Op.DISCARD, 0, offset, length, _NOTHING)

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """See `Backend.zero`."""
        self._do(Op.WRITE_ZEROES, 0 if may_unmap else Flag.NOUNMAP, offset, length, _NOTHING)

    def _do(self, op: Op, flags: int, offset: int, length: int, buf: memoryview) -> int | None:
        if self._engine is not None:
            return self._engine.do(op, flags, offset, length, buf)
        assert self._outbox is not None
        request = Request(op, flags, offset, length, buf, -1, self._outbox, None)
        results = [
            self._events.settle(function(*arguments))
            for function, arguments in self.backend.calls_of(request)
        ]
        return results[0] if results and op <= Op.WRITE else None

    def detached(self) -> None:
        """See `Backend.detached`."""
        self._events.settle(self.backend.detached())

    def close(self) -> None:
        """End the engine, close the backend, and let go of its memory."""
        if self._engine is not None:
            self._engine.close()
        self._events.settle(self.backend.close())
        self._events.close()
        if self._outbox is not None:
            self._outbox.close()
        if self._own is not None:
            self._own.close()

    def statistics(self) -> Mapping[str, int]:
        """See `Backend.statistics`."""
        return self.backend.statistics()


def _keeps_size(size_bytes: int) -> None:
    log.warning(
        "the store has grown to %d bytes: a device with layers has its old size until its backend is started again",
        size_bytes,
    )


class _OneByOne:
    """An engine below layers: it gets one request at a time, and the thread waits for the answer."""

    def __init__(self, backend: Backend, device: Device, own: OwnSegment | None, events: EventLoop) -> None:
        self._outbox = Outbox()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._watch, self._unwatch = device.watch, device.unwatch
        self._poll = select.poll()
        self._bytes = device.max_io_bytes
        self._map = mmap.mmap(-1, self._bytes)
        self._buffer = memoryview(self._map)
        self._device = replace(
            device,
            queues=1,
            depth=1,
            placement="pool",
            pool=self._buffer,
            clients={},
            own=own.view if own else memoryview(b""),
            own_from=0,
            post_bytes=(),
            watch=self.watch,
            unwatch=self.unwatch,
            wake=self._outbox.wake,
        )
        events.settle(backend.started(self._device))
        self._engine: FrameEngine = backend.engine(self._device) or CallEngine(
            backend, self._device, self._outbox
        )
        for descriptor in {self._outbox.descriptor, self._engine.fileno()}:
            self._poll.register(descriptor, select.POLLIN)
        self._sequence = 0

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """See `Device.watch`: also while a request is waited for."""
        self._watch(descriptor, callback)
        self._poll.register(descriptor, select.POLLIN)
        self._callbacks[descriptor] = callback

    def unwatch(self, descriptor: int) -> None:
        """See `Device.unwatch`."""
        self._unwatch(descriptor)
        self._poll.unregister(descriptor)
        del self._callbacks[descriptor]

    def do(self, op: Op, flags: int, offset: int, length: int, buf: memoryview) -> int:
        """Execute one operation, in pieces that fit the buffer; returns the bytes moved.  Raises `OSError`."""
        if op > Op.WRITE:
            return self._piece(op, flags, offset, length)
        moved = 0
        while moved < length:
            count = min(self._bytes, length - moved)
            if op == Op.WRITE:
                self._buffer[:count] = buf[moved : moved + count]
            done = self._piece(op, flags, offset + moved, count)
            if op == Op.READ:
                buf[moved : moved + done] = self._buffer[:done]
            moved += done
            if done < count:
                break
        return moved

    def _piece(self, op: Op, flags: int, offset: int, length: int) -> int:
        self._sequence += 1
        carries = op <= Op.WRITE
        request = wire.Descriptor(
            Kind.REQUEST,
            op=op,
            flags=int(flags),
            device=self._device.number,
            epoch=self._device.epoch,
            sequence=self._sequence,
            offset=offset,
            length=length,
            segment=wire.SEGMENT_POOL if carries else wire.SEGMENT_NONE,
        )
        self._engine.take(0, request.pack())
        while True:
            for _, frame in self._engine.answers():
                for answer in wire.iter_frame(frame):
                    if answer.kind == Kind.DONE and answer.sequence == self._sequence:
                        return _result(answer.result, op, offset)
            self._wait()

    def _wait(self) -> None:
        for descriptor, _ in self._poll.poll():
            callback = self._callbacks.get(descriptor)
            if callback is not None:
                callback()
        self._outbox.acknowledge()

    def close(self) -> None:
        """End the engine."""
        self._engine.close()
        self._outbox.close()
        self._buffer.release()


def _result(result: int, op: Op, offset: int) -> int:
    if result < 0:
        raise OSError(-result, f"{op_name(op)} at {offset} failed below the layers")
    return result
