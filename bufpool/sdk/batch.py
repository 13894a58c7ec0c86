"""A batch of reads and writes as columns: the argument of `Backend.serve_batch`.

The data lies where the kernel put it or will take it from.  Columns and data are valid until `serve_batch` returns.
Used on the loop's thread.
"""

from collections.abc import Callable
from typing import Any, Literal

from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.bufpool.sdk.backend import Request


class Columns:
    """The memory of a native batch (`csrc/calls.h`), for the most requests that a batch can have.

    Python allocates it, so that a view that is kept too long shows old numbers and does no harm.
    """

    def __init__(self, most: int) -> None:
        self._memory: list[Any] = []
        self.native = ffi.new("struct calls_batch *")
        self.head, self.run = (
            self._new("head", "I", lib.CALLS_HEAD),
            self._new("run", "I", lib.CALLS_RUN * most),
        )
        self.offset, self.length = self._new("offset", "Q", most), self._new("length", "Q", most)
        self.start, self.end = self._new("start", "Q", most), self._new("end", "Q", most)
        self.index, self.result = self._new("index", "I", most), self._new("result", "i", most)
        self.flags, self.op = self._new("flags", "H", most), self._new("op", "B", most)
        self.later = self._new("later", "B", most)

    def _new(self, name: str, form: Literal["Q", "I", "i", "H", "B"], count: int) -> memoryview:
        memory = ffi.new(f"{_TYPES[form]}[]", count)
        self._memory.append(memory)
        setattr(self.native, name, memory)
        return memoryview(ffi.buffer(memory)).cast("B").cast(form)


_TYPES = {"Q": "uint64_t", "I": "uint32_t", "i": "int32_t", "H": "uint16_t", "B": "uint8_t"}


class Batch:
    """Reads and writes that arrived together, reads first, each kind in order of arrival.

    The columns are memoryviews of `len(batch)` integers: `op` (B), `flags` (H, `wire.Flag` bits), `offset` and
    `length` (Q, bytes on the device) and `result` (i, to be written); `numpy.frombuffer(batch.offset, numpy.uint64)`
    is an array on the same memory.  `result[i]` starts as the request's length: set it to a negative errno where the
    request failed, or to the bytes moved where a read was short.
    """

    __slots__ = ("_columns", "_count", "_native", "_request", "_view")

    def __init__(
        self,
        native: Any,
        columns: Columns,
        view: Callable[[int], memoryview],
        request: Callable[[int], Request],
    ) -> None:
        self._native, self._columns = native, columns
        self._view, self._request = view, request
        self._count = 0

    def begin(self, count: int) -> None:
        """Called by the SDK for each new batch."""
        self._count = count

    def __len__(self) -> int:
        return self._count

    @property
    def op(self) -> memoryview:
        """`wire.Op`, READ or WRITE."""
        return self._columns.op[: self._count]

    @property
    def flags(self) -> memoryview:
        """`wire.Flag` bits."""
        return self._columns.flags[: self._count]

    @property
    def offset(self) -> memoryview:
        """Bytes on the device."""
        return self._columns.offset[: self._count]

    @property
    def length(self) -> memoryview:
        """Bytes."""
        return self._columns.length[: self._count]

    @property
    def result(self) -> memoryview:
        """Bytes moved or a negative errno: the answer to each when `serve_batch` returns."""
        return self._columns.result[: self._count]

    def buffer(self, i: int) -> memoryview:
        """The memory of request `i`: to fill for a read, to store for a write.  Use it until the request is answered.

        Raises `IndexError` if the batch has no request `i`.
        """
        if not 0 <= i < self._count:
            raise IndexError(f"request {i} of a batch of {self._count}")
        return self._view(i)

    def copy(self, memory: memoryview, at: memoryview | None = None) -> None:
        """Copy the data of all writes into `memory` and fill all reads from it, each at its offset on the device.

        `at`: other places, a column of byte offsets in `memory` of 8 bytes each.  Requests with an error in `result`
        and requests of `later` are left out.  Raises `ValueError`, having copied nothing, if one lies outside
        `memory`.
        """
        with ffi.from_buffer("uint8_t[]", memory, require_writable=True) as target:
            if at is None:
                outside = lib.calls_copy(self._native, target, len(target), ffi.NULL)
            else:
                if at.nbytes < 8 * self._count:
                    raise ValueError(f"{at.nbytes} bytes of places are too few for {self._count} requests")
                outside = lib.calls_copy(self._native, target, len(target), ffi.from_buffer("uint64_t[]", at))
        if outside:
            raise ValueError(f"request {outside - 1} lies outside of {len(target)} bytes")

    def later(self, i: int) -> Request:
        """Request `i` as a `Request`, to be answered later, from any thread.  Raises `IndexError`."""
        if not 0 <= i < self._count or self._columns.later[i]:
            raise IndexError(f"request {i} of a batch of {self._count} is none or is answered later already")
        self._columns.later[i] = 1
        return self._request(i)

    def fail(self, result: int) -> None:
        """Answer all requests with this negative errno, except those of `later`."""
        for i in range(self._count):
            self._columns.result[i] = result
