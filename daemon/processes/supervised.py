"""A process that the daemon needs at all times: the pool broker, the holder, a device's own backend.

Owns the process's life: it is started, or adopted from an earlier daemon, and started again after a growing pause
whenever it ends, until it is told to end.  Every end is logged with the exit status.  Runs on the supervisor's asyncio
loop.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager, nullcontext

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.backoff import Backoff, start_surely
from ublkpool.daemon.processes.children import Child


class SupervisedProcess(ABC):
    """One such process.  A subclass forks it, closes what belonged to the one before, and informs its users."""

    child: Child
    """The process of today, or the last one; unset until `is_started`."""
    is_started = False
    """Whether a process was ever started or adopted."""

    def __init__(self, title: str, log: logging.Logger, first_s: float, most_s: float) -> None:
        """Nothing runs yet.  `title` names the process in log lines; the pauses go from `first_s` to `most_s`."""
        self.title = title
        self._log = log
        self._is_ending = False
        self.is_replaced = False
        """Whether this process ends because the daemon replaces it: no reason to warn of its end."""
        self._pauses = Backoff(asyncio.get_running_loop().time, first_s, most_s)

    def start(self) -> None:
        """Start the process.  Raises `OSError`, `DaemonError`; then nothing runs."""
        self._start()
        self.is_started, self.is_replaced = True, False
        self._pauses.started()

    def _adopt(self, pid: int) -> None:
        """Go on with an earlier daemon's process.  Raises `ProcessLookupError` if it has ended."""
        self.child = Child(pid)
        self.is_started = True
        self._pauses.started()

    async def start_surely(self) -> None:
        """Start the process as soon as there is room for it; until then each reason is logged once."""
        await start_surely(self.title, self.start, self._pauses, self._log)

    async def keep_running(self) -> None:
        """Start the process again whenever it ends, until `let_end` or a cancellation."""
        while True:
            await self._wait_for_end()
            if self._is_ending:
                return
            async with self._interval():
                pause_s = self._pauses.ended()
                await self._clear_away(pause_s)
                await asyncio.sleep(pause_s)
                await self.prepare()
                if self._is_ending:
                    return
                is_started = self._try_start()
            if not is_started:
                await self.start_surely()
            self._on_restart()

    async def prepare(self) -> None:
        """What may take a while before a first attempt to start; nothing by default.  Raises nothing."""
        return

    def _try_start(self) -> bool:
        try:
            self.start()
        except (DaemonError, OSError):
            return False
        return True

    async def replace(self, patience_s: float) -> None:
        """End this process, so that one of today's code follows; return at its end."""
        self.is_replaced = True
        await self.child.end(patience_s)

    def let_end(self) -> None:
        """From now on an end is final: the process is not started again, and nothing is logged."""
        self._is_ending = True

    @abstractmethod
    def _start(self) -> None:
        """Fork the process and set `child`.  Raises `OSError`, `DaemonError`; then nothing is left behind."""

    async def _wait_for_end(self) -> None:
        """Return when the process must be replaced."""
        await self.child.wait()

    def _interval(self) -> AbstractAsyncContextManager[object]:
        """Held from an end to the first attempt to start again; further attempts are made without it."""
        return nullcontext()

    @abstractmethod
    async def _clear_away(self, pause_s: float) -> None:
        """Log the end, and close what belonged to the process; the next start is tried after `pause_s`."""

    def _on_restart(self) -> None:
        """A new process runs: give it the state that the one before had."""
        return
