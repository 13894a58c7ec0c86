"""Executes requests on several threads (`Backend.parallel`) or on an asyncio loop (`async def` methods).

Owns the threads, and the gate that keeps requests for the same chunk apart (`exclusive.py`).  If a method that serves
requests is `async def`, every request is a task of the asyncio loop, and the plain methods run on the threads, by
default on one.

A fence waits for what runs here, since the engine counts a request until it is answered.  A request that a fence
overtakes while it waits for a thread or for a chunk never begins.  The threads start after the attach, since a process
with threads must not fork, and end with the process if a method never returns.
"""

import inspect
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import SERVING, Backend, Call, Device, Request
from ublkpool.bufpool.sdk.event_loop import EventLoop
from ublkpool.bufpool.sdk.exclusive import Gate, Turn
from ublkpool.bufpool.wire import Op

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, Task

PARALLEL_MAX = 1024
_SYNCHRONOUS = ("place", "read_in_place", "released", "submit")
_END_S = 1.0


def is_async(backend: Backend) -> bool:
    """Whether a method that serves requests is `async def`."""
    found = backend.callables()
    return any(inspect.iscoroutinefunction(found.get(name)) for name in SERVING)


def check_methods(backend: Backend, name: str = "") -> None:
    """Raises `BackendError`, one line that begins with `name`, for methods and attributes that do not go together."""
    name = name or type(backend).__name__
    _check_number(name, "parallel", backend.parallel, 1, PARALLEL_MAX)
    _check_number(name, "exclusive_bytes", backend.exclusive_bytes, 0, 1 << 62)
    for method, function in backend.callables().items():
        if inspect.isasyncgenfunction(function):
            raise BackendError(f"{name}: {method} is async def with yield: it must return its result")
        if method in _SYNCHRONOUS and inspect.iscoroutinefunction(function):
            raise BackendError(f"{name}: {method} cannot be async def: the loop waits for its answer")
    concurrent = backend.parallel > 1 or is_async(backend) or backend.exclusive_bytes > 0
    own = next((each for each in ("submit", "serve_batch", "engine") if _overrides(backend, each)), None)
    if concurrent and own is not None:
        raise BackendError(
            f"{name}: parallel, exclusive_bytes and async def are for methods, "
            f"but {own} takes the requests itself: leave one of them out"
        )
    if backend.exclusive_bytes and _overrides(backend, "read_in_place"):
        raise BackendError(f"{name}: exclusive_bytes cannot hold for read_in_place: leave one of them out")


