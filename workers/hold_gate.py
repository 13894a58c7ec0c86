"""A worker's hold that is not on record yet: it ends if the supervisor ends before it is.

Owns the gate's descriptor.  A hold of which the supervisor has put on record that the device is drained stays without
a supervisor; one that was only on its way ends, and the queue's requests go on.  Runs on the worker's one thread.
"""

import os
from collections.abc import Callable

from ublkpool.workers.record_gate import look_at_gate


class HoldGate:
    """The gate of the last hold, or none."""

    def __init__(self, watch: Callable[[int], None], let_go: Callable[[], None]) -> None:
        """`watch` is called with the descriptor to be watched for input, or -1; `let_go` when the hold ends."""
        self._watch = watch
        self._let_go = let_go
        self._reader = -1
        self.has_let_go = False
        """Whether the last hold has ended with its supervisor."""

    def begin(self, reader: int | None) -> None:
        """A hold begins, or ends, at the supervisor's word; takes over the descriptor.  None: it needs no gate."""
        self.close()
        self.has_let_go = False
        if reader is not None:
            os.set_blocking(reader, False)
            self._reader = reader
            self._watch(reader)

    def look(self) -> None:
        """The descriptor is readable."""
        if self._reader >= 0:
            passage = look_at_gate(self._reader)
            if passage != "closed":
                self._decide(passage == "open")

    def succeed(self) -> None:
        """Another supervisor asks, so the one that had begun the hold has ended."""
        if self._reader >= 0:
            self._decide(look_at_gate(self._reader) == "open")

    def close(self) -> None:
        """Close the descriptor."""
        if self._reader >= 0:
            self._watch(-1)
            os.close(self._reader)
            self._reader = -1

    def _decide(self, is_recorded: bool) -> None:
        self.close()
        if not is_recorded:
            self.has_let_go = True
            self._let_go()
