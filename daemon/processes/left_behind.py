"""Processes that an earlier daemon left: telling one from a later process with its number, and ending it."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from ublkpool.daemon.errors import DaemonError

Role = Literal["worker", "backend", "broker"]
PATIENCE_S = 10.0
KILL_PATIENCE_S = 60.0
_START_TIME_FIELD = 19
"""Of /proc/PID/stat, counted from the field after the name (proc_pid_stat(5): field 22)."""


class Process(msgspec.Struct, frozen=True):
    """A process, told from all others by when it started (clock ticks since boot)."""

    role: Role
    pid: int
    start_ticks: int


def identify(role: Role, pid: int) -> Process | None:
    """The process with this number now; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return Process(role, pid, int(fields[_START_TIME_FIELD]))


def is_alive(process: Process) -> bool:
    """Whether it is still that process."""
    return identify(process.role, process.pid) == process


async def end_process(process: Process) -> None:
    """TERM, then KILL; a worker is killed at once, since the kernel gives its requests to the next.

    Raises `DaemonError` if it does not even end when it is killed.
    """
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(process.pid)
        try:
            # Asked after the pidfd was opened: from here on the number cannot change hands unnoticed.
            if not is_alive(process):
                return
            if process.role != "worker":
                signal.pidfd_send_signal(fd, signal.SIGTERM)
                if await _exits(fd, PATIENCE_S):
                    return
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            if not await _exits(fd, KILL_PATIENCE_S):
                raise DaemonError(
                    f"{process.role} process {process.pid} has not ended {KILL_PATIENCE_S:.0f} s after SIGKILL: "
                    f"it waits in the kernel, see /proc/{process.pid}/stack"
                )
        finally:
            os.close(fd)


async def _exits(pidfd: int, timeout_s: float | None) -> bool:
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await asyncio.wait_for(gone.wait(), timeout_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True
