"""Tells systemd's watchdog that the daemon's loop turns (WatchdogSec= of the unit, sd_watchdog_enabled(3)).

A daemon whose loop hangs is killed by systemd and started again; workers and backends serve meanwhile, and the next
daemon goes on with them.  The timer runs on the machine's clock: the loop's own stands still while the process does not
run, and systemd's does not.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import ctypes
import logging
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

PETS_PER_PERIOD = 4
"""One that is late leaves time for others."""
_TIMERSPEC = struct.Struct("@4q")
"""struct itimerspec: seconds and nanoseconds of the interval, then of the first expiry."""
_CLOCK_MONOTONIC = 1
_NS_PER_S = 1_000_000_000
_libc = ctypes.CDLL(None, use_errno=True)
_log = logging.getLogger("ublkpool.supervisor")


def period_us(environment: Mapping[str, str], pid: int) -> int:
    """How long systemd waits for a sign of life of this process, in microseconds; 0 if it waits for none."""
    us, of_pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(pid))
    return int(us) if us.isascii() and us.isdecimal() and of_pid == str(pid) else 0


@contextmanager
def petting(period_us: int, pet: Callable[[], None]) -> Iterator[None]:
    """Call `pet` from the running loop, a few times in each period, for the length of the block; never if it is 0."""
    if not period_us:
        yield
        return
    try:
        timer = _timer(max(1, period_us * 1000 // PETS_PER_PERIOD))
    except OSError as error:
        _log.error("no timer for the service manager's watchdog, which will restart the daemon: %s", error)
        yield
        return
    loop = asyncio.get_running_loop()

    def due() -> None:
        with suppress(BlockingIOError):
            os.read(timer, 8)
        pet()

    loop.add_reader(timer, due)
    pet()
    try:
        yield
    finally:
        loop.remove_reader(timer)
        os.close(timer)


def _timer(interval_ns: int) -> int:
    """A timerfd that is readable at every interval.  Raises `OSError`.  (os.timerfd_create is Python 3.13's.)"""
    timer = int(_libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
    if timer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    each = divmod(interval_ns, _NS_PER_S)
    if _libc.timerfd_settime(timer, 0, _TIMERSPEC.pack(*each, *each), None):
        code = ctypes.get_errno()
        os.close(timer)
        raise OSError(code, os.strerror(code))
    return timer
