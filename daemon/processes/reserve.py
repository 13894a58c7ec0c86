"""Descriptors that are kept open, so that there are some when a limit is reached: what is begun must be cleaned up.

Owns how many, and when they are let go and taken again.  Runs on the supervisor's asyncio loop.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

DESCRIPTORS = 4
"""A control command needs three, and commands that find none wait for each other."""
T = TypeVar("T")


class Reserve:
    """Descriptors of /dev/null, in place of which others can be opened."""

    def __init__(self, count: int = DESCRIPTORS) -> None:
        self._count = count
        self._users = 0
        self._held: list[int] = []
        self._take()

    def refill(self) -> None:
        """Take what could not be taken after the last use."""
        if not self._users:
            self._take()

    def close(self) -> None:
        """Let go of all of them, for good."""
        self._count = 0
        self._let_go()

    @contextmanager
    def released(self) -> Iterator[None]:
        """For the length of a block there are descriptors to be had."""
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
        # As many as there are: the rest comes with the next use, when others have been closed.
        with suppress(OSError):
            while len(self._held) < self._count:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def with_room_for_one(call: Callable[[], T]) -> Callable[[], T]:
    """`call`, with a descriptor number set aside first that is free again when it returns: the pidfd of a new child.

    Raises `OSError` before anything was done if there is none.
    """

    def run() -> T:
        place = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return call()
        finally:
            os.close(place)

    return run
