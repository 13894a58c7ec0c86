"""Child processes, watched by pidfd: whether one runs, how it ended, and ending it in bounded time.

Owns the reaping: no child of the daemon is reaped elsewhere.  A process that an earlier daemon started is watched in
the same way, but its exit status is unknown: only its parent gets that.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from ublkpool.daemon.processes.left_behind import Process, Role, identify

_KILL_BIT = 1 << signal.SIGKILL - 1
EXIT_UNKNOWN = 255
"""The status of a process that was not our child."""


class Child:
    """A process that this daemon or an earlier one started, until its end."""

    def __init__(self, pid: int, pidfd: int | None = None) -> None:
        """`pidfd` becomes this object's; without it the process of this number is meant.

        Raises `ProcessLookupError` if an earlier daemon's process has ended.
        """
        self.pid = pid
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = os.pidfd_open(pid) if pidfd is None else pidfd
        self._identity: Process | None = None
        self._loop.add_reader(self._pidfd, self._reap)

    def fileno(self) -> int:
        """The pidfd, which is open until the process has ended and the loop has seen that."""
        return self._pidfd

    @property
    def exit_status(self) -> int | None:
        """As in the shell, 128 + signal for a killed process; None while it lives."""
        return self._exited.result() if self._exited.done() else None

    def identified(self, role: Role) -> Process | None:
        """The process as a record names it; None once it has ended.  Raises `OSError` as `identify` does."""
        if self._exited.done():
            return None
        if self._identity is None:
            # Read once: no other process gets its number before this object has seen its end.
            self._identity = identify(role, self.pid)
        return self._identity

    async def wait(self) -> int:
        """Wait for its end; its exit status."""
        return await asyncio.shield(self._exited)

    @property
    def end_check(self) -> Callable[[], bool]:
        """`has_ended` of this process, to be called in any process."""
        return partial(has_ended, self.pid)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still lives."""
        if not self._exited.done():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def end(self, patience_s: float) -> int:
        """SIGTERM, then SIGKILL after `patience_s`; its exit status."""
        self.send(signal.SIGTERM)
        with suppress(TimeoutError):
            return await asyncio.wait_for(self.wait(), patience_s)
        return await self.kill()

    async def kill(self) -> int:
        """SIGKILL; its exit status."""
        self.send(signal.SIGKILL)
        return await self.wait()

    def _reap(self) -> None:
        try:
            # By the pidfd: after a process that is no child of this one its number may be another's.
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            code = EXIT_UNKNOWN
        else:
            if ended is None:
                return
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._exited.set_result(code if code >= 0 else 128 - code)


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status == EXIT_UNKNOWN:
        return "exit status unknown, an earlier daemon was its parent"
    if status <= 128:
        return f"exit status {status}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(status - 128).name}"
    return f"exit status {status}"


def has_ended(pid: int) -> bool:
    """Whether the process is dead, reaped or not, or has SIGKILL pending and can only die."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    found = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    # Exiting takes a while, and the driver cancels the process's commands early in it.
    return found["State"][0] in "ZX" or bool(int(found["ShdPnd"], 16) & _KILL_BIT)
