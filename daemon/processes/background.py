"""Owners of tasks and of steps that may fail: no failure goes unlogged.

A `Background` owns the tasks of an object; `beside.py` owns a task for the length of a block.  The daemon makes tasks
nowhere else.  Runs on the supervisor's asyncio loop.
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
    """The tasks of one object, such as a device or a backend's connection."""

    def __init__(self, name: str) -> None:
        """Every logged line begins with `name`; for a device's tasks it is the device's name."""
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run `work` in a task; a failure is logged."""
        return owned(self._name, self.spawn_awaited(work))

    def spawn_awaited(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run `work` in a task whose failure the caller awaits: it is not logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    @property
    def tasks(self) -> "frozenset[asyncio.Task[Any]]":
        """The tasks that have not ended."""
        return frozenset(self._tasks)

    def cancel(self) -> None:
        """Cancel all tasks but the one that calls this."""
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        _retrieve(task)


def owned(what: str, task: "asyncio.Task[T]") -> "asyncio.Task[T]":
    """The task; a failure is logged as that of `what`.

    asyncio itself reports the failure of a task that is not awaited only when the task is collected.
    """

    def finished(ended: "asyncio.Task[T]") -> None:
        if not ended.cancelled() and (error := ended.exception()) is not None:
            _log.error("%s: %s", what, without_name(what, one_line(error)), exc_info=error)

    task.add_done_callback(finished)
    return task


def _retrieve(task: "asyncio.Task[Any]") -> None:
    """Mark the exception as seen: the awaiting caller may have gone, and asyncio would log it as never retrieved."""
    if not task.cancelled():
        task.exception()


@contextmanager
def logged(name: str) -> Iterator[None]:
    """Log the failure of a step instead of raising it, so that the next step is tried; `name` begins the line."""
    try:
        yield
    except (DaemonError, PoolError, OSError) as error:
        _log.error("%s: %s", name, without_name(name, one_line(error)))
