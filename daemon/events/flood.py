"""How many events of one code and device are recorded: a device that flaps must not push out the events of others.

Owns the limit: the first `EVENTS_MAX` of a code and device in `WINDOW_S` are recorded, the others are counted.  In the
window after one in which events were left out, a single event is recorded.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

EVENTS_MAX = 20
WINDOW_S = 600.0
KEYS_MAX = 64 << 10
"""Pairs of code and device; all further pairs share one count."""
_OTHERS = ("", "")
_Key = tuple[str, str]


class Suppressed(NamedTuple):
    """Events of one window that were not recorded."""

    code: str
    device: str
    left_out: int


class _Window:
    def __init__(self, end_s: float, limit: int) -> None:
        self.end_s = end_s
        self.limit = limit
        self.count = 0

    @property
    def left_out(self) -> int:
        return max(0, self.count - self.limit)


class FloodLimit:
    """The windows of all codes and devices."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` is in seconds."""
        self._clock = clock
        self._windows: OrderedDict[_Key, _Window] = OrderedDict()
        """In the order of their ends, since all are equally long: no event costs a look at all windows."""

    def admits(self, code: str, device: str) -> bool:
        """Count an event; whether it is to be recorded.  `due` comes first."""
        key = (code, device)
        if key not in self._windows and len(self._windows) >= KEYS_MAX:
            key = _OTHERS
        window = self._windows.setdefault(key, _Window(self._clock() + WINDOW_S, EVENTS_MAX))
        window.count += 1
        return window.count <= window.limit

    def due(self) -> list[Suppressed]:
        """What was left out in the windows that have ended."""
        now_s, found = self._clock(), []
        while self._windows and next(iter(self._windows.values())).end_s <= now_s:
            key, window = self._windows.popitem(last=False)
            if window.left_out:
                found.append(Suppressed(*key, window.left_out))
                self._windows[key] = _Window(now_s + WINDOW_S, 1)
        return found

    def next_s(self) -> float | None:
        """When `due` will have something; None if no event was left out."""
        return next((each.end_s for each in self._windows.values() if each.left_out), None)
