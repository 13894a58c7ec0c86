"""Defect: some answers are sent twice."""

from collections.abc import Iterable

import msgspec

from ublkpool.bufpool.engine.native import NativeEngine, NullStorage
from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties


class TwiceEngine:
    """A native engine whose frames of answers go out twice now and then."""

    def __init__(self, device: Device) -> None:
        self._engine = NativeEngine(device, NullStorage())
        self._count = 0

    def fileno(self) -> int:
        return self._engine.fileno()

    def take(self, queue: int, frame: bytes) -> None:
        self._engine.take(queue, frame)

    def answers(self) -> Iterable[tuple[int, bytes]]:
        for queue, frame in self._engine.answers():
            self._count += 1
            yield queue, frame
            if self._count % 10 == 0:
                yield queue, frame

    def running(self) -> int:
        return self._engine.running()

    def statistics(self) -> msgspec.Struct:
        return self._engine.statistics()

    def close(self) -> None:
        self._engine.close()


class AnswersTwice(Backend):
    stores_data = False

    def open(self, hint: Hint) -> Properties:
        return Properties(size_bytes=8 << 20)

    def engine(self, device: Device) -> TwiceEngine:
        return TwiceEngine(device)
