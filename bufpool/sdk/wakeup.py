"""An eventfd that wakes a loop, signalled by any thread while another may close it.

Owns `Wakeup`.  Knows neither loops nor requests.
"""

import os
import threading
from contextlib import suppress


class Wakeup:
    """An eventfd: `signal` makes `descriptor` readable until `drain`.

    The operating system gives the number of a closed descriptor to the next file that the process opens.  A thread that
    still writes to the number would then write eight bytes into that file, which may be the store.  So `signal` and
    `close` exclude each other.
    """

    __slots__ = ("_is_closed", "_lock", "descriptor")

    def __init__(self) -> None:
        """Raises `OSError` without a free descriptor."""
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Re-entrant, since a signal handler may interrupt the thread that holds it.
        self._lock = threading.RLock()
        self._is_closed = False

    def signal(self) -> None:
        """Make the descriptor readable; nothing after `close`.  Safe in a signal handler and on any thread."""
        with self._lock:
            if not self._is_closed:
                os.eventfd_write(self.descriptor, 1)

    def drain(self) -> None:
        """Make the descriptor unreadable; never while another thread may close it."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self.descriptor)
