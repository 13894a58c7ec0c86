"""A queue's link over a real socket, with a queue core behind it, and backends' sockets for the test."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from support.fakes.queue_desk import Desk
from support.fakes.queue_rig import DEVICE
from ublkpool.bufpool.wire import Descriptor, Kind
from ublkpool.ublk.queue import Attention, LinkState
from ublkpool.workers.backend_link import BackendLink

TOKEN = b"T" * 16
WAIT_MS = 60_000
HELLO = Descriptor(Kind.HELLO, device=DEVICE, epoch=3).pack()


class Wire:
    """A queue's link over a real socket, and a backend's socket that the test may read."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", path: Path) -> None:
        # The ZAP handler serves all sockets of the worker's context; a real backend has a process of its own.
        self._theirs: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self.desk = Desk(need_get_data=False, depth=1, connected=False)
        self.statistics = self.desk.side.statistics
        self.path = path
        self.link = BackendLink(context, path, self.desk.queue, 0o600, None)

    def expect(self, user: int | None = None) -> None:
        """Expect a backend of this user (default: this process's)."""
        self.desk.expect()
        self.link.expect(TOKEN, os.getuid() if user is None else user)

    def connect(self, token: bytes = TOKEN) -> "zmq.Socket[bytes]":
        """A backend's socket."""
        socket = self._theirs.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, token)
        socket.setsockopt(zmq.RCVHWM, 1)
        socket.setsockopt(zmq.LINGER, 0)
        # ZeroMQ reconnects at once after a refused or ended connection.
        socket.setsockopt(zmq.RECONNECT_IVL, 1)
        socket.connect(f"ipc://{self.path}")
        self._sockets.append(socket)
        return socket

    def serve(self) -> None:
        """Connect a backend, which sends HELLO."""
        self.expect()
        self.backend = self.connect()
        self.backend.send(HELLO)
        self.until(lambda: self.desk.queue.link is LinkState.UP, "the link is up")

    def until(self, check: Callable[[], bool], what: str) -> None:
        """Run the link until the condition holds."""
        deadline_s = time.monotonic() + WAIT_MS / 1000
        while not check():
            assert time.monotonic() < deadline_s, f"not in time: {what}"
            self.link.turn()
            time.sleep(0.001)

    def gate_until(self, check: Callable[[], bool]) -> bool:
        """Only accept connections until the condition holds; returns whether it held in time."""
        deadline_s = time.monotonic() + WAIT_MS / 1000
        while not check() and time.monotonic() < deadline_s:
            self.link._gate.turn()
        return time.monotonic() < deadline_s

    def close(self) -> None:
        self.link.close()
        for each in self._sockets:
            each.close()
        self._theirs.term()

    def guess(self, sequence: int) -> None:
        """Deliver a request; the backend answers without having read it."""
        self.desk.read(0, 0)
        self.link.turn()
        done = Descriptor(Kind.DONE, device=DEVICE, epoch=3, sequence=sequence, result=512)
        self.desk.queue.input(done.pack())
        self.desk.driver.consume()

    def is_full(self) -> bool:
        return bool(self.desk.queue.output()) and not self.desk.queue.attention() & Attention.OUTPUT
