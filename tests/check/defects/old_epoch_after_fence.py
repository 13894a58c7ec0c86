"""Defect: FENCED is answered at once, and what the old epoch sent runs later."""

import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties
from ublkpool.bufpool.wire import Descriptor, Kind, Op, iter_frame, pack_frame


class DefectOptions(msgspec.Struct, frozen=True, kw_only=True):
    path: Path


class LateEngine:
    """Executes some requests late, and even later if a FENCE comes meanwhile."""

    def __init__(self, device: Device, file: int) -> None:
        self._device, self._file = device, file
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ready: list[tuple[int, Descriptor]] = []
        self._out: list[tuple[int, Descriptor]] = []
        self._running = self._count = self._fences = 0

    def fileno(self) -> int:
        return self._bell

    def take(self, queue: int, frame: bytes) -> None:
        for each in iter_frame(frame):
            if each.kind == Kind.FENCE:
                self._out.append((queue, each.answer(Kind.FENCED)))
                self._fences += 1
            elif each.kind == Kind.REQUEST:
                self._running += 1
                self._count += 1
                if self._count % 8:
                    self._due(queue, each)
                else:
                    threading.Timer(0.3, self._late, (queue, each, self._fences)).start()

    def _late(self, queue: int, request: Descriptor, fences: int) -> None:
        if self._fences > fences:
            time.sleep(0.3)
        self._due(queue, request)

    def _due(self, queue: int, request: Descriptor) -> None:
        self._ready.append((queue, request))
        os.eventfd_write(self._bell, 1)

    def answers(self) -> Iterable[tuple[int, bytes]]:
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        ready, self._ready = self._ready, []
        for queue, each in ready:
            self._running -= 1
            buf = self._device.pool[each.buffer : each.buffer + each.length]
            moved = (
                os.preadv(self._file, [buf], each.offset)
                if each.op == Op.READ
                else os.pwrite(self._file, buf, each.offset)
            )
            self._out.append((queue, each.answer(Kind.DONE, moved)))
        out, self._out = self._out, []
        return [(queue, pack_frame([each])) for queue, each in out]

    def running(self) -> int:
        return self._running

    def statistics(self) -> msgspec.Struct:
        return DefectOptions(path=Path())

    def close(self) -> None:
        os.close(self._bell)


class OldEpoch(Backend):
    Options = DefectOptions

    def __init__(self, options: DefectOptions) -> None:
        self.options: DefectOptions = options

    def open(self, hint: Hint) -> Properties:
        self.file = os.open(self.options.path, os.O_RDWR | os.O_CLOEXEC)
        return Properties(size_bytes=os.lseek(self.file, 0, os.SEEK_END))

    def engine(self, device: Device) -> LateEngine:
        return LateEngine(device, self.file)
