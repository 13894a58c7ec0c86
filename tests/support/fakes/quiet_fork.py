"""A fork that waits until no other thread runs, for a process that AddressSanitizer watches.

AddressSanitizer's allocator (GCC's libasan) has no handler for fork: a thread that holds one of its locks just then,
such as one that returns its memory as it ends, leaves the lock held in the child, which waits for it for ever.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 5.0
PAUSE_S = 0.001
_fork = os.fork


def fork_when_quiet() -> int:
    """As `os.fork`, once all other threads sleep; after `PATIENCE_S` in any case."""
    until_s = time.monotonic() + PATIENCE_S
    # A test may leave no descriptor for a look at the threads.
    with suppress(OSError):
        while not _is_quiet() and time.monotonic() < until_s:
            time.sleep(PAUSE_S)
    return _fork()


def _is_quiet() -> bool:
    own = str(threading.get_native_id())
    return all(_sleeps(each) for each in Path("/proc/self/task").iterdir() if each.name != own)


def _sleeps(task: Path) -> bool:
    """Whether the thread sleeps or has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return (task / "stat").read_text().rpartition(") ")[2].startswith(("S", "Z", "X"))
    return True
