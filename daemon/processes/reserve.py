"""Descriptors kept in reserve: a daemon that has reached its limit can still clean up what it has begun.

Owns how many are kept, and when they are closed and opened again.  Runs on the supervisor's asyncio loop.
"""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

DESCRIPTORS = 6
"""The start of a control command's process needs five; further commands wait until one has ended."""
T = TypeVar("T")


_limit_before: list[tuple[int, int]] = []
"""The limit on open files as the daemon was started with it."""


def raise_descriptor_limit() -> None:
    """Let this process and its children open as many files as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _limit_before[:] = [(soft, hard)]
    # Kept where it is if the kernel allows no more: then shortages are waited out.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def restore_descriptor_limit() -> None:
    """In a child that becomes another program: the limit as it was, since `select` fails above 1024 descriptors."""
    for limit in _limit_before:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


class Reserve:
    """Open descriptors of /dev/null, which are closed when others are needed."""

    def __init__(self, count: int = DESCRIPTORS) -> None:
        self._count = count
        self._users = 0
        self._held: list[int] = []
        self._take()

    def refill(self) -> None:
        """Open again what could not be opened after the last use."""
        if not self._users:
            self._take()

    def close(self) -> None:
        """Close all of them, for good."""
        self._count = 0
        self._let_go()

    @contextmanager
    def released(self) -> Iterator[None]:
        """During the block the reserve is closed, so that others can be opened."""
        self._users += 1
        self._let_go()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._take()

    def _let_go(self) -> None:
        for fd in self._held:
            os.close(fd)
        self._held.clear()

    def _take(self) -> None:
        # As many as the limit allows: `refill` and the next use try again.
        with suppress(OSError):
            while len(self._held) < self._count:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def with_room_for_one(call: Callable[[], T]) -> Callable[[], T]:
    """`call`, during which one descriptor is reserved, for the pidfd of the child that it forks.

    Raises `OSError`, before `call` runs, if no descriptor is left.
    """

    def run() -> T:
        place = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return call()
        finally:
            os.close(place)

    return run
