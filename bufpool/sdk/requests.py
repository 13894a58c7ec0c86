"""One request of a device, and its way back to the loop.

Owns `Request` and the `Outbox` that carries results from any thread to the loop.  Knows no backend.
"""

import threading
from collections import deque
from typing import Any

from ublkpool.bufpool.sdk.failures import errno_of as errno_of
from ublkpool.bufpool.sdk.failures import log as log
from ublkpool.bufpool.sdk.wakeup import Wakeup
from ublkpool.bufpool.wire import Flag, Op

_WRITE = int(Op.WRITE)
_FUA = int(Flag.FUA)
_OP_NAMES = {int(op): op.name.lower() for op in Op}


def op_name(op: int) -> str:
    """The operation's name in log lines: `read`, `write`, or its number."""
    return _OP_NAMES.get(op) or f"operation {op}"


class Outbox:
    """Results on their way from any thread to the loop, and the eventfd that wakes the loop."""

    __slots__ = ("_awake", "_loop_thread", "_wakeup", "descriptor", "results")

    def __init__(self) -> None:
        """Made on the loop's thread.  Raises `OSError` without a free descriptor."""
        self.results: deque[tuple[Request, int]] = deque()
        self._wakeup = Wakeup()
        self.descriptor = self._wakeup.descriptor
        self._loop_thread = threading.get_ident()
        self._awake = False

    def put(self, request: "Request", result: int) -> None:
        """Hand a result to the loop: bytes moved, 0, or a negative errno.  Thread-safe."""
        self.results.append((request, result))
        if threading.get_ident() != self._loop_thread:
            self.wake()

    def wake(self) -> None:
        """Make the loop turn once.  Thread-safe; several wakes before that turn cost one system call."""
        if not self._awake:
            self._awake = True
            self._wakeup.signal()

    @property
    def is_awake(self) -> bool:
        """Whether the loop has not turned since the last `wake`."""
        return self._awake

    def acknowledge(self) -> None:
        """Called by the loop before it reads `results`, so that any later `wake` writes to the eventfd again."""
        if self._awake:
            self.drain()

    def drain(self) -> None:
        """Called by the loop when the eventfd is readable: an interrupted waker may write after `acknowledge`."""
        self._wakeup.drain()
        self._awake = False

    def close(self) -> None:
        """Close the eventfd; a `wake` that is under way or comes later does nothing."""
        self._awake = True
        self._wakeup.close()


class Request:
    """One request, to be answered exactly once, by `complete` or `fail`.

    `op` is a `wire.Op`, `flags` are `wire.Flag` bits: `FUA`, `NOUNMAP`, and `REPLAY` if an earlier backend may already
    have executed this request.  `offset` and `length` are bytes on the device.  `buffer` is the memory of a read (to
    fill) or of a write (to store), empty for other operations; use it until you answer, not longer.  `region` is the
    byte offset in the own segment of a write that was placed there, otherwise -1.
    """

    __slots__ = ("_answered", "_outbox", "buffer", "flags", "key", "length", "offset", "op", "region")

    def __init__(
        self,
        op: int,
        flags: int,
        offset: int,
        length: int,
        buffer: memoryview,
        region: int,
        outbox: Outbox,
        key: Any,
    ) -> None:
        """Made by the SDK; `key` is the engine's name for the request."""
        self.op, self.flags = op, flags
        self.offset, self.length = offset, length
        self.buffer = buffer
        self.region = region
        self.key = key
        self._outbox = outbox
        self._answered = False

    @property
    def fua(self) -> bool:
        """Whether the write must be on stable storage before it is answered."""
        return bool(self.flags & _FUA)

    @property
    def answered(self) -> bool:
        """Whether `complete` or `fail` was called."""
        return self._answered

    def complete(self, result: int | None = None) -> None:
        """Answer with the bytes moved, or a negative errno; None means all bytes.  Thread-safe.

        Raises `RuntimeError` if the request was answered before.
        """
        if self._answered:
            raise RuntimeError(f"{self!r} was answered twice")
        self._answered = True
        if result is None:
            result = self.length if self.op <= _WRITE else 0
        self._outbox.put(self, result)

    def fail(self, error: BaseException) -> None:
        """Answer with the errno of `error`; an exception without one is logged and answers EIO.  Thread-safe.

        Raises `RuntimeError` if the request was answered before.
        """
        self.complete(errno_of(error, f"{op_name(self.op)} at {self.offset}"))

    def __repr__(self) -> str:
        return f"<Request {op_name(self.op)} offset={self.offset} length={self.length} flags={self.flags}>"
