"""How fast this machine's time stamp counter runs, which an emulated guest reads as its own.

A guest measures the counter at its boot, against the emulated timers.  On a busy machine QEMU may stand still in
between.  One guest's clock then ran six times too fast, so that every deadline passed after a sixth of its time.
"""

import ctypes
import mmap
import platform
import time
from collections.abc import Callable
from contextlib import suppress

_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""rdtsc; shl rdx, 32; or rax, rdx; ret."""
_WRITE_AND_RUN = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
_SPAN_S = 0.1
_READS = 50


def counter_khz() -> int | None:
    """The counter's frequency, exact to a few parts in 100,000.

    None on another processor, or where a process may have no memory to write and execute.
    """
    if platform.machine() != "x86_64":
        return None
    with (
        suppress(OSError),
        mmap.mmap(-1, mmap.PAGESIZE, prot=_WRITE_AND_RUN) as page,
    ):
        page.write(_RDTSC)
        place = ctypes.c_char.from_buffer(page)
        try:
            return _frequency_khz(ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(place)))
        finally:
            del place
    return None


def _frequency_khz(counter: Callable[[], int]) -> int:
    began_ns, first = _read(counter)
    time.sleep(_SPAN_S)
    ended_ns, last = _read(counter)
    return round((last - first) * 1_000_000 / (ended_ns - began_ns))


def _read(counter: Callable[[], int]) -> tuple[float, int]:
    """Clock and counter at one moment: of several reads the one that nothing came into."""
    reads = [(time.monotonic_ns(), counter(), time.monotonic_ns()) for _ in range(_READS)]
    before, count, after = min(reads, key=lambda each: each[2] - each[0])
    return (before + after) / 2, count
