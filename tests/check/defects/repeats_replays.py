"""Defect: a write that an earlier process may have executed is executed twice, the second time too late.

Everything is quick, so a request is only unanswered at a kill if it was sent immediately before.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ublkpool.bufpool.sdk.backend import Backend, Hint, Properties, Request
from ublkpool.bufpool.wire import Flag, Op

_LATE_S = 0.05


class DefectOptions(msgspec.Struct, frozen=True, kw_only=True):
    path: Path


class RepeatsReplays(Backend):
    Options = DefectOptions

    def __init__(self, options: DefectOptions) -> None:
        self.path = options.path

    def open(self, hint: Hint) -> Properties:
        self.file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        return Properties(size_bytes=os.lseek(self.file, 0, os.SEEK_END))

    def submit(self, batch: Sequence[Request]) -> None:
        for request in batch:
            if request.op == Op.READ:
                os.preadv(self.file, [request.buffer], request.offset)
            elif request.op == Op.WRITE:
                self._write(request)
            request.complete()

    def _write(self, request: Request) -> None:
        os.pwrite(self.file, request.buffer, request.offset)
        if request.flags & Flag.REPLAY:
            again = (self.file, bytes(request.buffer), request.offset)
            threading.Timer(_LATE_S, os.pwrite, again).start()
