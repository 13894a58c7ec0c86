"""The worker's side of the shared-memory rings: hands them to the expected backend, and notices that it has gone.

Owns the unix socket at which the expected backend asks for a queue's rings, and the one connection whose backend has
them.  The core moves descriptors through the rings (`ublk/csrc/queue_port.c`) without Python; after its first exchange
the connection only tells its own end.  Used by the worker's one thread; never waits.
"""

import array
import os
import select
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import msgspec

from ublkpool.bufpool.wire import PROTOCOL_VERSION, OpenRing, RingOpened
from ublkpool.ublk.queue import LinkState, Port, Queue
from ublkpool.workers.credentials import credentials_of
from ublkpool.workers.listening import Place

ASKING_MAX = 8
"""Connections that have not sent their request; one more closes the oldest."""
_ACCEPTS_PER_TURN_MAX = 64
_BACKLOG = 16
_QUESTION_BYTES_MAX = 256


class PortUser(Protocol):
    """The queue's io_uring, which moves descriptors through a port: `ublk.queue.IoUring`."""

    def use_port(self, port: Port | None, bell_in: int = -1, bell_out: int = -1) -> None: ...


class Rings:
    """One backend's rings, its connection and both doorbells."""

    def __init__(self, connection: socket.socket, depth: int) -> None:
        """Raises `OSError`, `MemoryError`."""
        self.connection = connection
        with ExitStack() as made:
            self.port = Port(depth)
            made.callback(self.port.close)
            self.bell_in = _bell()
            made.callback(os.close, self.bell_in)
            # The backend shares this one and may clear its O_NONBLOCK: only io_uring writes to it.
            self.bell_out = _bell()
            made.pop_all()

    def hand_over(self) -> None:
        """Send the rings to the backend.  Raises `OSError`."""
        fds = array.array("i", [self.port.memory_fd, self.bell_out, self.bell_in])
        answer = msgspec.json.encode(RingOpened(entries=self.port.entries))
        self.connection.sendmsg([answer], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])

    def close(self) -> None:
        self.connection.close()
        os.close(self.bell_in)
        os.close(self.bell_out)
        self.port.close()


class RingLink:
    """The shared-memory transport of one queue."""

    def __init__(self, path: Path | None, queue: Queue, mode: int, group: int | None) -> None:
        """The unix socket will be `path` (None: no rings), with `mode` and, unless that is None, `group`."""
        self._queue = queue
        self._place = Place(path, socket.SOCK_SEQPACKET, mode, group, _BACKLOG) if path is not None else None
        self._user: PortUser | None = None
        self._token = ""
        self._peer_uid: int | None = None
        self._listener: socket.socket | None = None
        self._asking: list[socket.socket] = []
        self._rings: Rings | None = None
        self._epoll = select.epoll()

    def fileno(self) -> int:
        """The descriptor that is readable when `turn` has work."""
        return self._epoll.fileno()

    def serve_on(self, user: PortUser) -> None:
        """Use rings through this io_uring."""
        self._user = user

    @property
    def is_open(self) -> bool:
        """Whether a backend has the rings; it then uses no other transport."""
        return self._rings is not None

    def expect(self, token: bytes, user: int | None = None) -> None:
        """Give rings to this user's backend with this token; b"" and None: to none, and earlier rings are taken away.

        Raises `OSError` if the socket cannot be made.
        """
        self._drop_rings()
        self._token, self._peer_uid = token.hex(), user
        if token and self._listener is None and self._place is not None:
            self._listener = self._place.listen()
            self._epoll.register(self._listener, select.EPOLLIN)
        # While no backend is expected, connections wait: a dead worker's backend may come early.
        if self._listener is not None:
            self._epoll.modify(self._listener, select.EPOLLIN if token else 0)

    def take_place(self) -> None:
        """As `BackendLink.take_place`."""
        if self._listener is None and self._place is not None:
            self._place.take()

    def turn(self) -> None:
        """Accept connections, answer requests for rings, and notice the end of the rings' connection."""
        for fd, _ in self._epoll.poll(0):
            if self._listener is not None and fd == self._listener.fileno():
                self._accept()
            elif self._rings is not None and fd == self._rings.connection.fileno():
                self._gone()
            else:
                # This turn may have closed the connection already.
                for each in [each for each in self._asking if each.fileno() == fd]:
                    self._hear(each)

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(_ACCEPTS_PER_TURN_MAX):
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setblocking(False)
            if credentials_of(connection).uid != self._peer_uid:
                self._queue.count_strangers(1)
                connection.close()
                continue
            self._asking.append(connection)
            self._epoll.register(connection, select.EPOLLIN)
            if len(self._asking) > ASKING_MAX:
                self._turn_away(self._asking[0])

    def _turn_away(self, connection: socket.socket) -> None:
        self._asking.remove(connection)
        self._epoll.unregister(connection)
        connection.close()

    def _hear(self, connection: socket.socket) -> None:
        try:
            asked = msgspec.json.decode(connection.recv(_QUESTION_BYTES_MAX), type=OpenRing)
        except BlockingIOError:
            return
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._turn_away(connection)
            return
        # A backend that has sent HELLO already, by frame or ring, gets no other rings.
        free = self._queue.link is LinkState.EXPECTED and self._rings is None
        if asked.v == PROTOCOL_VERSION and asked.token == self._token and free:
            self._open(connection)
        else:
            self._queue.count_strangers(1)
            self._turn_away(connection)

    def _open(self, connection: socket.socket) -> None:
        assert self._user is not None
        try:
            rings = Rings(connection, self._queue.config.depth)
        except (OSError, MemoryError):
            # The backend may try again, or use frames, which need no memory here.
            self._turn_away(connection)
            return
        self._asking.remove(connection)
        self._rings = rings
        self._user.use_port(rings.port, rings.bell_in, rings.bell_out)
        try:
            rings.hand_over()
        except OSError:
            self._drop_rings()

    def _gone(self) -> None:
        """The rings' connection ended, or sent a packet, which ends it, too.  Descriptors in the ring still count."""
        assert self._rings is not None
        self._rings.port.turn(self._queue)
        self._drop_rings()
        self._queue.hung_up()

    def _drop_rings(self) -> None:
        rings, self._rings = self._rings, None
        if rings is None:
            return
        assert self._user is not None
        self._user.use_port(None)
        self._epoll.unregister(rings.connection)
        rings.close()

    def close(self) -> None:
        self._drop_rings()
        for each in [*self._asking]:
            self._turn_away(each)
        if self._place is not None:
            self._place.close()
        if self._listener is not None:
            self._listener.close()
        self._epoll.close()


def _bell() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
