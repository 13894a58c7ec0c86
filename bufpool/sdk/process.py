"""Settings of a process that stores blocks, so that it never waits for the device that it serves.

A backend that allocates memory under memory pressure could wait for a write to its own device: `PR_SET_IO_FLUSHER`
keeps its allocations from starting I/O, and locked memory is not swapped out to that device.  Both are best effort:
without CAP_SYS_RESOURCE or a sufficient memlock limit the backend works all the same and logs it once.
"""

import ctypes
import os

IO_FLUSHER_SET = "UBLKPOOL_IO_FLUSHER_SET"
"""In the environment of a process for which its daemon has set the flag: it stays over an exec, and the process, an
ordinary user, can neither set nor ask for it."""
_PR_SET_IO_FLUSHER = 57
_MCL_CURRENT = 1
_MCL_ONFAULT = 4
_libc = ctypes.CDLL(None, use_errno=True)


def set_io_flusher() -> str | None:
    """Set PR_SET_IO_FLUSHER for this process.  Returns the reason if that fails, else None."""
    if os.environ.get(IO_FLUSHER_SET):
        return None
    return _reason("PR_SET_IO_FLUSHER", _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0))


def lock_memory() -> str | None:
    """Lock each currently mapped page once it is touched.  Returns the reason if that fails, else None."""
    return _reason("mlockall", _libc.mlockall(_MCL_CURRENT | _MCL_ONFAULT))


def _reason(what: str, result: int) -> str | None:
    return f"{what}: {os.strerror(ctypes.get_errno())}" if result < 0 else None
