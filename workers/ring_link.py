"""The worker's side of the rings: who gets one, and when its owner has gone.

Owns the unix socket at which the backend that is expected asks for a queue's rings, and the one connection whose
backend has them.  What goes through the rings is the core's business (`ublk/csrc/queue_port.c`) and passes without
Python; the connection carries nothing after its first exchange but its own end.  Used by the worker's one thread; never
waits.
"""

import array
import os
import select
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import msgspec

from ublkpool.bufpool.way_out import naming
from ublkpool.bufpool.wire import PROTOCOL_VERSION, OpenRing, RingOpened
from ublkpool.ublk.queue import Link, Port, Queue
from ublkpool.workers.credentials import credentials_of

ASKING_MAX = 8
"""Connections that have not asked yet; one more ends the oldest."""
_ACCEPTS_PER_TURN_MAX = 64
_BACKLOG = 16
_QUESTION_BYTES_MAX = 256
_KIND = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class PortUser(Protocol):
    """What lets descriptors travel through a port: `ublk.queue.Ring`."""

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
            # The backend shares this one, and may make it block: only io_uring writes to it.
            self.bell_out = _bell()
            made.pop_all()

    def hand_over(self) -> None:
        """Tell the backend.  Raises `OSError`."""
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
        """The unix socket will be `path` (None: nobody gets rings), with `mode`, and of `group` if there is one."""
        self._queue, self._path, self._mode, self._group = queue, path, mode, group
        self._user: PortUser | None = None
        self._token = ""
        self._peer_uid: int | None = None
        self._listener: socket.socket | None = None
        self._asking: list[socket.socket] = []
        self._rings: Rings | None = None
        self._epoll = select.epoll()

    def fileno(self) -> int:
        """Readable when `turn` has something to look at."""
        return self._epoll.fileno()

    def serve_on(self, user: PortUser) -> None:
        """Rings are used by this."""
        self._user = user

    @property
    def is_open(self) -> bool:
        """Whether a backend has the rings: it talks through them and through nothing else."""
        return self._rings is not None

    def expect(self, token: bytes, user: int | None = None) -> None:
        """Let this user's backend with this token have rings; b"" and None: nobody, and nobody keeps them.

        Raises `OSError` if the socket cannot be made.
        """
        self._drop_rings()
        self._token, self._peer_uid = token.hex(), user
        if token and self._listener is None and self._path is not None:
            self._listener = self._listen(self._path)
        # While nobody is expected who comes waits: the backend of a dead worker may be early.
        if self._listener is not None:
            self._epoll.modify(self._listener, select.EPOLLIN if token else 0)

    def _listen(self, path: Path) -> socket.socket:
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, _KIND)
        try:
            with naming(path):
                listener.bind(str(path))
        except OSError:
            listener.close()
            raise
        path.chmod(self._mode)
        if self._group is not None:
            os.chown(path, -1, self._group)
        listener.listen(_BACKLOG)
        self._epoll.register(listener, select.EPOLLIN)
        return listener

    def turn(self) -> None:
        """Look at who has come, who has asked, and whether the rings' owner has gone."""
        for fd, _ in self._epoll.poll(0):
            if self._listener is not None and fd == self._listener.fileno():
                self._accept()
            elif self._rings is not None and fd == self._rings.connection.fileno():
                self._gone()
            else:
                # One that this turn has turned away already may be among those that it was to look at.
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
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            self._turn_away(connection)
            return
        # One that talks already, over frames or with rings, has what it needs.
        free = self._queue.link is Link.EXPECTED and self._rings is None
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
            # It may try again, and frames need no memory of ours.
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
        """Its connection ended, or says something: both are the end of it.  What it said before counts."""
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
        if self._listener is not None:
            self._listener.close()
        self._epoll.close()


def _bell() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
