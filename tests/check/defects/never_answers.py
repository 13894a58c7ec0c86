"""Defect: one request of many is never answered."""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ublkpool.bufpool.sdk.backend import Backend, Hint, Properties, Request, perform


class DefectOptions(msgspec.Struct, frozen=True, kw_only=True):
    path: Path


class NeverAnswers(Backend):
    Options = DefectOptions

    def __init__(self, options: DefectOptions) -> None:
        self.options: DefectOptions = options
        self.count = 0

    def open(self, hint: Hint) -> Properties:
        self.file = os.open(self.options.path, os.O_RDWR | os.O_CLOEXEC)
        return Properties(size_bytes=os.lseek(self.file, 0, os.SEEK_END))

    def submit(self, batch: Sequence[Request]) -> None:
        for request in batch:
            self.count += 1
            if self.count % 50:
                request.complete(perform(self, request))

    def pread(self, buf: memoryview, offset: int) -> int:
        return os.preadv(self.file, [buf], offset)

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> int:
        return os.pwrite(self.file, buf, offset)
