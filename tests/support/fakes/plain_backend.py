"""Backends for tests: a disk in a bytearray, and a backend whose requests the test answers."""

import threading
from collections.abc import Sequence
from typing import Any

from ublkpool.bufpool.sdk.backend import Backend, Hint, Properties, Request

SIZE_BYTES = 1 << 20


class Plain(Backend):
    """A disk in a bytearray, as a backend with methods."""

    properties = Properties(size_bytes=SIZE_BYTES, volatile_cache=True)

    def __init__(self) -> None:
        super().__init__()
        self.disk = bytearray(SIZE_BYTES)
        self.calls: list[Any] = []

    def open(self, hint: Hint) -> Properties:
        self.calls.append(("open", hint.device))
        return self.properties

    def pread(self, buf: memoryview, offset: int) -> None:
        buf[:] = self.disk[offset : offset + len(buf)]

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        self.calls.append(("pwrite", offset, fua))
        self.disk[offset : offset + len(buf)] = buf

    def flush(self) -> None:
        self.calls.append("flush")

    def trim(self, offset: int, length: int) -> None:
        self.calls.append(("trim", offset, length))

    def detached(self) -> None:
        self.calls.append("detached")

    def close(self) -> None:
        self.calls.append("close")


class Held(Plain):
    """Collects requests; the test answers them from its own thread."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Semaphore(0)
        self.held: list[Request] = []

    def submit(self, batch: Sequence[Request]) -> None:
        for request in batch:
            self.held.append(request)
            self.arrived.release()

    def wait_for(self, count: int) -> list[Request]:
        for _ in range(count):
            assert self.arrived.acquire(timeout=60)
        return self.held
