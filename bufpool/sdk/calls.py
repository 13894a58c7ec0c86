"""The engine below methods, batches and requests: a native engine that hands batches to the author's functions.

Owns the native engine and the views of its batch.  Native code does frames, fences, regions and answers
(`csrc/calls.h`); Python is entered once for a batch and then little more than calls one function for each request.
Runs on the loop's thread; other threads use only the `Outbox`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.bufpool.engine.native import NativeEngine, NativeStatistics, slot_bytes
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import (
    Backend,
    Device,
    Outbox,
    Request,
    asks_for_places,
    errno_of,
    log,
    op_name,
    perform_without_data,
)
from ublkpool.bufpool.sdk.batch import Batch, Columns
from ublkpool.bufpool.wire import SEGMENT_CLIENTS

_NO_DATA, _AREA = int(lib.CALLS_NO_DATA), int(lib.CALLS_AREA_SHIFT)
_POOL, _OWN, _CLIENTS = int(lib.CALLS_POOL), int(lib.CALLS_OWN), int(lib.CALLS_CLIENTS)
_READ, _WRITE, _WRITE_FUA = int(lib.CALLS_READ), int(lib.CALLS_WRITE), int(lib.CALLS_WRITE_FUA)
_COUNT, _RUNS, _MOVES = int(lib.CALLS_COUNT), int(lib.CALLS_RUNS), int(lib.CALLS_MOVES)
_OVERLONG, _RUN = int(lib.CALLS_OVERLONG), int(lib.CALLS_RUN)
_NOT_NOW = -1
_Way = Callable[[int, int], None]
Submit = Callable[[Sequence[Request]], None]


class CallEngine:
    """A `FrameEngine` that calls a backend's methods.  Raises `BackendError` if there is no memory."""

    def __init__(
        self,
        backend: Backend,
        device: Device,
        outbox: Outbox,
        post_max_bytes: int = 0,
        submit: Submit | None = None,
    ) -> None:
        """`post_max_bytes`: see `Properties`; the slots are the own segment before `device.own_from`.

        `submit` gets all requests in order of arrival, instead of the backend's methods.
        """
        self._backend, self._device, self._outbox = backend, device, outbox
        self._handle = ffi.new_handle(self)
        self._columns = Columns(device.queues * device.depth)
        self._head, self._run = self._columns.head, self._columns.run
        places = {
            "slots_bytes": device.own_from,
            "slot_bytes": slot_bytes(device.max_io_bytes),
            "post_max_bytes": post_max_bytes,
            "asks": asks_for_places(backend),
            "in_order": submit is not None,
        }
        self._storage: Any = lib.storage_calls_new(
            self._handle, self._columns.native, ffi.new("struct calls_places *", places)
        )
        self._native = NativeEngine(device, self)
        self._overlong = False
        kind = type(backend)
        self._serve: Callable[[], None] = self._call_methods
        self._take: Submit = submit or backend.submit
        if submit is not None or kind.submit is not Backend.submit:
            self._serve = self._submit
        elif kind.serve_batch is not Backend.serve_batch:
            self._serve = self._serve_batch
        self._given = Batch(self._storage, self._columns, self._view, self._request)
        clients = {_CLIENTS + number - SEGMENT_CLIENTS: each for number, each in device.clients.items()}
        self._memories = {_POOL: device.pool, _OWN: device.own, **clients}
        self._ways = self._make_ways()

    def new(self, device: Device) -> Any:
        """See `native.Storage`."""
        return self._storage

    @property
    def raw(self) -> Any:
        """See `NativeEngine.raw`."""
        return self._native.raw

    def resize(self, size_bytes: int) -> None:
        """See `NativeEngine.resize`."""
        self._native.resize(size_bytes)

    def fileno(self) -> int:
        """The outbox's eventfd."""
        return self._outbox.descriptor

    def take(self, queue: int, frame: bytes) -> None:
        """See `FrameEngine`."""
        self._native.take(queue, frame)
        if lib.engine_hand_out(self.raw):
            self.serve()
            lib.engine_collect(self.raw)

    def answers(self) -> Iterable[tuple[int, bytes]]:
        """See `FrameEngine`."""
        self.collect()
        return self._native.answers()

    def running(self) -> int:
        """See `FrameEngine`."""
        return self._native.running()

    def executing(self) -> tuple[int, list[tuple[int, int, int, int]]]:
        """See `NativeEngine.executing`."""
        return self._native.executing()

    def statistics(self) -> NativeStatistics:
        """Counters since the attach."""
        return self._native.statistics()

    def close(self) -> None:
        """See `FrameEngine`."""
        self._native.close()

    def collect(self) -> None:
        """Pass on the answers from the outbox, and ask again for regions that requests wait for."""
        self._collect()
        lib.engine_ask_again(self.raw)

    def _collect(self) -> None:
        results = self._outbox.results
        for _ in range(len(results)):
            request, result = results.popleft()
            try:
                lib.calls_finish(self._storage, request.key, result)
            except (OverflowError, TypeError) as error:
                lib.calls_finish(
                    self._storage, request.key, errno_of(error, f"{op_name(request.op)} at {request.offset}")
                )

    def is_old(self, request: Request) -> bool:
        """Whether a fence has overtaken an unanswered request, so that it need not begin.  Thread-safe."""
        return lib.calls_is_old(self._storage, request.key)

    def serve(self) -> None:
        """Execute the batch that was handed out; the caller collects what it leaves in `result`."""
        self._serve()
        if self._outbox.results:
            self._collect()
        if self._head[_OVERLONG] and not self._overlong:
            self._overlong = True
            log.error("a result was larger than its request: answered EIO (said once)")

    # A batch is cut into runs of requests that call the same function on the same memory; a way is such a call.

    def _make_ways(self) -> dict[int, _Way]:
        ways: dict[int, _Way] = {_NO_DATA: self._without_data}
        for area, memory in self._memories.items():
            ways |= {way | area << _AREA: call for way, call in self._ways_in(area, memory).items()}
        return ways

    def _ways_in(self, area: int, memory: memoryview) -> dict[int, _Way]:
        """The calls for reads and writes whose data lies in this memory."""
        backend, write = self._backend, self._backend.plain_pwrite
        read = self._two(backend.plain_pread or backend.pread, memory)
        if area == _OWN and type(backend).store_placed is not Backend.store_placed:
            return {_READ: read, _WRITE: self._stored(False), _WRITE_FUA: self._stored(True)}
        durably = self._three(backend.pwrite, memory, True)
        plainly = self._two(write, memory) if write else self._three(backend.pwrite, memory, False)
        return {_READ: read, _WRITE: plainly, _WRITE_FUA: durably}

    def _call_methods(self) -> None:
        ways = self._ways
        if self._head[_COUNT] == 1:
            ways[self._run[0]](0, 1)
            return
        for way, first, end in self._runs():
            ways[way](first, end)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """The way of each run, its first request and the end of it."""
        numbers = self._run[: _RUN * self._head[_RUNS]].tolist()
        return zip(numbers[::_RUN], numbers[1::_RUN], numbers[2::_RUN], strict=True)

    def _columns_of(self, first: int, end: int) -> Iterable[tuple[int, int, int]]:
        """For each request, where its data begins and ends in the memory, and its offset on the device."""
        c = self._columns
        if end - first == 1:
            return ((c.start[first], c.end[first], c.offset[first]),)
        return zip(
            c.start[first:end].tolist(), c.end[first:end].tolist(), c.offset[first:end].tolist(), strict=True
        )

    # Three nearly equal functions: they run for every request, so each contains its own call.

    def _two(self, function: Callable[[memoryview, int], Any], memory: memoryview) -> _Way:
        result_of, columns_of = self._columns.result, self._columns_of

        def call(first: int, end: int) -> None:
            at = first
            for start, stop, offset in columns_of(first, end):
                try:
                    result = function(memory[start:stop], offset)
                    if result is not None:
                        result_of[at] = result
                except Exception as error:
                    self._failed(at, error)
                at += 1

        return call

    def _three(self, function: Callable[[memoryview, int, bool], Any], memory: memoryview, fua: bool) -> _Way:
        result_of, columns_of = self._columns.result, self._columns_of

        def call(first: int, end: int) -> None:
            at = first
            for start, stop, offset in columns_of(first, end):
                try:
                    result = function(memory[start:stop], offset, fua)
                    if result is not None:
                        result_of[at] = result
                except Exception as error:
                    self._failed(at, error)
                at += 1

        return call

    def _stored(self, fua: bool) -> _Way:
        store: Callable[[int, memoryview, int, bool], Any] = self._backend.store_placed
        memory, result_of, columns_of = (
            self._device.own,
            self._columns.result,
            self._columns_of,
        )

        def call(first: int, end: int) -> None:
            at = first
            for start, stop, offset in columns_of(first, end):
                try:
                    result = store(start, memory[start:stop], offset, fua)
                    if result is not None:
                        result_of[at] = result
                except Exception as error:
                    self._failed(at, error)
                at += 1

        return call

    def _without_data(self, first: int, end: int) -> None:
        c = self._columns
        for at in range(first, end):
            try:
                perform_without_data(self._backend, c.op[at], c.flags[at], c.offset[at], c.length[at])
            except Exception as error:
                self._failed(at, error)

    def _failed(self, at: int, error: Exception) -> None:
        c = self._columns
        c.result[at] = errno_of(error, f"{op_name(c.op[at])} at {c.offset[at]}")

    # Requests and batches.

    def _view(self, at: int) -> memoryview:
        """The memory of a read or a write."""
        memory = self._memories[self._area_of(at)]
        return memory[self._columns.start[at] : self._columns.end[at]]

    def _area_of(self, at: int) -> int:
        return next(way >> _AREA for way, first, end in self._runs() if first <= at < end)

    def _request(self, at: int) -> Request:
        c, is_own = self._columns, self._area_of(at) == _OWN
        region = c.start[at] if is_own else -1
        op, flags, offset, length, key = c.op[at], c.flags[at], c.offset[at], c.length[at], c.index[at]
        return Request(op, flags, offset, length, self._view(at), region, self._outbox, key)

    def _requests(self) -> list[Request]:
        """The whole batch as `Request` objects, each to be answered by itself."""
        c, requests = self._columns, []
        for way, first, end in self._runs():
            memory, is_own = self._memories[way >> _AREA], way >> _AREA == _OWN
            for at in range(first, end):
                start = c.start[at]
                buffer, region = memory[start : c.end[at]], start if is_own else -1
                op, flags, offset, length, key = (
                    c.op[at],
                    c.flags[at],
                    c.offset[at],
                    c.length[at],
                    c.index[at],
                )
                requests.append(Request(op, flags, offset, length, buffer, region, self._outbox, key))
        c.later[: len(requests)] = b"\1" * len(requests)
        return requests

    def _submit(self) -> None:
        requests = self._requests()
        try:
            self._take(requests)
        except Exception as error:
            for request in requests:
                if not request.answered:
                    request.fail(error)

    def _serve_batch(self) -> None:
        given, count, moves = self._given, self._head[_COUNT], self._head[_MOVES]
        if moves:
            given.begin(moves)
            try:
                self._backend.serve_batch(given)
            except Exception as error:
                given.fail(errno_of(error, f"a batch of {moves}"))
        if moves < count:
            self._without_data(moves, count)

    # Called by the native part, within a turn.

    def place(self, is_write: bool, offset: int, length: int, flags: int) -> int:
        """The byte offset of the region for a write or a read, -1 for "not now", or a negative errno minus 1."""
        try:
            if is_write:
                region = self._backend.place(offset, length, flags)
            else:
                region = self._backend.read_in_place(offset, length)
            if region is None:
                return _NOT_NOW
            self._check(region, length)
        except Exception as error:
            return errno_of(error, f"naming a region at {offset}") - 1
        return region

    def _check(self, region: int, length: int) -> None:
        device = self._device
        if region % device.logical_block_bytes or not device.own_from <= region <= len(device.own) - length:
            raise BackendError(f"region {region} for {length} bytes is not a place in the own segment")

    def released(self, region: int) -> None:
        """Tell the backend that a region came back."""
        try:
            self._backend.released(region)
        except Exception as error:
            errno_of(error, "released")


@ffi.def_extern()
def calls_place(handle: Any, is_write: int, offset: int, length: int, flags: int) -> int:
    """See `csrc/calls.c`."""
    engine: CallEngine = ffi.from_handle(handle)
    return engine.place(bool(is_write), offset, length, flags)


@ffi.def_extern()
def calls_released(handle: Any, region: int) -> None:
    """See `csrc/calls.c`."""
    engine: CallEngine = ffi.from_handle(handle)
    engine.released(region)
