"""A Python backend that is entered once for a batch, in memory of its own: for measuring only.

What it stores ends with its process, which no backend for real use may do (docs/BACKENDS.md).
"""

from collections.abc import Sequence

import msgspec

from ublkpool.bufpool.backend import Backend, Hint, Properties, Request
from ublkpool.bufpool.wire import Op

_READ, _WRITE = int(Op.READ), int(Op.WRITE)


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`size` is bytes."""

    size: int


class BatchBackend(Backend):
    """A bytearray."""

    Options = BatchOptions

    def __init__(self, options: BatchOptions) -> None:
        self.options: BatchOptions = options
        self._disk = memoryview(bytearray(b"\xa5") * options.size)

    def open(self, hint: Hint) -> Properties:
        """Nothing to open."""
        return Properties(size_bytes=self.options.size)

    def submit(self, batch: Sequence[Request]) -> None:
        """All that came in one turn."""
        disk = self._disk
        for request in batch:
            start = request.offset
            end = start + request.length
            if request.op == _WRITE:
                disk[start:end] = request.buffer
            elif request.op == _READ:
                request.buffer[:] = disk[start:end]
            request.complete()
