"""The asyncio loop of a backend with `async def` methods.

Owns the loop and its thread.  Until `start`, that is until the device is attached, the loop runs on the caller's thread
and only while `settle` waits for a coroutine: a process may have no second thread while it may still fork.  From then
on the loop has a thread of its own.  The SDK's loop does not drive it, for three reasons: over rings the SDK waits in C
code, which knows no asyncio; asyncio has no public interface that lets another loop drive it with its timers; and a
coroutine that computes or blocks must not delay fences and other queues.  The price is two changes of threads for each
request.

`asyncio` is imported at the first coroutine: it loads TLS, some megabytes that other backends do without.
"""

import inspect
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

log = logging.getLogger("ublkpool.backend")

_STOP_S = 5.0
"""How long a coroutine that never yields, or a task that does not end when it is cancelled, may hold up the end."""


class EventLoop:
    """Runs coroutines; without any it costs nothing."""

    def __init__(self) -> None:
        self._loop: AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ends = False

    def settle(self, value: Any) -> Any:
        """The value itself, or the result of the coroutine that it is.  Raises what the coroutine raises.

        Not for the loop's own thread.
        """
        if not inspect.isawaitable(value):
            return value
        loop, awaited = self._made(), _awaited(value)
        if self._thread is None:
            result, error = loop.run_until_complete(awaited)
        else:
            from asyncio import run_coroutine_threadsafe

            result, error = run_coroutine_threadsafe(awaited, loop).result()
        if error is not None:
            raise error
        return result

    def start(self, needed: bool) -> None:
        """Start the thread if a coroutine ran before or if `needed` says that some will."""
        if not needed and self._loop is None:
            return
        self._thread = threading.Thread(
            target=self._run, args=(self._made(),), name="ublkpool-asyncio", daemon=True
        )
        self._thread.start()

    def post(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Call a function on the loop's thread, soon.  Thread-safe; after `start`."""
        self._made().call_soon_threadsafe(callback, *arguments)

    def _made(self) -> "AbstractEventLoop":
        if self._loop is None:
            import asyncio

            self._loop = asyncio.new_event_loop()
        return self._loop

    def _run(self, loop: "AbstractEventLoop") -> None:
        while not self._ends:
            try:
                loop.run_forever()
            except BaseException:
                # SystemExit in a task of the author's ends `run_forever`; requests are still executing.
                log.exception("a task ended the asyncio loop: it goes on")

    def close(self) -> None:
        """End the thread, cancel the author's remaining tasks, close the loop."""
        loop, thread = self._loop, self._thread
        if loop is None:
            return
        if thread is not None:
            self._ends = True
            loop.call_soon_threadsafe(loop.stop)
            thread.join(_STOP_S)
            if thread.is_alive():
                log.error("a coroutine blocks the asyncio loop: its thread ends with the process")
                return
        loop.run_until_complete(_end_tasks())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _end_tasks() -> None:
    """Cancel the author's tasks, and wait for them, but not for ever."""
    import asyncio

    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_STOP_S)


async def _awaited(value: Any) -> tuple[Any, BaseException | None]:
    # An exception that passes through asyncio has a traceback that begins there, not with the author's code.
    try:
        return await value, None
    except BaseException as error:
        return None, error
