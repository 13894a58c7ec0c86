"""Defect: of two writes of one size that arrive together, each gets the other's data."""

import os
from pathlib import Path

import msgspec

from ublkpool.bufpool.sdk.backend import Backend, Hint, Properties
from ublkpool.bufpool.sdk.batch import Batch
from ublkpool.bufpool.wire import Op


class DefectOptions(msgspec.Struct, frozen=True, kw_only=True):
    path: Path


class Swaps(Backend):
    Options = DefectOptions

    def __init__(self, options: DefectOptions) -> None:
        self.options: DefectOptions = options

    def open(self, hint: Hint) -> Properties:
        self.file = os.open(self.options.path, os.O_RDWR | os.O_CLOEXEC)
        return Properties(size_bytes=os.lseek(self.file, 0, os.SEEK_END))

    def serve_batch(self, batch: Batch) -> None:
        waiting: dict[int, int] = {}
        for index in range(len(batch)):
            if batch.op[index] == Op.READ:
                os.preadv(self.file, [batch.buffer(index)], batch.offset[index])
                continue
            other = waiting.pop(batch.length[index], None)
            if other is None:
                waiting[batch.length[index]] = index
                os.pwrite(self.file, batch.buffer(index), batch.offset[index])
            else:
                os.pwrite(self.file, batch.buffer(other), batch.offset[index])
                os.pwrite(self.file, batch.buffer(index), batch.offset[other])
