"""The worker's side of the wire: frames between the queue and the one backend whose token it was told.

Owns the ROUTER that backends connect to, and who may.  Frames of anybody else are dropped and counted; what is in a
frame is the queue's to judge.  A backend serves a queue over one connection: when that ends, words may be lost, and it
does not matter whose fault it was.  Used by the worker's one thread; never waits.
"""

import os
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from ublkpool.bufpool.wire import DESCRIPTOR_BYTES, DESCRIPTORS_PER_FRAME_MAX
from ublkpool.ublk.queue import Link, Queue
from ublkpool.workers.queue_gate import QueueGate

FRAME_BYTES_MAX = DESCRIPTOR_BYTES * DESCRIPTORS_PER_FRAME_MAX
FRAMES_PER_TURN_MAX = 256
# Frames of 256 KiB, for each connection: a backend that floods fills this much memory and waits.
_RECEIVE_QUEUE_MAX = 64
_SEND_QUEUE_MAX = 1024


class BackendLink:
    """The ZeroMQ transport of one queue."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        path: Path,
        queue: Queue,
        mode: int,
        group: int | None,
    ) -> None:
        """The unix socket will be `path`, with `mode`, and of `group` if there is one."""
        self._queue = queue
        self._path, self._mode, self._group = path, mode, group
        self._bound = False
        self._token = b""
        self._connection: int | None = None
        self._ended: set[int] = set()
        self._is_over = self._asked = self._is_full = False
        self.is_idle = False
        """Whether the backend talks over another transport: frames wait, and none is sent."""
        self._gate = QueueGate(context, queue.count_strangers)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        # A backend that connects again before the end of its old connection was seen must not be ignored.
        self.socket.set(zmq.ROUTER_HANDOVER, 1)
        # A backend that answers what it has not read may not fill our memory; see `_send`.
        self.socket.set(zmq.SNDHWM, _SEND_QUEUE_MAX)
        self.socket.set(zmq.RCVHWM, _RECEIVE_QUEUE_MAX)
        self.socket.set(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        # Any domain will do: without one the gate is not asked.
        self.socket.set(zmq.ZAP_DOMAIN, b"queue")
        self._monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        )

    def filenos(self) -> tuple[int, int, int]:
        """Readable when `turn` has something to look at (edge-triggered by ZeroMQ)."""
        sockets = (self.socket, self._gate.socket, self._monitor)
        backend, gate, monitor = (int(each.get(zmq.FD)) for each in sockets)
        return backend, gate, monitor

    @property
    def token(self) -> bytes:
        """The routing id that it listens to, empty if to none."""
        return self._token

    def expect(self, token: bytes, user: int | None = None) -> None:
        """Listen to this routing id and no other, over a connection of this user's; b"" and None: to nobody.

        Raises `OSError`, `zmq.ZMQError` if the socket cannot be made.
        """
        self._token = token
        self._connection = None
        self._is_over = False
        self._gate.open_for(user)
        # Not before: a backend that comes back after a worker's death says HELLO once, and must not be a stranger.
        if token and not self._bound:
            self._bind()

    def _bind(self) -> None:
        self._path.unlink(missing_ok=True)
        self.socket.bind(f"ipc://{self._path}")
        self._path.chmod(self._mode)
        if self._group is not None:
            os.chown(self._path, -1, self._group)
        self._bound = True

    def turn(self, connections: bool = True) -> bool:
        """Send what waits and take what came, until both are done; whether there is more of the latter.

        ZeroMQ's descriptor may become unreadable by a send, so that every send is followed by a look.  `connections`:
        some came or ended, as the other two descriptors say.
        """
        if connections or self._asked:
            self._asked = self._gate.turn()
            # Before the frames: what a connection brought before its end lies in the socket when its end is told.
            self._hear_ends()
        more = self._exchange()
        if not more and (self._ended or self._is_over):
            self._judge_ends()
        return more or self._asked

    def _exchange(self) -> bool:
        for _ in range(FRAMES_PER_TURN_MAX):
            # What is said by nobody's token waits where it is, and its sender with it.
            if not self._token or self.is_idle:
                # ZeroMQ's descriptor stays readable until it has taken note of what came: the worker would not sleep.
                self.socket.get(zmq.EVENTS)
                return False
            self._send()
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            self._take(frames)
        return True

    def _take(self, frames: "list[zmq.Frame]") -> None:
        if len(frames) != 2 or frames[0].bytes != self._token:
            self._queue.count_strangers(1)
            return
        connection = frames[0].get(zmq.SRCFD)
        if connection != self._connection and self._connection is not None:
            self._queue.hung_up()
            return
        self._queue.input(frames[1].buffer)
        if self._connection is None and self._queue.link in (Link.UP, Link.FENCING):
            # Its number may have been another's before: that one's end comes first.
            self._hear_ends()
            self._connection = connection

    def _hear_ends(self) -> None:
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            # A number may be another connection's at once.
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._ended.add(event["value"])
                self._is_over = self._is_over or event["value"] == self._connection
            else:
                self._ended.discard(event["value"])

    def _judge_ends(self) -> None:
        """Every frame was read: is the connection of the backend that serves among those that ended?"""
        self._hear_ends()
        if self._is_over or self._connection in self._ended:
            self._queue.hung_up()
        self._ended.clear()

    def close(self) -> None:
        self._token = b""
        self.socket.disable_monitor()
        for each in (self._monitor, self._gate.socket, self.socket):
            each.close()

    def _send(self) -> None:
        """Send what waits.  What the pipe has no room for stays with the queue, whose own bound counts from then on.

        Room is noticed in a later turn: ZeroMQ's descriptor becomes readable, or the loop ticks.
        """
        block = self._queue.output()
        if not block and not self._is_full:
            return
        sent = 0
        while sent < len(block) and self._pass_on(block[sent : sent + FRAME_BYTES_MAX]):
            sent = min(sent + FRAME_BYTES_MAX, len(block))
        self._queue.sent(sent // DESCRIPTOR_BYTES)
        self._is_full = sent < len(block)
        self._queue.hold_output(self._is_full)

    def _pass_on(self, frame: bytes) -> bool:
        """Send one frame; whether the queue is rid of it."""
        try:
            self.socket.send_multipart([self._token, frame], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError:
            # What it was to get stays with it until the supervisor says that it is gone.
            self._queue.hung_up()
            return True
        return True
