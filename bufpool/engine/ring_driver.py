"""The Python side of the C loop that drives a native engine over rings (`csrc/ring_loop.h`).

Owns the native loop and its io_uring.  Runs on the thread that made it.
"""

import errno
from collections.abc import Callable
from typing import Any

import msgspec

from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.bufpool.engine.native import engine_failure
from ublkpool.bufpool.errors import BackendError, WireError
from ublkpool.bufpool.way_out import why_no_ring

_WATCHED, _CALLS = int(lib.RING_LOOP_WATCHED), int(lib.RING_LOOP_CALLS)


def nothing_to_serve() -> None:
    """For engines that hand out no batches."""


class DriverStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of the C loop."""

    turns: int
    calls: int
    """System calls that it made."""
    bells: int
    """Doorbells rung for workers."""


class RingDriver:
    """Moves descriptors between rings and an engine, until something needs Python."""

    def __init__(
        self,
        ports: Any,
        engine: Any,
        queues: int,
        depth: int,
        watched: int,
        serve: Callable[[], None] = nothing_to_serve,
    ) -> None:
        """`watched`: the file descriptor whose events need Python; `serve` executes a batch that the engine hands out.

        Raises `BackendError` without io_uring or memory.
        """
        self._serve = serve
        error = ffi.new("int *")
        self._loop = lib.ring_loop_new(ports, engine, queues, depth, watched, error)
        if self._loop == ffi.NULL:
            raise BackendError(f"no ring loop: {why_no_ring(-error[0])}")

    def spin(self, most_us: int) -> None:
        """Poll the rings for at most this many microseconds before sleeping."""
        lib.ring_loop_spin(self._loop, most_us)

    def bells(self, queue: int, ours: int, workers: int) -> None:
        """Set a queue's doorbells; set -1 and -1 before they are closed."""
        lib.ring_loop_bells(self._loop, queue, ours, workers)

    def run(self, timeout_ms: int, hears: bool) -> bool:
        """Serve for at most `timeout_ms` (-1: for ever) or until `watched` is readable; returns whether it is.

        Returns early for a signal.  Without `hears` no request is taken, and it returns when none is executing.  Raises
        `WireError` if a worker sends what the protocol does not allow, `BackendError` if the store became shorter than
        the device, `OSError` if io_uring fails.
        """
        result = lib.ring_loop_run(self._loop, timeout_ms, hears)
        while result >= _CALLS:
            self._serve()
            # The next run sends the answers.  Return here, so that a queue that is never idle delays no deadline.
            if result != _CALLS or timeout_ms >= 0:
                return bool(result & _WATCHED)
            result = lib.ring_loop_run(self._loop, timeout_ms, hears)
        if result == -errno.EPROTO:
            raise WireError(
                f"queue {lib.ring_loop_wrong(self._loop)}: the worker sent what the protocol does not allow"
            )
        if result < 0 and result != -errno.EINTR:
            raise engine_failure(-result)
        return result > 0

    def settle(self, timeout_ms: int) -> None:
        """Send the answers for which a ring had no room, for at most `timeout_ms`; the rest is dropped."""
        lib.ring_loop_settle(self._loop, timeout_ms)

    def statistics(self) -> DriverStatistics:
        """Counters since it was made."""
        counted = ffi.new("struct ring_loop_statistics *")
        lib.ring_loop_count(self._loop, counted)
        names = DriverStatistics.__struct_fields__
        return DriverStatistics(**{name: int(getattr(counted, name)) for name in names})

    def close(self) -> None:
        """End it; the engine can be closed afterwards, not before."""
        lib.ring_loop_free(self._loop)
