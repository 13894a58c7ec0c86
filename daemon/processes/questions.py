"""Questions to another process, and which answer belongs to which, over a connection that keeps their order.

Owns the numbers of questions.  A question stays open until its answer comes, even if its deadline has passed or its
caller was cancelled; so a late answer never answers another question.  A process of an earlier version does not repeat
the number, but answers each question once and in order: such an answer belongs to the oldest open question of its kind.
Must not know the messages or the connection.
"""

import asyncio
import itertools
import secrets
from typing import Any, Generic, TypeVar

A = TypeVar("A")
FIRST_BITS = 48


class Questions(Generic[A]):
    """The open questions on one connection."""

    def __init__(self) -> None:
        # Random, because an earlier daemon's questions on the same connection may still be answered.
        self._numbers = itertools.count(1 + secrets.randbits(FIRST_BITS))
        self._open: dict[int, tuple[type[Any], asyncio.Future[A]]] = {}

    def ask(self, kind: type[Any] = object) -> tuple[int, "asyncio.Future[A]"]:
        """The number of a new question, and its answer, which is of type `kind`."""
        number = next(self._numbers)
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._open[number] = (kind, answer)
        return number, answer

    def unask(self, number: int) -> None:
        """The question was not sent."""
        self._open.pop(number, None)

    def answer(self, number: int, message: A) -> None:
        """An answer has come; `number` is 0 if it names no question."""
        _, waiting = self._open.pop(number or self._oldest(message), (None, None))
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    def _oldest(self, message: A) -> int:
        return next((number for number, (kind, _) in self._open.items() if isinstance(message, kind)), 0)
