"""How long to wait before something that ended is started again: longer each time, until it has lived steadily.

Owns that a start which fails, for want of a process, a descriptor or room for a socket, is tried again, and is said.
"""

import asyncio
import logging
from collections.abc import Callable

from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon.errors import DaemonError, one_line

STEADY_S = 10.0


class Backoff:
    """Delays from `first_s` to `most_s`; a life of `STEADY_S` begins anew.  `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float], first_s: float, most_s: float) -> None:
        self._clock = clock
        self._first_s, self._most_s = first_s, most_s
        self._next_s = first_s
        self._started_s = clock()

    def started(self) -> None:
        """It runs."""
        self._started_s = self._clock()

    def ended(self) -> float:
        """It has ended; the delay in seconds before it may start again."""
        if self._clock() - self._started_s >= STEADY_S:
            self._next_s = self._first_s
        delay_s = self._next_s
        self._next_s = min(2 * delay_s, self._most_s)
        return delay_s


async def start_surely(what: str, start: Callable[[], None], delays: Backoff, log: logging.Logger) -> None:
    """Call `start` until it succeeds; each reason why it does not is logged once."""
    said = ""
    while True:
        try:
            start()
            return
        except (DaemonError, PoolError, OSError) as error:
            delay_s, reason = delays.ended(), one_line(error)
            if reason != said:
                log.error("%s cannot be started: %s; trying again every %.1f s or so", what, reason, delay_s)
                said = reason
        await asyncio.sleep(delay_s)
