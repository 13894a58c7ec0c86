"""How long to wait before something that ended is started again: longer each time, until it has lived steadily."""

from collections.abc import Callable

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
