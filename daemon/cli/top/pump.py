"""Reads at each interval's end, on a thread of its own, so that a slow daemon never holds up the screen.

Owns when a reading is due.  The thread hands over a reading and waits until the screen has taken it: nothing
piles up while the terminal is blocked.  It ends with the process.
"""

import threading
import time
from collections.abc import Callable

from ublkpool.daemon.cli.top.reading import Reading
from ublkpool.daemon.errors import DaemonUnreachable, RemoteError
from ublkpool.daemon.rates import following

RETRY_S_MAX = 1.0
"""Seconds after which an absent daemon is asked again, if the interval is not shorter."""


class PumpEnded(Exception):
    """The screen is gone."""


class Pump:
    """Calls `read` and hands what comes of it to `show`, on its thread."""

    def __init__(
        self,
        read: Callable[[str], Reading],
        show: Callable[[Reading | Exception], object],
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`show` must not wait.

        It gets the `DaemonError` of an absent daemon, which is asked again, or another exception, which ends the pump.
        """
        self._read = read
        self._show = show
        self._clock = clock
        self._changed = threading.Condition()
        self._interval_s = interval_s
        self._looked_at = ""
        self._is_paused = self._is_owed = self._has_ended = False
        self._due_s = clock() + interval_s

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="ublkpool-top", daemon=True).start()

    def set(self, interval_s: float, is_paused: bool, looked_at: str) -> None:
        """What the user wants now; the next reading has the processes of the device `looked_at`."""
        with self._changed:
            self._due_s = min(self._due_s, self._clock() + interval_s)
            self._interval_s, self._is_paused, self._looked_at = interval_s, is_paused, looked_at
            self._changed.notify()

    def taken(self) -> None:
        """The screen has taken what it was handed."""
        with self._changed:
            self._is_owed = False
            self._changed.notify()

    def end(self) -> None:
        """Hand nothing over any more."""
        with self._changed:
            self._has_ended = True
            self._changed.notify()

    def check(self) -> None:
        """Raise `PumpEnded` if the screen is gone; called while the daemon is silent."""
        if self._has_ended:
            raise PumpEnded

    def due_in_s(self) -> float | None:
        """Seconds until the next reading; 0: now; None: not before something changes."""
        if self._is_paused or self._is_owed:
            return None
        return max(0.0, self._due_s - self._clock())

    def step(self) -> bool:
        """Read once and hand it over; False if that ended the pump."""
        goes_on = True
        found: Reading | Exception
        try:
            found = self._read(self._looked_at)
        except PumpEnded:
            return False
        except (DaemonUnreachable, RemoteError) as error:
            found = error
        except Exception as error:
            found, goes_on = error, False
        with self._changed:
            now_s = self._clock()
            if isinstance(found, Exception):
                self._due_s = now_s + min(self._interval_s, RETRY_S_MAX)
            else:
                self._due_s = following(self._due_s, now_s, self._interval_s)
            self._is_owed = True
        self._show(found)
        return goes_on

    def _run(self) -> None:
        while self._wait() and self.step():
            pass

    def _wait(self) -> bool:
        """Return when a reading is due; False at the end."""
        with self._changed:
            while not self._has_ended and (wait_s := self.due_in_s()) != 0:
                self._changed.wait(wait_s)
            return not self._has_ended
