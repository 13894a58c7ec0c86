"""The supervisor's event loop, whose clock stands still while the process does not run.

Owns the time on which every deadline of the daemon is measured: of fences, farewells, control commands, answers of
workers, broker and holder.  The process can be stopped (SIGSTOP, a frozen cgroup, a suspended or migrated virtual
machine), and with it the other side.  CLOCK_MONOTONIC goes on then, but what has been said meanwhile lies unread, so
a deadline that counted this time would end a healthy process.  CLOCK_MONOTONIC, not CLOCK_BOOTTIME, is read: it leaves
out a suspend of the whole machine.  The workers' deadlines have a clock like this one: ublk/csrc/queue_clock.h.
"""

import asyncio
import selectors
import time
from collections.abc import Callable

PAUSE_S = 2.0
"""A turn of the loop that is so late means that the process did not run, or did one thing for that long."""
QUIET_S = 1.0
"""So long the clock stands still afterwards: the other side needs time to run again and to answer."""
SLICE_S = 1.0
"""The loop sleeps no longer at a time while there is a deadline: a longer silence is a pause."""


class ServingClock:
    """The time in which this process was able to serve, in seconds."""

    def __init__(self, system: Callable[[], float] = time.monotonic) -> None:
        self._system = system
        self._read_s = system()
        self._missed_s = 0.0
        self._quiet_until_s = self._read_s
        self.pauses = 0

    def read(self, waited_s: float = 0.0) -> float:
        """Now.  Since the last read the process meant to wait for `waited_s` at most."""
        before_s, now_s = self._read_s, self._system()
        gap_s = now_s - before_s
        if gap_s - waited_s > PAUSE_S:
            self._missed_s += gap_s
            self._quiet_until_s = now_s + QUIET_S
            self.pauses += 1
        elif before_s < self._quiet_until_s:
            self._missed_s += min(gap_s, self._quiet_until_s - before_s)
        self._read_s = now_s
        return now_s - self._missed_s


class _SlicingSelector(selectors.DefaultSelector):
    """Waits in slices, so that a pause can be told from a long wait."""

    def __init__(self, clock: ServingClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; after a slice perhaps nothing, which the loop takes for a turn in which nothing was due."""
        slice_s = SLICE_S if timeout is None else min(timeout, SLICE_S)
        ready = super().select(timeout if timeout is None else slice_s)
        # Without a deadline there is nothing that a pause could hurt, and the wait may have been as long as it likes.
        self._clock.read(float("inf") if timeout is None else max(0.0, slice_s))
        return ready


class PatientLoop(asyncio.SelectorEventLoop):
    """asyncio's loop on a `ServingClock`."""

    def __init__(self, system: Callable[[], float] = time.monotonic) -> None:
        """`system` is the machine's clock."""
        self._serving = ServingClock(system)
        super().__init__(_SlicingSelector(self._serving))

    def time(self) -> float:
        """The loop's clock: it stands still while the process does not run."""
        return self._serving.read()
