"""A disk in this process's memory that answers a read at once and a write after `delay_ms`, for the kernel's selftests.

Their own server delays every request.  The partition scan would then take as long as the write that is to be caught.
"""

import threading

import msgspec

from ublkpool.bufpool.sdk.backend import Backend, Hint, Properties
from ublkpool.bufpool.sizes import ByteSize


class SlowWritesOptions(msgspec.Struct, frozen=True, kw_only=True):
    size: ByteSize
    delay_ms: float


class SlowWrites(Backend):
    Options = SlowWritesOptions
    survives_death = False
    parallel = 4

    def __init__(self, options: SlowWritesOptions) -> None:
        self.options: SlowWritesOptions = options
        self._disk = bytearray(options.size)

    def open(self, hint: Hint) -> Properties:
        return Properties(size_bytes=self.options.size)

    def pread(self, buf: memoryview, offset: int) -> None:
        buf[:] = self._disk[offset : offset + len(buf)]

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        threading.Event().wait(self.options.delay_ms / 1000)
        self._disk[offset : offset + len(buf)] = buf


BACKEND = SlowWrites
