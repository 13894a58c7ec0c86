"""Who may connect to a queue: the user of the backend that is expected, and nobody while none is.

Owns ZeroMQ's question about every new connection (ZAP, RFC 27) within one context.  A user's credentials come from the
kernel, and a connection that is refused never gets as far as a frame: so no stranger can fill a worker's memory.
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
        """Let this user in and no other; None: nobody."""
        self._user = user

    def turn(self) -> bool:
        """Answer the questions that are there; whether there are more."""
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
    """The user at the other end of a unix socket, from libzmq's `HOST:UID:GID:PID`; None if it does not say."""
    parts = address.split(b":")
    return int(parts[-3]) if len(parts) >= 4 and parts[-3].isdigit() else None
