"""A Python backend that is called once per batch and stores in its own memory: for measuring only.

Its data is lost when its process ends, which no backend for real use may do (docs/BACKENDS.md).
"""

import msgspec

from ublkpool.bufpool.sdk.backend import Backend, Hint, Properties
from ublkpool.bufpool.sdk.batch import Batch


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

    def serve_batch(self, batch: Batch) -> None:
        """Answer all requests of one turn."""
        batch.copy(self._disk)
