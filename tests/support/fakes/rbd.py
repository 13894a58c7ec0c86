"""A fake librbd for the native engine: an image in a bytearray, answered at once or when the test says so."""

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from ublkpool.bufpool.engine._engine import ffi
from ublkpool.bufpool.engine.native import NativeEngine, RbdStorage
from ublkpool.bufpool.sdk.backend import Backend, Device, FrameEngine, Hint, Properties


class Call(NamedTuple):
    """A request that librbd was given."""

    name: str
    offset: int
    length: int
    memory: int
    flags: int
    completion: int


class FakeRbd:
    """Functions that the engine may call; answers come from a thread of its own, as librbd's do."""

    def __init__(self, size_bytes: int) -> None:
        self.disk = bytearray(size_bytes)
        self.calls: list[Call] = []
        self.holds = False
        """Whether requests wait for `answer`."""
        self.results: dict[str, int] = {}
        """What a call of this name results in, instead of its success."""
        self.refuses: dict[str, int] = {}
        """Errors that a call of this name returns at once."""
        self.released: list[int] = []
        self._done: dict[int, tuple[Any, Any]] = {}
        self._results: dict[int, int] = {}
        self._numbers = itertools.count(1)
        self._answers: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._callbacks = self._make_callbacks()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def storage(self) -> RbdStorage:
        """The storage for an engine."""
        addresses = {name: int(ffi.cast("uintptr_t", each)) for name, each in self._callbacks.items()}
        return RbdStorage(1, addresses)

    def close(self) -> None:
        """End the thread, after all answers that are due."""
        self._answers.put(None)
        self._thread.join()

    @property
    def names(self) -> list[str]:
        """The names of the calls so far."""
        return [each.name for each in self.calls]

    def answer(self, call: Call) -> None:
        """Execute and answer a call that waits."""
        self._answers.put(lambda: self._execute(call))

    def settle(self) -> None:
        """Return when every answer that is due was given."""
        done = threading.Event()
        self._answers.put(done.set)
        assert done.wait(60)

    def _run(self) -> None:
        while (answer := self._answers.get()) is not None:
            answer()

    def _execute(self, call: Call) -> None:
        result = self.results.get(call.name)
        if result is None:
            result = self._perform(call)
        self._results[call.completion] = result
        arg, done = self._done.pop(call.completion)
        done(ffi.cast("void *", call.completion), arg)

    def _perform(self, call: Call) -> int:
        part = slice(call.offset, call.offset + call.length)
        if call.name == "read":
            ffi.buffer(ffi.cast("char *", call.memory), call.length)[:] = bytes(self.disk[part])
            return call.length
        if call.name == "write":
            self.disk[part] = ffi.buffer(ffi.cast("char *", call.memory), call.length)[:]
        elif call.name in ("discard", "write_zeroes"):
            self.disk[part] = bytes(call.length)
        return 0

    def _take(
        self, name: str, completion: Any, offset: int = 0, length: int = 0, memory: Any = 0, flags: int = 0
    ) -> int:
        if error := self.refuses.get(name, 0):
            return error
        where = int(ffi.cast("uintptr_t", memory)) if memory else 0
        call = Call(name, offset, length, where, flags, int(ffi.cast("uintptr_t", completion)))
        self.calls.append(call)
        if not self.holds:
            self.answer(call)
        return 0

    def _make_callbacks(self) -> dict[str, Any]:
        def create(arg: Any, done: Any, out: Any) -> int:
            number = next(self._numbers)
            self._done[number] = (arg, done)
            out[0] = ffi.cast("void *", number)
            return 0

        functions: dict[str, Callable[..., Any]] = {
            "create_completion": create,
            "get_return_value": lambda c: self._results[int(ffi.cast("uintptr_t", c))],
            "release": lambda c: self.released.append(int(ffi.cast("uintptr_t", c))),
            "read": lambda _, at, n, memory, c: self._take("read", c, at, n, memory),
            "write": lambda _, at, n, memory, c: self._take("write", c, at, n, memory),
            "flush": lambda _, c: self._take("flush", c),
            "discard": lambda _, at, n, c: self._take("discard", c, at, n),
            "write_zeroes": lambda _, at, n, c, zero, op: self._take("write_zeroes", c, at, n, 0, zero),
        }
        types = dict(ffi.typeof("struct rbd_calls").fields)
        return {name: ffi.callback(types[name].type, each) for name, each in functions.items()}


class FakeRbdBackend(Backend):
    """Serves a fake image with the native engine."""

    def __init__(self, rbd: FakeRbd) -> None:
        super().__init__()
        self.rbd = rbd

    def open(self, hint: Hint) -> Properties:
        """See `Backend.open`."""
        return Properties(
            size_bytes=len(self.rbd.disk),
            volatile_cache=True,
            placement=hint.placement,
            segment_bytes=1 << 20 if hint.placement == "backend" else 0,
        )

    def engine(self, device: Device) -> FrameEngine:
        """See `Backend.engine`."""
        return NativeEngine(device, self.rbd.storage())
