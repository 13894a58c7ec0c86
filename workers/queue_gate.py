"""The users that may connect to a queue: the expected backend's, and none while no backend is expected.

Answers libzmq's request about every new connection (ZAP, RFC 27) within one context.  The user's credentials come from
the kernel, and a refused connection cannot send a frame: so no other user can fill a worker's memory.
"""

from collections.abc import Callable

import zmq

QUESTIONS_PER_TURN_MAX = 64
ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ACCEPTED, _REFUSED = b"200", b"400"


class QueueGate:
    """Answers for every socket of the context that has a ZAP domain.  Used by the worker's one thread; never waits."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", count_refused: Callable[[int], None]
    ) -> None:
        self._count_refused = count_refused
        self._user: int | None = None
        self.socket = context.socket(zmq.REP)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(ZAP_ENDPOINT)

    def open_for(self, user: int | None) -> None:
        """Accept this user's connections only; None: no connections."""
        self._user = user

    def turn(self) -> bool:
        """Answer pending requests, up to the turn's limit; whether that was reached."""
        for _ in range(QUESTIONS_PER_TURN_MAX):
            try:
                question = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._answer(question)
        return True

    def _answer(self, question: list[bytes]) -> None:
        version, request, _domain, address = question[:4]
        welcome = self._user is not None and user_of(address) == self._user
        if not welcome:
            self._count_refused(1)
        answer = [version, request, _ACCEPTED if welcome else _REFUSED, b"", b"", b""]
        self.socket.send_multipart(answer, zmq.NOBLOCK)


def user_of(address: bytes) -> int | None:
    """The user at the other end of a unix socket, from libzmq's `HOST:UID:GID:PID`; None in any other format."""
    parts = address.split(b":")
    return int(parts[-3]) if len(parts) >= 4 and parts[-3].isdigit() else None
