"""Whether the cluster still hears this client, and whether it has excluded it.

A client whose lock was broken is on the cluster's blocklist for a time, an hour by default.  Afterwards its late writes
would be accepted.  So a client that has not heard from the cluster for less than that time ends itself: the kernel
kills it (`boot_timer.h`), by a clock that counts suspend.  And librbd 16 never answers a write of an excluded client,
so the pulse asks by itself, and says when the answer is that.

Owns a thread, which asks, and the timer.
"""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from ublkpool.backends.rbd.cluster import Question
from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import log

_INTERVAL_MAX_S = 5.0
_LOOK_MIN_S, _LOOK_MAX_S = 0.005, 0.5
_SILENT_S = 10.0
"""After how long without an answer the log says so."""
_SHARE = 0.75
"""Of the time of exclusion; the rest is for the clocks of other machines."""
_LAST_WORD_S = 0.5


class Alarm(Protocol):
    """Ends this process at a time of CLOCK_BOOTTIME, in seconds."""

    def set(self, at_s: float) -> None:
        """Instead of the time before; 0: never."""

    def close(self) -> None:
        """Never, and free it."""


class BootAlarm:
    """The kernel's timer with SIGKILL."""

    def __init__(self) -> None:
        """Raises `BackendError` if the kernel has no timer left."""
        error = ffi.new("int *")
        self._timer: Any = lib.boot_timer_new(signal.SIGKILL, error)
        if self._timer == ffi.NULL:
            raise BackendError(f"rbd: no timer: {os.strerror(-error[0])}")

    def set(self, at_s: float) -> None:
        """See `Alarm`."""
        if error := lib.boot_timer_set(self._timer, int(at_s * 1e9)):
            raise OSError(-error, f"timer: {os.strerror(-error)}")

    def close(self) -> None:
        """See `Alarm`."""
        if self._timer is not None:
            lib.boot_timer_free(self._timer)
            self._timer = None


def boot_clock() -> float:
    """Seconds since the boot, suspend included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Pulse:
    """Asks the cluster again and again, from `start` to `close`."""

    def __init__(
        self,
        ask: Callable[[], Question],
        expire_s: float,
        name: str,
        alarm: Alarm,
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        """`expire_s`: for how long the cluster excludes a client; `name`: the image's, for people."""
        self._ask, self._name, self._alarm, self._clock = ask, name, alarm, clock
        self.limit_s = _SHARE * expire_s
        """For how long the cluster may be silent."""
        self._interval_s = min(_INTERVAL_MAX_S, expire_s / 8)
        self._on_excluded: Callable[[], None] = lambda: None
        self._on_turn: Callable[[], None] = lambda: None
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._heard_s = clock()
        self._thread = threading.Thread(target=self._run, name="ublkpool-pulse", daemon=True)
        alarm.set(self._heard_s + self.limit_s)

    @property
    def silent_s(self) -> float:
        """For how long the cluster has not been heard."""
        return self._clock() - self._heard_s

    def start(self, on_excluded: Callable[[], None], on_turn: Callable[[], None]) -> None:
        """`on_excluded`: the cluster accepts nothing more from this client; `on_turn`: called after each answer, and
        soon after `wake`.  Both on the pulse's thread."""
        self._on_excluded, self._on_turn = on_excluded, on_turn
        self._thread.start()

    def wake(self) -> None:
        """Ask now.  Any thread may call it."""
        self._wake.set()

    def close(self) -> None:
        """Stop asking; the alarm stays, since a write may still be on its way until the client has left."""
        self._closed.set()
        self._wake.set()

    def join(self) -> None:
        """Wait until it asks nothing more; for ever if librbd does not answer a question of `on_turn`."""
        if self._thread.ident is not None:
            self._thread.join()

    def forget_alarm(self) -> None:
        """The client has left the cluster, and writes no more."""
        self._alarm.close()

    def _run(self) -> None:
        try:
            while self._beat():
                self._wake.wait(self._interval_s)
                # Before the look at `_closed`, which is set first.
                self._wake.clear()
        except Exception:
            # The alarm ends the process if nothing is heard any more.
            log.exception("%s: the cluster is not asked any more", self._name)

    def _beat(self) -> bool:
        """Ask once; whether to go on."""
        if self._closed.is_set():
            return False
        asked_s = self._clock()
        question = self._ask()
        try:
            answer = self._awaited(question)
        finally:
            question.close()
        if answer is None:
            return False
        if answer == -errno.ESHUTDOWN:
            log.error("%s: the cluster accepts nothing more from this client", self._name)
            self._on_excluded()
            return False
        # Any other answer, too, is one of a cluster that hears this client.  What was heard when it was asked, is sure.
        self._heard_s = asked_s
        self._alarm.set(asked_s + self.limit_s)
        self._on_turn()
        return True

    def _awaited(self, question: Question) -> int | None:
        look_s, said = _LOOK_MIN_S, 0.0
        while (answer := question.answer()) is None and not self._closed.is_set():
            if not said and self.silent_s >= min(_SILENT_S, self.limit_s / 2):
                said = self.silent_s
                log.warning(
                    "%s: not heard from the cluster for %.0f s: requests wait; after %g s this process ends, before "
                    "the cluster may forget that it has excluded it",
                    *(self._name, said, self.limit_s),
                )
            elif self.silent_s >= self.limit_s - _LAST_WORD_S and said < self.limit_s - _LAST_WORD_S:
                said = self.silent_s
                log.error(
                    "%s: not heard from the cluster for %.1f s: ending; requests wait for the next backend",
                    *(self._name, said),
                )
            self._closed.wait(look_s)
            look_s = min(2 * look_s, _LOOK_MAX_S)
        if said and answer is not None:
            log.warning("%s: the cluster is heard again", self._name)
        return answer
