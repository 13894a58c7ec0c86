"""Refused backends: every one is counted, and a log that nobody can fill says it once.

Owns how often that is said, and what of a stranger's words may stand in the log.
"""

import logging
from collections.abc import Callable

LINES_PER_PERIOD_MAX = 20
PERIOD_S = 60.0
REASON_LENGTH_MAX = 500
_log = logging.getLogger("ublkpool.attach")


def plain(text: str) -> str:
    """The text on one line of bounded length: a backend's words may be in it."""
    line = "".join(each if each.isprintable() else "?" for each in text[: REASON_LENGTH_MAX + 1])
    return line if len(line) <= REASON_LENGTH_MAX else f"{line[: REASON_LENGTH_MAX - 3]}..."


class Refusals:
    """The count, and the lines that were logged in this period."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` is in seconds."""
        self.count = 0
        self._clock = clock
        self._period_end_s = 0.0
        self._said: set[str] = set()
        self._unsaid = 0

    def note(self, reason: str) -> None:
        """One more.  A reason is logged once in a period, and so many reasons at most."""
        self.count += 1
        if self._clock() >= self._period_end_s:
            self._next_period()
        if reason in self._said or len(self._said) >= LINES_PER_PERIOD_MAX:
            self._unsaid += 1
            return
        self._said.add(reason)
        _log.warning("backend refused: %s", reason)

    def _next_period(self) -> None:
        if self._unsaid:
            _log.warning("%d more backends were refused, %d in all", self._unsaid, self.count - 1)
        self._period_end_s = self._clock() + PERIOD_S
        self._said.clear()
        self._unsaid = 0