def _check_number(owner: str, name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BackendError(f"{owner}: {name} must be a whole number from {least} to {most}, not {value!r}")


def _overrides(backend: Backend, method: str) -> bool:
    return getattr(type(backend), method) is not getattr(Backend, method)


def make_runner(backend: Backend, device: Device, events: EventLoop) -> "Runner | None":
    """The runner of a backend that needs one; None if its methods are called one after the other, on the loop's thread.

    Raises `BackendError` as `check_methods`, since `open` may have set the attributes.
    """
    check_methods(backend)
    if is_async(backend):
        return AsyncRunner(backend, device, events)
    return ThreadRunner(backend, device) if backend.parallel > 1 else None


class Threads:
    """A fixed number of threads that call functions, in the order in which they were put.

    Not `concurrent.futures`: the interpreter's end waits for its threads, also for one whose method never returns.
    """

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._threads = [
            threading.Thread(target=self._run, name=f"ublkpool-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function`, which raises nothing, on one of the threads.  Thread-safe."""
        self._calls.put((function, arguments))

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, arguments = call
            function(*arguments)
            # The request's buffer is a view of the pool: it must not live until the next request.
            del call, function, arguments

    def close(self) -> None:
        """End the threads; one whose method does not return ends with the process."""
        for _ in self._threads:
            self._calls.put(None)
        deadline_s = time.monotonic() + _END_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))


class Runner:
    """What both ways have in common: the threads, the gate, the requests that never begin."""

    def __init__(self, backend: Backend, device: Device) -> None:
        self._backend = backend
        self._threads = Threads(min(backend.parallel, device.queues * device.depth))
        self._gate = Gate(backend.exclusive_bytes) if backend.exclusive_bytes else None
        self._is_old: Callable[[Request], bool] | None = None
        self._lock = threading.Lock()

    def connect(self, is_old: Callable[[Request], bool]) -> None:
        """Tell how to ask whether a fence has overtaken a request."""
        self._is_old = is_old

    def submit(self, requests: Sequence[Request]) -> None:
        """Start these, in order of arrival, as soon as a thread and their chunks are free."""
        if self._gate is None:
            turns = [Turn(each, 0, -1) for each in requests]
        else:
            turns = [each for each in map(self._gate.arrive, requests) if each.runs_at_once]
        if turns:
            self._start(turns)

    def _start(self, turns: Sequence[Turn]) -> None:
        """Execute these, each ended by `_ended`."""
        raise NotImplementedError

    def _may_begin(self, request: Request) -> bool:
        # The lock keeps the engine's memory until a thread that asks has its answer: `close` comes before the engine's.
        with self._lock:
            return self._is_old is not None and not self._is_old(request)

    def _ended(self, turn: Turn, result: Any, error: BaseException | None) -> None:
        """Answer a request that has ended, and start those that waited for its chunks."""
        request = turn.request
        if error is None:
            request.complete(result)
        else:
            request.fail(error)
        following = self._gate.leave(turn) if self._gate is not None else []
        if following:
            self._start(following)

    def close(self) -> None:
        """End the threads, and begin nothing from now on; what still executes ends with the process."""
        with self._lock:
            self._is_old = None
        self._threads.close()


class ThreadRunner(Runner):
    """Plain methods, each request on one of the threads."""

    def _start(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            self._threads.put(self._execute, turn)

    def _execute(self, turn: Turn) -> None:
        request, results = turn.request, _Results(turn.request)
        try:
            if self._may_begin(request):
                for function, arguments in self._backend.calls_of(request):
                    results.add(function(*arguments))
        except BaseException as error:
            self._ended(turn, None, error)
        else:
            self._ended(turn, results.answer, None)


class AsyncRunner(Runner):
    """Each request a task of the asyncio loop; plain methods run on the threads."""

    def __init__(self, backend: Backend, device: Device, events: EventLoop) -> None:
        super().__init__(backend, device)
        self._events = events
        self._tasks: set[Task[None]] = set()

    def _start(self, turns: Sequence[Turn]) -> None:
        self._events.post(self._begin, turns)

    def _begin(self, turns: Sequence[Turn]) -> None:
        from asyncio import get_running_loop

        loop = get_running_loop()
        for turn in turns:
            task = loop.create_task(self._execute(turn))
            self._tasks.add(task)
            task.add_done_callback(partial(self._left, turn))

    def _left(self, turn: Turn, task: "Task[None]") -> None:
        self._tasks.discard(task)
        if task.cancelled():
            # The author's code cancelled the task before its first step, so `_execute` has answered nothing.
            from asyncio import CancelledError

            self._ended(turn, None, CancelledError())

    async def _execute(self, turn: Turn) -> None:
        request, results = turn.request, _Results(turn.request)
        try:
            if self._may_begin(request):
                for call in self._backend.calls_of(request):
                    results.add(await self._call(call))
        except BaseException as error:
            self._ended(turn, None, error)
        else:
            self._ended(turn, results.answer, None)

    async def _call(self, call: Call) -> Any:
        function, arguments = call
        result = (
            function(*arguments) if inspect.iscoroutinefunction(function) else await self._on_thread(call)
        )
        return await result if inspect.isawaitable(result) else result

    async def _on_thread(self, call: Call) -> Any:
        """The result of a plain function; if the task is cancelled meanwhile, it still waits for the function's end."""
        from asyncio import CancelledError, get_running_loop, wait

        loop = get_running_loop()
        waiting: Future[_Outcome] = loop.create_future()
        self._threads.put(_call_for, loop, waiting, call)
        cancelled: CancelledError | None = None
        while not waiting.done():
            try:
                await wait([waiting])
            except CancelledError as error:
                cancelled = error
        result, failure = waiting.result()
        if cancelled or failure:
            raise cancelled or failure or AssertionError
        return result


_Outcome = tuple[Any, BaseException | None]


def _call_for(loop: "AbstractEventLoop", waiting: "Future[_Outcome]", call: Call) -> None:
    function, arguments = call
    outcome: _Outcome
    try:
        outcome = function(*arguments), None
    except BaseException as error:
        outcome = None, error
    loop.call_soon_threadsafe(waiting.set_result, outcome)


class _Results:
    """What the calls of a request returned, as far as it answers the request: the bytes that the first call moved."""

    __slots__ = ("_is_first", "answer")

    def __init__(self, request: Request) -> None:
        self._is_first = request.op <= Op.WRITE
        self.answer: Any = None

    def add(self, result: Any) -> None:
        if self._is_first:
            self.answer = result
        self._is_first = False
