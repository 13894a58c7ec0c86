"""The layer `readonly`: what is below cannot be changed, and the disk is read-only."""

import errno

import msgspec

from ublkpool.bufpool.sdk.backend import Hint, Properties
from ublkpool.bufpool.sdk.layers.layer import Layer


class ReadOnly(Layer):
    """Refuses what writes, also from a client that does not heed the disk's read-only flag."""

    def open(self, hint: Hint) -> Properties:
        """See `Layer.open`; the disk is read-only."""
        return msgspec.structs.replace(
            super().open(hint), read_only=True, discard_max_bytes=0, write_zeroes_max_bytes=0
        )

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> int | None:
        """Raises `OSError` with EROFS."""
        raise self._refused()

    def trim(self, offset: int, length: int) -> None:
        """Raises `OSError` with EROFS."""
        raise self._refused()

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """Raises `OSError` with EROFS."""
        raise self._refused()

    @staticmethod
    def _refused() -> OSError:
        return OSError(errno.EROFS, "the layer readonly lets nothing be written")
