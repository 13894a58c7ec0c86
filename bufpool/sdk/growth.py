"""A store that grows while it is served: the daemon's `Resize`, and what the backend announces itself.

Owns the thread that runs `Backend.resize`, so that no request waits for the store meanwhile, and what the loop has to
tell the daemon.  `begin` and `news` are the loop's; `announce` may be called from any thread.
"""

import inspect
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.sdk.backend import Backend, log
from ublkpool.bufpool.sdk.event_loop import EventLoop
from ublkpool.bufpool.way_out import explain

REASON_LENGTH_MAX = 1024


def is_async(backend: Backend) -> bool:
    """Whether its `resize` is `async def`."""
    return inspect.iscoroutinefunction(backend.callables().get("resize"))


def can_resize(backend: Backend) -> bool:
    """Whether its author wrote a `resize`."""
    function = backend.callables().get("resize")
    return function is not None and getattr(function, "__func__", None) is not Backend.resize


class Grows(Protocol):
    """A backend whose store may grow."""

    def callables(self) -> Mapping[str, Callable[..., Any]]:
        """See `Backend`."""


class Growth:
    """What becomes of one backend's store."""

    def __init__(self, backend: Grows, events: EventLoop, wake: Callable[[], None]) -> None:
        """`wake` has the loop call `news`, from any thread."""
        self._backend, self._events, self._wake = backend, events, wake
        self._news: deque[wire.Resized | wire.Grown] = deque()
        self._thread: threading.Thread | None = None
        self._asked_bytes = 0
        self._grows = False

    @property
    def is_busy(self) -> bool:
        """Whether a thread may still call `wake`."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_news(self) -> bool:
        """Whether `news` has something to tell."""
        return bool(self._news)

    def begin(self, size_bytes: int) -> None:
        """Have the store grow to `size_bytes`; `news` has the answer later."""
        if self._grows:
            self._answer(size_bytes, f"the store is still growing to {self._asked_bytes} bytes: try again")
            return
        self._asked_bytes, self._grows = size_bytes, True
        self._thread = threading.Thread(
            target=self._run, args=(size_bytes,), name="ublkpool-resize", daemon=True
        )
        self._thread.start()

    def announce(self, size_bytes: int) -> None:
        """See `Device.resized`."""
        self._news.append(wire.Grown(size_bytes=int(size_bytes)))
        self._wake()

    def news(self) -> list[wire.Resized | wire.Grown]:
        """What happened since the last call."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def _run(self, size_bytes: int) -> None:
        reason = self._grow(size_bytes)
        # Before the answer: the daemon may ask again at once.
        self._grows = False
        self._answer(size_bytes, reason)

    def _grow(self, size_bytes: int) -> str:
        """Have the store grow; why it could not, empty if it did."""
        try:
            self._events.settle(self._backend.callables()["resize"](size_bytes))
        except BaseException as error:
            if not isinstance(error, PoolError | OSError):
                log.exception("resize to %d bytes failed", size_bytes)
            text = explain(error) if isinstance(error, OSError) else str(error)
            return " ".join(text.split()) or type(error).__name__
        return ""

    def _answer(self, size_bytes: int, reason: str) -> None:
        self._news.append(wire.Resized(size_bytes=size_bytes, reason=reason[:REASON_LENGTH_MAX]))
        self._wake()
