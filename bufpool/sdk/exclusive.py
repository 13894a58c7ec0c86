"""Which requests may run at the same time: no two that touch the same chunk (`Backend.exclusive_bytes`).

Owns the requests that run or wait for chunks.  A request waits for every earlier one that shares a chunk with it,
whether that one runs or waits itself, and takes all its chunks at once.  So requests for a chunk run in order of
arrival, a large request is not overtaken by small ones, and no two requests wait for each other.

Any thread may call; one lock covers all.
"""

import threading

from ublkpool.bufpool.sdk.requests import Request


class Turn:
    """One request's place in the order, for `Gate.leave`."""

    __slots__ = ("first", "followers", "last", "request", "runs_at_once", "waits")

    def __init__(self, request: Request, first: int, last: int) -> None:
        self.request = request
        self.first, self.last = first, last
        self.waits = 0
        """How many earlier requests must leave before this one may run."""
        self.runs_at_once = True
        """Whether none was there at its arrival: otherwise `Gate.leave` returns it, perhaps before `arrive` returns."""
        self.followers: list[Turn] = []


class Gate:
    """Lets requests pass in order of arrival, those that share a chunk one after the other."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._present: dict[Turn, None] = {}

    def arrive(self, request: Request) -> Turn:
        """Note a request; its turn says whether it runs at once, else it runs when `leave` returns its turn.

        A FLUSH has a length of 0, touches no chunk and never waits.
        """
        first = request.offset // self._chunk_bytes
        last = (request.offset + request.length - 1) // self._chunk_bytes if request.length else first - 1
        turn = Turn(request, first, last)
        if last < first:
            return turn
        with self._lock:
            for other in self._present:
                if other.first <= last and first <= other.last:
                    other.followers.append(turn)
                    turn.waits += 1
            self._present[turn] = None
            turn.runs_at_once = turn.waits == 0
        return turn

    def leave(self, turn: Turn) -> list[Turn]:
        """Note that a request has ended; returns those that may run now, in order of arrival."""
        with self._lock:
            self._present.pop(turn, None)
            for follower in turn.followers:
                follower.waits -= 1
            return [each for each in turn.followers if each.waits == 0]
