"""Processes that an earlier daemon left: identified by number and start time, and ended."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import DaemonError

Role = Literal["worker", "backend", "broker", "metrics"]
PATIENCE_S = 10.0
KILL_PATIENCE_S = 60.0
_START_TIME_FIELD = 19
"""Of /proc/PID/stat, counted from the field after the name (proc_pid_stat(5): field 22)."""


class Process(msgspec.Struct, frozen=True):
    """A process, told from later ones with its number by its start (clock ticks since boot)."""

    role: Role
    pid: int
    start_ticks: int


def identify(role: Role, pid: int) -> Process | None:
    """The process that has this number now, or None.

    Raises `OSError` if /proc cannot be read for want of a descriptor or memory: the process may live.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(role, pid, int(fields[_START_TIME_FIELD]))


def is_alive(process: Process) -> bool:
    """Whether the process still lives.  Raises `OSError` as `identify` does."""
    return identify(process.role, process.pid) == process


def user_of(pid: int) -> int | None:
    """The user as which this process runs; None if it has ended.  Raises `OSError` as `identify` does."""
    try:
        # Not as text: a carriage return in the process's name would begin a line.
        status = Path(f"/proc/{pid}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(status.partition(b"\nUid:\t")[2].split()[0])


async def end_process(process: Process) -> None:
    """SIGTERM, then SIGKILL; a worker gets SIGKILL at once, since the kernel gives its requests to the next one.

    Raises `DaemonError` if the process does not even end after SIGKILL, or if it cannot be told whether it lives.
    """
    try:
        await _end(process)
    except ProcessLookupError:
        return
    except OSError as error:
        raise DaemonError(
            f"{process.role} process {process.pid} cannot be ended: {explain(error)}"
        ) from error


async def _end(process: Process) -> None:
    """See `end_process`.  Raises `DaemonError`, `ProcessLookupError`, `OSError`."""
    fd = os.pidfd_open(process.pid)
    try:
        # Checked after the pidfd was opened, which never becomes another process's.
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


async def kill_process(what: str, pidfd: int) -> None:
    """SIGKILL to the process of this pidfd; return at its end.  Raises `DaemonError` if it does not end."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    if not await _exits(pidfd, KILL_PATIENCE_S):
        raise DaemonError(
            f"{what} has not ended {KILL_PATIENCE_S:.0f} s after SIGKILL: it waits in the kernel"
        )


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
