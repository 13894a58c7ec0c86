"""ZeroMQ in a simulation: sockets in memory that lose only what a dead process had in flight.

`Life` is what all of a simulated process's effects pass through, so that it can be killed between any two of them.
"""

import random
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import zmq

from ublkpool.workers.backend_link import BackendLink

_AGAIN = zmq.Again()
"""Made once, since it is raised very often."""


class Killed(BaseException):
    """The process has died in the middle of a step; none of its own handlers may catch this."""


class Life:
    """A process, alive until `effect` raises."""

    def __init__(self) -> None:
        self.alive = True
        self._effects_left: int | None = None

    def die_after(self, effects: int) -> None:
        """Die at the effect after this many more."""
        self._effects_left = effects

    def effect(self) -> None:
        """An effect that other processes can see is about to happen.  Raises `Killed`."""
        if self._effects_left is not None:
            if self._effects_left <= 0:
                raise Killed
            self._effects_left -= 1


def lose_front(messages: "deque[Any]", rng: random.Random) -> None:
    """Lose the messages that had left the dead process's peer; the others wait for the successor."""
    for _ in range(rng.randint(0, len(messages))):
        messages.popleft()


def lose_back(messages: "deque[Any]", rng: random.Random) -> None:
    """Lose some of the dead process's last messages, which may not have left it."""
    for _ in range(rng.randint(0, len(messages))):
        messages.pop()


class PoolDealer:
    """A worker's end of the conversation with the broker."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.routing_id = b""
        self.connected = False
        self.inbox: deque[list[bytes]] = deque()
        self.outbox: deque[list[bytes]] = deque()

    def set(self, option: int, value: Any) -> None:
        if option == zmq.ROUTING_ID:
            self.routing_id = value

    def get(self, _option: int) -> int:
        return -1

    def connect(self, _endpoint: str) -> None:
        """The simulation decides when it is."""

    def recv_multipart(self, _flags: int) -> list[bytes]:
        if not self.inbox:
            raise _AGAIN.with_traceback(None)
        return self.inbox.popleft()

    def send_multipart(self, frames: Sequence[bytes], _flags: int) -> None:
        self.life.effect()
        self.outbox.append(list(frames))

    def close(self) -> None:
        """Nothing is open."""


class BrokerRouter:
    """The broker's end: connected to workers that live, or are not yet seen to be dead."""

    def __init__(self, life: Life, dealers: "list[PoolDealer]") -> None:
        self._life, self._dealers = life, dealers

    def recv_multipart(self, _flags: int) -> list[bytes]:
        for each in self._dealers:
            if each.connected and each.outbox:
                return [each.routing_id, *each.outbox.popleft()]
        raise _AGAIN.with_traceback(None)

    def send_multipart(self, message: Sequence[bytes], _flags: int) -> None:
        self._life.effect()
        routing_id, *frames = message
        for each in self._dealers:
            if each.connected and each.life.alive and each.routing_id == routing_id:
                each.inbox.append(frames)
                return
        raise zmq.ZMQError(zmq.EHOSTUNREACH)


class Peer(Protocol):
    """A backend's end of a queue's link."""

    token: bytes
    inbox: list[deque[bytes]]
    outbox: list[deque[bytes]]


class Part:
    """A message's part as ZeroMQ hands it out uncopied; all come over one connection."""

    def __init__(self, data: bytes) -> None:
        self.bytes = self.buffer = data

    def get(self, _option: int) -> int:
        return 1


class Silent:
    """A socket over which nothing ever comes: access control and the end of connections are not simulated."""

    def set(self, _option: int, _value: Any) -> None:
        """Limits are not simulated."""

    def get(self, _option: int) -> int:
        return -1

    def bind(self, _endpoint: str) -> None:
        """Not used in a simulation."""

    def recv_multipart(self, _flags: int) -> list[bytes]:
        raise _AGAIN.with_traceback(None)

    def close(self) -> None:
        """Nothing is open."""


class QueueRouter:
    """A worker's end of the link to backends: one peer is enough."""

    def __init__(self, queue: int, epoch: int, life: Life) -> None:
        self._queue, self.epoch, self._life = queue, epoch, life
        self.peer: Peer | None = None

    def set(self, _option: int, _value: Any) -> None:
        """Limits are not simulated."""

    def get(self, _option: int) -> int:
        return -1

    def get_monitor_socket(self, _events: int) -> Silent:
        return Silent()

    def disable_monitor(self) -> None:
        """The monitor has nothing to report."""

    def recv_multipart(self, _flags: int, copy: bool = True) -> list[Part]:
        assert not copy
        if self.peer is None or not self.peer.outbox[self._queue]:
            raise _AGAIN.with_traceback(None)
        return [Part(self.peer.token), Part(self.peer.outbox[self._queue].popleft())]

    def send_multipart(self, message: Sequence[bytes], _flags: int) -> None:
        self._life.effect()
        token, frame = message
        if self.peer is None or self.peer.token != token:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self.peer.inbox[self._queue].append(frame)

    def close(self) -> None:
        """Nothing is open."""


class Context:
    """Makes a worker's sockets."""

    def __init__(self, queue: int, epoch: int, life: Life) -> None:
        self.pool = PoolDealer(life)
        self.backend = QueueRouter(queue, epoch, life)

    def socket(self, kind: int) -> Any:
        if kind == zmq.REP:
            return Silent()
        return self.pool if kind == zmq.DEALER else self.backend


class SimBackendLink(BackendLink):
    """The real one, without a name in the file system."""

    def _bind(self) -> None:
        self._bound = True

    @property
    def is_bound(self) -> bool:
        return self._bound
