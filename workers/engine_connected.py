"""A native engine inside the worker whose store is a connection: an image of a cluster.

Owns the connection, and the thread that makes it: a cluster may keep that waiting for any time, and has threads of its
own.  The worker forks no more, and its own thread calls nothing that waits for the cluster.  The queue gets its link
only at the supervisor's word, which has the name under which the store is locked on record then; until that its
requests wait.  A store that is lost ends the worker; one that has grown is served up to its new end, and the supervisor
is told.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ublkpool.bufpool.engine.device import Device
from ublkpool.bufpool.engine.native import NativeEngine
from ublkpool.bufpool.errors import PoolError, StoreTaken
from ublkpool.bufpool.sdk.event_loop import EventLoop
from ublkpool.bufpool.sdk.growth import Growth
from ublkpool.bufpool.sdk.inside import Connect, ConnectsInside
from ublkpool.bufpool.way_out import explain
from ublkpool.bufpool.wire import Grown, Resized
from ublkpool.ublk.queue import WATCH_SHIFT, IoUring, Queue
from ublkpool.workers.engine_inside import EngineSpec, device_of, link
from ublkpool.workers.engine_place import EnginePlace

_WATCH_BELL, _WATCH_ALARM = 2, 3
"""In the place of `BackendDoors`' watches."""
_BELL, _ALARM = 1 << WATCH_SHIFT + _WATCH_BELL, 1 << WATCH_SHIFT + _WATCH_ALARM


class _Outcome(NamedTuple):
    """Of the attempt to connect: the name under which the store is locked, or why it is not."""

    owner: str
    reason: str


class EngineConnected(EnginePlace):
    """The engine of a device's one queue."""

    def __init__(self, spec: EngineSpec, name: str, queue: Queue, pool: memoryview) -> None:
        """Nothing is connected yet."""
        super().__init__(queue)
        assert isinstance(spec.storage, Connect)
        self._connect = spec.storage
        self._device: Device = replace(
            device_of(spec, name, queue, pool),
            generation=spec.storage.generation,
            watch=self._watch,
            resized=self._announce,
        )
        self._ring: IoUring | None = None
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """The thread has an outcome."""
        self._outcome: _Outcome | None = None
        self._done: Callable[[str, str], None] | None = None
        self._grown: Callable[[Resized | Grown], None] | None = None
        self._growth: Growth | None = None
        self._closing = threading.Lock()
        """Taken to ring the bell from threads that may outlive this object, and to close it."""
        self._is_closed = False
        self._backend: ConnectsInside | None = None
        self._engine: NativeEngine | None = None
        self._alarm: tuple[int, Callable[[], None]] | None = None

    def serve_on(self, ring: IoUring) -> None:
        """Use this io_uring, once there is a connection."""
        self._ring = ring
        ring.watch(_WATCH_BELL, self._bell)

    def connect(self, done: Callable[[str, str], None], grown: Callable[[Resized | Grown], None]) -> None:
        """Connect, once; then `done` is called with the name under which the store is locked, or "" and the reason.

        From then on `grown` is called with the answer to each `grow`, and whenever the store has grown by itself.
        """
        if self._done is not None:
            done("", "this worker connects already")
            return
        self._done, self._grown = done, grown
        # A descriptor of its own, because the thread may outlive this object.
        bell = os.dup(self._bell)
        threading.Thread(target=self._run, args=(bell,), name="ublkpool-connect", daemon=True).start()

    def _run(self, bell: int) -> None:
        """On a thread of its own, whose threads are not bound to the queue's CPU."""
        try:
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
            self._backend = backend = self._connect.backend()
            self._growth = Growth(backend, EventLoop(), self._ring_bell)
            owner = backend.connect(self._connect.hint).owner
            backend.started(self._device)
            self._outcome = _Outcome(owner, "")
        except Exception as error:
            self._outcome = _Outcome("", _reason(error))
        os.eventfd_write(bell, 1)
        os.close(bell)

    def _watch(self, fd: int, callback: Callable[[], None]) -> None:
        """On that thread, before the outcome; one descriptor at most."""
        self._alarm = fd, callback

    def _announce(self, size_bytes: int) -> None:
        """See `Device.resized`; on any thread."""
        assert self._growth is not None
        self._growth.announce(size_bytes)

    def _ring_bell(self) -> None:
        with self._closing:
            if not self._is_closed:
                os.eventfd_write(self._bell, 1)

    # On the loop's thread.

    def serve(self) -> None:
        """Answer from now on.  Raises `BackendError`, `OSError`."""
        assert self._backend is not None and self._ring is not None and self._engine is None
        self._engine = self._backend.engine(self._device)
        self._ring.use_engine(*self._engine.addresses)
        if self._alarm is not None:
            self._ring.watch(_WATCH_ALARM, self._alarm[0])
        link(self._queue)
        self._tell_growth()

    def failure(self) -> str:
        """Why the queue has cut the engine off."""
        return (self._engine.failure if self._engine is not None else "") or super().failure()

    @property
    def is_excluded(self) -> bool:
        """Whether another client has taken the store over."""
        return self._engine is not None and isinstance(self._engine.failed_by, StoreTaken)

    def grow(self, size_bytes: int) -> None:
        """Have the store grow, on a thread of its own; `grown` has the answer, which a cluster may delay."""
        if self._engine is None or self._growth is None:
            self._tell(
                Resized(size_bytes=size_bytes, reason="the worker does not serve its store yet: try again")
            )
            return
        self._growth.begin(size_bytes)

    def turn(self, bits: int) -> bool:
        """Handle what the watches in `bits` announce.  Raises `BackendError` if the store is lost."""
        if bits & _BELL:
            os.eventfd_read(self._bell)
            self._tell_outcome()
            self._tell_growth()
        if bits & _ALARM and self._alarm is not None:
            self._alarm[1]()
        return False

    def _tell_outcome(self) -> None:
        assert self._done is not None
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            self._done(*outcome)

    def _tell_growth(self) -> None:
        """Serve up to the size that the store has by now, then tell the supervisor; not before the store is served."""
        if self._engine is None or self._growth is None:
            return
        for news in self._growth.news():
            has_grown = isinstance(news, Grown) or not news.reason
            if has_grown and news.size_bytes > self._device.size_bytes:
                self._engine.resize(news.size_bytes)
                # Frozen for its users only.
                object.__setattr__(self._device, "size_bytes", news.size_bytes)
            self._tell(news)

    def _tell(self, news: Resized | Grown) -> None:
        if self._grown is not None:
            self._grown(news)

    def leave(self) -> None:
        """The last request is answered: give the lock back; without an answer soon the process's end does that."""
        if self._growth is not None and self._growth.is_busy:
            # Its thread uses the image.
            return
        if self._engine is not None and self._backend is not None:
            self._backend.close()

    def close(self) -> None:
        """Close the engine; the io_uring that it uses must not run any more."""
        self.leave()
        if self._engine is not None:
            self._engine.close()
        with self._closing:
            self._is_closed = True
            os.close(self._bell)


def _reason(error: Exception) -> str:
    if isinstance(error, PoolError):
        return str(error)
    return explain(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
