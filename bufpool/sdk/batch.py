"""A batch of reads and writes as columns: what `Backend.serve_batch` is given.

Owns nothing: the columns are the native part's memory, the data lies where the kernel put it or will take it from.  All
of it is there until `serve_batch` returns.  Used by the loop's thread.
"""

from collections.abc import Callable
from typing import Any, Literal

from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.bufpool.sdk.backend import Request


class Columns:
    """The memory of a native batch (`csrc/calls.h`), for as many requests as a batch can have.

    It is Python's, so that a view which somebody keeps too long shows old numbers and nothing worse.
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
    """Reads and writes that came together, reads first, each kind in order of arrival.

    The columns are memoryviews of `len(batch)` integers: `op` (B), `flags` (H, `wire.Flag` bits), `offset` and `length`
    (Q, bytes on the device) and `result` (i, to be written).  `numpy.frombuffer(batch.offset, numpy.uint64)` is one
    without a copy.  `result[i]` stands at all bytes moved; set it to a negative errno or to fewer bytes where that is
    not so.
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
        """The SDK's: there is a new one."""
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
        """What each is answered with when `serve_batch` returns."""
        return self._columns.result[: self._count]

    def buffer(self, i: int) -> memoryview:
        """The memory of one: a read's to fill, a write's to store.  Yours until it is answered.

        Raises `IndexError` if there is no such request.
        """
        if not 0 <= i < self._count:
            raise IndexError(f"request {i} of a batch of {self._count}")
        return self._view(i)

    def copy(self, memory: memoryview, at: memoryview | None = None) -> None:
        """Move all data at once: of writes into `memory`, of reads out of it, each at its offset on the device.

        `at`: where else, byte offsets in `memory`, a column of 8 byte integers.  Those with an error in `result` and
        those of `later` are left out.  Raises `ValueError`, and nothing was copied, if one lies outside of `memory`.
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
        """One that is answered later, from any thread, as at the level of requests."""
        if not 0 <= i < self._count or self._columns.later[i]:
            raise IndexError(f"request {i} of a batch of {self._count} is none or is answered later already")
        self._columns.later[i] = 1
        return self._request(i)

    def fail(self, result: int) -> None:
        """Answer all with this negative errno, but those that are answered later."""
        for i in range(self._count):
            self._columns.result[i] = result
