"""The gate between a step and what depends on its record: it opens once the step is on record.

A daemon that is killed in between would leave a process that no later daemon knows of, with a device, a port or a
store in its hands, or a device that is held and not on record as drained.  So the process waits for a byte on a pipe,
and acts on the pipe's end instead if the daemon ends: only the daemon has the other end.  One write opens the gate for
all processes that wait at it.
"""

import os
from contextlib import suppress
from typing import Literal, Self

Passage = Literal["open", "closed", "ended"]


class RecordGate:
    """One gate, for every process that has its reader: by a fork, or by a message."""

    def __init__(self) -> None:
        """Raises `OSError` without a descriptor."""
        self.reader, self._writer = os.pipe()

    @classmethod
    def at(cls, reader: int) -> Self:
        """In a process that was sent the gate's reader."""
        gate = cls.__new__(cls)
        gate.reader, gate._writer = reader, -1
        return gate

    def passes(self) -> bool:
        """In the forked process, which kept `reader`: wait; False if the daemon has ended, or failed to record it."""
        with suppress(OSError):
            return bool(os.read(self.reader, 1))
        return False

    def open(self, count: int = 1) -> None:
        """In the daemon: let `count` processes pass, and close the gate's descriptors."""
        if self._writer >= 0:
            # A process that has ended already reads nothing.
            with suppress(BrokenPipeError):
                os.write(self._writer, bytes(count))
            self.close()

    def close(self) -> None:
        """In the daemon: close its descriptors; for a process that has not passed the gate has ended."""
        if self._writer >= 0:
            os.close(self.reader)
            os.close(self._writer)
            self._writer = -1


def look_at_gate(reader: int) -> Passage:
    """In a process that has this non-blocking reader: take its byte, if the gate is open."""
    try:
        return "open" if os.read(reader, 1) else "ended"
    except BlockingIOError:
        return "closed"
