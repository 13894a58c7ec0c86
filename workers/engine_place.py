"""The place of an engine in the worker, where a queue with a backend's process has its doors.

Owns what every such engine has in common: no backend attaches, and nothing of it waits at a socket.
"""

from collections.abc import Callable

from ublkpool.bufpool.wire import Grown, Resized
from ublkpool.ublk.queue import IoUring, Queue


class EnginePlace:
    """One queue's engine, or the place for one."""

    needs_looks = False
    """Everything that comes is watched."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def serve_on(self, ring: IoUring) -> None:
        """Use this io_uring.  Raises `OSError`."""
        raise NotImplementedError

    @property
    def token(self) -> str:
        """Empty: no backend is expected."""
        return ""

    @property
    def is_excluded(self) -> bool:
        """Whether another client has taken the store over."""
        return False

    def failure(self) -> str:
        """Why the queue has cut the engine off."""
        return self._queue.violation()

    def connect(self, done: Callable[[str, str], None], grown: Callable[[Resized | Grown], None]) -> None:
        """Only a store that is a connection is connected to."""
        done("", "this worker's store is no connection")

    def serve(self) -> None:
        """Nothing: it serves from the start."""

    def expect(self, token: bytes, user: int | None = None) -> None:
        """Raise `OSError`: no backend can attach."""
        if token:
            raise OSError("the workers run the device's engine themselves")

    def resize(self, size_bytes: int) -> None:
        """Nothing: there is no store that grows."""

    def grow(self, size_bytes: int) -> None:
        """Nothing: the daemon has a store that is no connection grow in a process of its own, see `resize`."""

    def take_places(self) -> None:
        """Nothing: no backend comes."""

    def turn(self, bits: int) -> bool:
        """Nothing: the queue's io_uring serves the engine."""
        return False

    def leave(self) -> None:
        """Nothing: the process's end does what is to be done."""

    def close(self) -> None:
        """Nothing is open."""
