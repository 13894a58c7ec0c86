"""Defect: a write with FUA stays in a cache that is lost when the power fails; only FLUSH writes it to the store.

The cache is a second file, so it survives the process.  A power failure is its removal.
"""

import os
from pathlib import Path

import msgspec

from ublkpool.bufpool.sdk.backend import Backend, Hint, Properties


class DefectOptions(msgspec.Struct, frozen=True, kw_only=True):
    path: Path
    honours_fua: bool = False


class IgnoresFua(Backend):
    Options = DefectOptions

    def __init__(self, options: DefectOptions) -> None:
        self.options: DefectOptions = options

    def open(self, hint: Hint) -> Properties:
        path = self.options.path
        self.store = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        size = os.lseek(self.store, 0, os.SEEK_END)
        self.cache = os.open(path.with_suffix(".cache"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        if os.lseek(self.cache, 0, os.SEEK_END) == 0:
            os.pwrite(self.cache, os.pread(self.store, size, 0), 0)
        return Properties(size_bytes=size, volatile_cache=True)

    def pread(self, buf: memoryview, offset: int) -> int:
        return os.preadv(self.cache, [buf], offset)

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        os.pwrite(self.cache, buf, offset)
        if fua and self.options.honours_fua:
            os.pwrite(self.store, buf, offset)

    def flush(self) -> None:
        os.pwrite(self.store, os.pread(self.cache, os.lseek(self.cache, 0, os.SEEK_END), 0), 0)
