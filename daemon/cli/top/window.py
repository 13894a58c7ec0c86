"""Which rows of a long list are on the screen, and which of them is chosen.  Pure."""

from collections.abc import Sequence


class Window:
    """The first row on the screen, and the key of the chosen row.

    The chosen row is remembered by its key, so that it stays chosen wherever it is sorted to; until the user has chosen
    one it is the first.
    """

    def __init__(self) -> None:
        self.top = 0
        self.chosen: str | None = None

    def at(self, keys: Sequence[str]) -> int:
        """The index of the chosen row; -1 without rows."""
        if not keys:
            return -1
        if self.chosen is None or self.chosen not in keys:
            return 0
        return keys.index(self.chosen)

    def move(self, by: int, keys: Sequence[str]) -> None:
        """Choose the row that is `by` rows further down, or the last or first one."""
        if keys:
            index = min(len(keys) - 1, max(0, self.at(keys) + by))
            self.chosen = keys[index] if index else None

    def choose(self, index: int, keys: Sequence[str]) -> None:
        """Choose the row with this index, if there is one."""
        if 0 <= index < len(keys):
            self.chosen = keys[index]

    def shown(self, keys: Sequence[str], height: int) -> range:
        """The indices of the rows on a screen with so many lines for rows; the chosen one is among them."""
        at = max(0, self.at(keys))
        self.top = min(self.top, at, max(0, len(keys) - height))
        self.top = max(self.top, at - height + 1, 0)
        return range(self.top, min(len(keys), self.top + max(0, height)))


class Scroll:
    """Which lines of a list are on the screen; with `follows` its end, as it grows, until the user leaves that."""

    def __init__(self, follows: bool) -> None:
        self._may_follow = follows
        self.follows = follows
        self.top = 0

    def move(self, by: int, count: int, height: int) -> None:
        """Scroll `by` lines down."""
        last = max(0, count - height)
        self.top = min(last, max(0, (last if self.follows else self.top) + by))
        self.follows = self._may_follow and self.top == last

    def shown(self, count: int, height: int) -> range:
        """The indices of the lines on a screen with so many lines."""
        last = max(0, count - height)
        self.top = last if self.follows else min(self.top, last)
        return range(self.top, min(count, self.top + max(0, height)))
