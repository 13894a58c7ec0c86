"""The end of a backend whose requests are not answered: bounded, with the requests in the log.

A request may never be answered, because a store is silent or a thread of the author's hangs, and then neither SIGTERM
nor the daemon's end would end the process.  Owns the process's signals, and a thread that ends it in time, also while
the author's code holds up the loop.  That is safe: the daemon sends what was not answered to the successor.
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

from ublkpool.bufpool.sdk.blame import lines_of_threads
from ublkpool.bufpool.sdk.wakeup import Wakeup

END_PATIENCE_S = 8.0
"""From SIGTERM, SIGINT or the daemon's detach to the end without all answers; the daemon itself kills after 10 s."""
STUCK_PATIENCE_S = 30.0
"""From the daemon's end to that of a backend whose loop is held up by the author's code; otherwise the loop decides."""
STATUS_UNANSWERED = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DIE_S = 5
log = logging.getLogger("ublkpool.backend")


class Watched(Protocol):
    """The loop, as the watch sees it; thread-safe."""

    @property
    def name(self) -> str:
        """The device's."""

    @property
    def stopping(self) -> str:
        """Why it ends; empty while it serves."""

    def stop(self, reason: str) -> None:
        """Finish the executing requests, then end."""

    def expect_turn(self) -> None:
        """Make the loop turn."""

    @property
    def has_turned(self) -> bool:
        """Whether it has turned since the last `expect_turn`."""

    def unanswered(self) -> str:
        """The requests that are not answered, for the log."""


class SignalledLoop(Protocol):
    """The loop, as its signals see it."""

    def stop(self, reason: str) -> None:
        """Finish the executing requests, then end."""

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `descriptor` is readable."""

    def unwatch(self, descriptor: int) -> None:
        """Undo `watch`."""


@contextmanager
def signals(loop: "SignalledLoop") -> Iterator[int]:
    """Let SIGTERM and SIGINT stop the loop; the pipe that the loop reads when a signal came."""

    def handler(number: int, _frame: FrameType | None) -> None:
        loop.stop(signal.Signals(number).name)

    # A Python handler runs only between bytecodes; a busy or sleeping native loop may run none for long.
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    loop.watch(readable, lambda: _discard(readable))
    earlier_wakeup = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield readable
    finally:
        for number, each in previous.items():
            signal.signal(number, each)
        signal.set_wakeup_fd(earlier_wakeup)
        loop.unwatch(readable)
        os.close(readable)
        os.close(writable)


def _discard(file: int) -> None:
    with suppress(BlockingIOError):
        os.read(file, 4096)


class EndWatch:
    """Ends the process if the loop was told to stop and does not end in time; a context manager.

    Used after the last fork, since it starts a thread.
    """

    def __init__(self, loop: Watched, connection: int, signals: int, patience_s: float | None = None) -> None:
        """`connection`: the attach connection, whose other end the daemon has.

        `signals`: the pipe of `signal.set_wakeup_fd`, which the loop reads unless the author's code holds it up.
        """
        self._loop, self._connection, self._signals = loop, connection, signals
        self._patience_s = END_PATIENCE_S if patience_s is None else patience_s
        self._stuck_patience_s = STUCK_PATIENCE_S
        self._news = Wakeup()
        self._is_closed = False
        self._thread = threading.Thread(target=self._watch, name="ublkpool-end", daemon=True)
        self._end_at = self._stuck_at = float("inf")
        self._poll = select.poll()

    def __enter__(self) -> "EndWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        self._news.signal()
        self._thread.join()
        self._news.close()

    def told(self) -> None:
        """The loop was told to stop: its time runs.  Safe to call from a signal handler and from any thread."""
        self._news.signal()

    def _watch(self) -> None:
        poll = self._poll
        poll.register(self._news.descriptor, select.POLLIN)
        poll.register(self._signals, select.POLLIN)
        poll.register(self._connection, 0)
        while True:
            left_s = min(self._end_at, self._stuck_at) - time.monotonic()
            ready = poll.poll(None if left_s == float("inf") else max(0.0, left_s) * 1000 + 1)
            if not all(self._hear(descriptor) for descriptor, _ in ready):
                return
            self._judge()

    def _hear(self, descriptor: int) -> bool:
        """Note what has happened; False once the loop has ended."""
        now = time.monotonic()
        if descriptor == self._connection:
            self._poll.unregister(descriptor)
            self._loop.expect_turn()
            self._stuck_at = now + self._stuck_patience_s
            return True
        if descriptor == self._signals:
            # Readable until the loop turns: it is looked at again when the time is over.
            self._poll.unregister(descriptor)
        else:
            # Drained first, so that a `_is_closed` that is set after the look makes the descriptor readable again.
            self._news.drain()
            if self._is_closed:
                return False
        self._end_at = min(self._end_at, now + self._patience_s)
        return True

    def _judge(self) -> None:
        now = time.monotonic()
        if now >= self._end_at:
            self._end_at = float("inf")
            self._poll.register(self._signals, select.POLLIN)
            if reason := self._loop.stopping or self._unheard():
                self._end(reason, self._patience_s)
        if now >= self._stuck_at:
            self._stuck_at = float("inf")
            if not self._loop.has_turned:
                self._end("the end of the daemon", self._stuck_patience_s)

    def _unheard(self) -> str:
        """The name of a signal that the loop should have heard."""
        try:
            unread = os.read(self._signals, 4096)
        except BlockingIOError:
            return ""
        return next((signal.Signals(each).name for each in unread if each in _SIGNALS), "")

    def _end(self, reason: str, patience_s: float) -> None:
        # A thread of the author's may hold the log's lock.
        signal.alarm(_DIE_S)
        where = lines_of_threads()
        log.error(
            "%s: %g s after %s, no answer to %s%s: ending; the next backend executes them",
            *(
                self._loop.name,
                patience_s,
                reason,
                self._loop.unanswered(),
                f" (at {where})" if where else "",
            ),
        )
        os._exit(STATUS_UNANSWERED)
