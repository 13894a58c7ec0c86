"""Refused backends: each is counted, and a bounded number of reasons is logged.

Owns the limits on these log lines, and which characters of a backend's text may appear there.
"""

import logging
from collections.abc import Callable

LINES_PER_PERIOD_MAX = 20
PERIOD_S = 60.0
REASON_LENGTH_MAX = 500
_log = logging.getLogger("ublkpool.attach")


def plain(text: str) -> str:
    """The text on one line of bounded length, printable characters only: part of it may be a backend's."""
    line = "".join(each if each.isprintable() else "?" for each in text[: REASON_LENGTH_MAX + 1])
    return line if len(line) <= REASON_LENGTH_MAX else f"{line[: REASON_LENGTH_MAX - 3]}..."


class Refusals:
    """The count of refusals, and the reasons that were logged in this period."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` is in seconds."""
        self.count = 0
        self._clock = clock
        self._period_end_s = 0.0
        self._said: set[str] = set()
        self._unsaid = 0

    def note(self, reason: str) -> None:
        """Count a refusal.  In one period each reason is logged once, and `LINES_PER_PERIOD_MAX` reasons at most."""
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
