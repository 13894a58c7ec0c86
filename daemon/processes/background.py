"""What a device does without anybody waiting for it: tasks, and steps that may fail.

Owns that no failure of theirs goes unsaid.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon.errors import DaemonError, one_line, without_name

T = TypeVar("T")
_log = logging.getLogger("ublkpool.device")


class Background:
    """The tasks of one device."""

    def __init__(self, name: str) -> None:
        """`name` is the device's, for the log."""
        self._name = name
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run it beside everything else; a failure is logged."""
        task = self.spawn_awaited(work)
        task.add_done_callback(self._log_failure)
        return task

    def spawn_awaited(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """The same, for work whose failure its caller awaits: it is not logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def cancel(self) -> None:
        """Cancel all tasks but the one that calls this."""
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        # The caller may have gone: asyncio would complain that the exception was never retrieved.
        if not task.cancelled():
            task.exception()

    def _log_failure(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s: %s", self._name, without_name(self._name, one_line(error)), exc_info=error)


def owned(what: str, task: "asyncio.Future[T]") -> "asyncio.Future[T]":
    """The task, whose failure is logged as that of `what`: asyncio tells late of a task that is not awaited."""

    def finished(ended: "asyncio.Future[T]") -> None:
        if not ended.cancelled() and (error := ended.exception()) is not None:
            _log.error("%s: %s", what, without_name(what, one_line(error)), exc_info=error)

    task.add_done_callback(finished)
    return task


@contextmanager
def logged(name: str) -> Iterator[None]:
    """Log a failure of a step that must not keep the next from being tried."""
    try:
        yield
    except (DaemonError, PoolError, OSError) as error:
        _log.error("%s: %s", name, without_name(name, one_line(error)))
