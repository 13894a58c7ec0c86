"""What a process that stores blocks does to itself, so that storing never waits for itself.

A backend that allocates while the kernel reclaims memory could wait for a write to the very device it serves:
`PR_SET_IO_FLUSHER` makes its allocations not recurse into I/O, locked memory keeps its pages from being swapped
there.  Both are best effort: without CAP_SYS_RESOURCE or a memlock limit the backend works and says so once.
"""

import ctypes
import os

_PR_SET_IO_FLUSHER = 57
_MCL_CURRENT = 1
_MCL_ONFAULT = 4
_libc = ctypes.CDLL(None, use_errno=True)


def set_io_flusher() -> str | None:
    """Mark this process as one that writes blocks back.  Returns why not, or None."""
    return _reason("PR_SET_IO_FLUSHER", _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0))


def lock_memory() -> str | None:
    """Keep what is mapped now in memory once it was touched.  Returns why not, or None."""
    return _reason("mlockall", _libc.mlockall(_MCL_CURRENT | _MCL_ONFAULT))


def _reason(what: str, result: int) -> str | None:
    return f"{what}: {os.strerror(ctypes.get_errno())}" if result < 0 else None
