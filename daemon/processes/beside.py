"""Runs a task beside a block of code, and ends it with the block.

Owns that such a task outlives nothing and hides no failure.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from ublkpool.daemon.errors import one_line

T = TypeVar("T")
_log = logging.getLogger("ublkpool.device")


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, T]) -> AsyncIterator["asyncio.Task[T]"]:
    """Run `work` while the block runs; at the block's end the task is cancelled, and has ended.

    The task's own failure is raised at the block's end, unless the block raises: then it is logged.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        yield task
    except BaseException as raised:
        error = await _end(task)
        if error is not None and error is not raised:
            _log.warning("%s", one_line(error), exc_info=error)
        raise
    else:
        if (error := await _end(task)) is not None:
            raise error


async def _end(task: "asyncio.Task[Any]") -> BaseException | None:
    """What the task failed with before it was cancelled."""
    task.cancel()
    await asyncio.wait({task})
    return None if task.cancelled() else task.exception()
