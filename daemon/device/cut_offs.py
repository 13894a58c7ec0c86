"""How often backends of a device were cut off, by reason.

Owns the short name of each reason; the reasons themselves are told in words, by the workers and by the session.  There
are as many counts as there are names, whatever a backend does.
"""

from collections import Counter

from ublkpool.daemon.status import CUT_OFF_REASONS
from ublkpool.ublk.queue import VIOLATIONS

OTHER = "other"
_WORDS = {
    **dict(zip(VIOLATIONS[1:], CUT_OFF_REASONS, strict=False)),
    "did not confirm the fence": "fence",
    "has hung up on a queue and stays": "stays",
    "has closed its connection and lives on": "stays",
    "it sends descriptors after its attach": "attach-connection",
    "it talks on its attach connection": "attach-connection",
}


class CutOffs:
    """The counts of one device since this daemon began."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def note(self, words: str) -> None:
        """A backend is cut off, and this was told of it."""
        self._counts[name_of(words)] += 1

    def counts(self) -> dict[str, int]:
        """The count of each reason that there was."""
        return dict(self._counts)


def name_of(words: str) -> str:
    """The name of the reason that these words give."""
    return next((name for part, name in _WORDS.items() if part in words), OTHER)
