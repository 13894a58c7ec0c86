"""Pauses before a process that ended is started again, and starts that are tried again.

A start fails for want of a process, a descriptor or room for a socket: it is tried until it succeeds, and each reason
is logged once.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from typing import TypeVar

from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon.errors import DaemonError, one_line

T = TypeVar("T")
STEADY_S = 10.0
STEADY_SERVING_S = 2.0


class Backoff:
    """Pauses in seconds, doubled from `first_s` up to `most_s`.

    A process that has run for `STEADY_S`, or served for `STEADY_SERVING_S`, is followed by a pause of `first_s`.
    `clock` returns seconds.
    """

    def __init__(self, clock: Callable[[], float], first_s: float, most_s: float) -> None:
        self._clock = clock
        self._first_s, self._most_s = first_s, most_s
        self._next_s = first_s
        self._started_s = clock()
        self._serving_s: float | None = None

    def started(self) -> None:
        """The process has been started."""
        self._started_s, self._serving_s = self._clock(), None

    def serves(self) -> None:
        """The process does what it is for, from now on."""
        self._serving_s = self._clock()

    def ended(self) -> float:
        """The process has ended, or a start has failed: the pause in seconds before the next start."""
        if self._was_steady():
            self._next_s = self._first_s
        self._serving_s = None
        delay_s = self._next_s
        self._next_s = min(2 * delay_s, self._most_s)
        return delay_s

    def _was_steady(self) -> bool:
        now_s = self._clock()
        if self._serving_s is not None and now_s - self._serving_s >= STEADY_SERVING_S:
            return True
        return now_s - self._started_s >= STEADY_S


async def start_surely(
    what: str,
    start: Callable[[], T],
    delays: Backoff,
    log: logging.Logger,
    patience_s: float = math.inf,
) -> T:
    """Call `start` until it succeeds, and return its result; each reason of a failure is logged once.

    After `patience_s` the last failure is raised: `DaemonError`, `PoolError` or `OSError`.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + patience_s
    logged_reason = ""
    while True:
        try:
            return start()
        except (DaemonError, PoolError, OSError) as error:
            if loop.time() > until_s:
                raise
            delay_s, reason = delays.ended(), one_line(error)
            if reason != logged_reason:
                log.error("%s cannot be started: %s; trying again every %.1f s or so", what, reason, delay_s)
                logged_reason = reason
        await asyncio.sleep(delay_s)
