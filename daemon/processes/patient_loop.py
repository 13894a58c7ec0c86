"""The supervisor's event loop, whose clock stands still while the process does not run.

Owns the time by which every deadline of the daemon is measured: for fences, for backends that are to leave, for control
commands, and for answers of workers, broker and holder.  The process can be stopped (SIGSTOP, a frozen cgroup, a
suspended or migrated virtual machine), and the other side with it.  CLOCK_MONOTONIC goes on then, but messages lie
unread, so a deadline that counted this time would end a healthy process.  CLOCK_MONOTONIC, unlike CLOCK_BOOTTIME, does
not count a suspend of the whole machine.  The workers' deadlines use a clock like this one: ublk/csrc/queue_clock.h.
"""

import asyncio
import selectors
import time
from collections.abc import Callable

PAUSE_S = 2.0
"""A turn of the loop that is this late means that the process did not run, or ran one callback for that long."""
QUIET_S = 1.0
"""The clock stands still this much longer: the other side needs time to run again and to answer."""
SLICE_S = 1.0
"""While a deadline is set, the loop sleeps this long at a time, so that a longer silence is a pause."""


class ServingClock:
    """The time during which this process ran, in seconds."""

    def __init__(self, system: Callable[[], float] = time.monotonic) -> None:
        self._system = system
        self._read_s = system()
        self._missed_s = 0.0
        self._quiet_until_s = self._read_s

    def read(self, waited_s: float = 0.0) -> float:
        """The time now.  Since the last read the process meant to wait for `waited_s` at most."""
        before_s, now_s = self._read_s, self._system()
        gap_s = now_s - before_s
        if gap_s - waited_s > PAUSE_S:
            self._missed_s += gap_s
            self._quiet_until_s = now_s + QUIET_S
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
        """The ready descriptors; none after a slice, which the loop takes for a turn in which nothing was due."""
        slice_s = SLICE_S if timeout is None else min(timeout, SLICE_S)
        ready = super().select(timeout if timeout is None else slice_s)
        # Without a deadline a pause does no harm, and the wait has no limit.
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
