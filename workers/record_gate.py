"""The gate between a fork and the work of the forked process: it opens once the process is on record.

A daemon that is killed in between would leave a process that no later daemon knows of, with a device, a port or a
store in its hands.  So the process waits for a byte on a pipe, and ends if the pipe ends instead: only the daemon has
the other end.
"""

import os
from contextlib import suppress


class RecordGate:
    """One gate, for every process that is forked while it is closed."""

    def __init__(self) -> None:
        """Raises `OSError` without a descriptor."""
        self.reader, self._writer = os.pipe()

    def passes(self) -> bool:
        """In the forked process, which kept `reader`: wait; False if the daemon has ended, or failed to record it."""
        with suppress(OSError):
            return bool(os.read(self.reader, 1))
        return False

    def open(self, count: int = 1) -> None:
        """In the daemon: let `count` processes pass, and close the gate's descriptors."""
        # A process that has ended already reads nothing.
        with suppress(BrokenPipeError):
            os.write(self._writer, bytes(count))
        self.close()

    def close(self) -> None:
        """In the daemon: close its descriptors; a process that has not passed ends."""
        if self._writer >= 0:
            os.close(self.reader)
            os.close(self._writer)
            self._writer = -1
