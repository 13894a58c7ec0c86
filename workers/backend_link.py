"""The worker's ZeroMQ transport: frames between the queue and the one backend whose token it was told.

Owns the ROUTER that backends connect to, and admits only that backend.  Other peers' frames are dropped and counted;
the queue checks the descriptors in a frame.  A backend serves a queue over one connection: when that ends, descriptors
may be lost, so the backend counts as hung up.  Used by the worker's one thread; never waits.
"""

import socket
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from ublkpool.bufpool.wire import DESCRIPTOR_BYTES, DESCRIPTORS_PER_FRAME_MAX
from ublkpool.ublk.queue import LinkState, Queue
from ublkpool.workers.listening import Place
from ublkpool.workers.queue_gate import QueueGate

FRAME_BYTES_MAX = DESCRIPTOR_BYTES * DESCRIPTORS_PER_FRAME_MAX
FRAMES_PER_TURN_MAX = 256
ENDS_PER_TURN_MAX = 256
"""Connections' beginnings and ends."""
# Frames of 256 KiB for each connection: a flooding backend can fill this much memory, then it waits.
_RECEIVE_QUEUE_MAX = 64
_SEND_QUEUE_MAX = 1024
_BACKLOG = 100


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
        """The unix socket will be `path`, with `mode` and, unless that is None, `group`."""
        self._queue = queue
        self._place = Place(path, socket.SOCK_STREAM, mode, group, _BACKLOG)
        self._bound = False
        self._token = b""
        self._connection: int | None = None
        self._candidate: int | None = None
        """The serving connection, while ends of earlier connections may be unread."""
        self._ended: set[int] = set()
        self._is_over = self._asked = False
        self.is_full = False
        """Whether descriptors wait for room, which ZeroMQ may not announce."""
        self.is_idle = False
        """Whether the backend uses the rings instead: frames are neither received nor sent."""
        self._gate = QueueGate(context, queue.count_strangers)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        # A backend may connect again before this socket has noticed the end of its old connection.
        self.socket.set(zmq.ROUTER_HANDOVER, 1)
        # A backend that does not read must not fill this process's memory; see `_send`.
        self.socket.set(zmq.SNDHWM, _SEND_QUEUE_MAX)
        self.socket.set(zmq.RCVHWM, _RECEIVE_QUEUE_MAX)
        self.socket.set(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        # Any domain: libzmq asks the gate only about sockets that have one.
        self.socket.set(zmq.ZAP_DOMAIN, b"queue")
        self._monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        )

    def filenos(self) -> tuple[int, int, int]:
        """Readable when `turn` has work (edge-triggered by ZeroMQ): for frames, for the gate, for the monitor."""
        sockets = (self.socket, self._gate.socket, self._monitor)
        backend, gate, monitor = (int(each.get(zmq.FD)) for each in sockets)
        return backend, gate, monitor

    @property
    def token(self) -> bytes:
        """The routing id of the expected or serving backend; empty without one."""
        return self._token

    def expect(self, token: bytes, user: int | None = None) -> None:
        """Accept frames from this routing id only, over a connection of this user's; b"" and None: from no peer.

        Raises `OSError`, `zmq.ZMQError` if the socket cannot be made.
        """
        self._token = token
        self._connection = self._candidate = None
        self._is_over = False
        self._gate.open_for(user)
        # Not earlier: a backend that reconnects after a worker's death sends HELLO once, which must not be dropped.
        if token and not self._bound:
            self._bind()

    def take_place(self) -> None:
        """Make the socket now, since this process is about to give up the right to; it listens when one is expected."""
        if not self._bound:
            self._place.take()

    def _bind(self) -> None:
        listener = self._place.listen()
        try:
            self.socket.set(zmq.USE_FD, listener.fileno())
            self.socket.bind(f"ipc://{self._place.path}")
        except zmq.ZMQError:
            listener.close()
            raise
        # ZeroMQ closes it with its own socket.
        listener.detach()
        self._bound = True

    def turn(self, connections: bool = True) -> bool:
        """Send queued descriptors and receive frames until none is left or the turn's limit is reached; whether it was.

        A send may make ZeroMQ's descriptor unreadable, so every send is followed by a receive.  `connections`: the
        gate's or the monitor's descriptor was readable.
        """
        if connections or self._asked:
            asked = self._gate.turn()
            # Ends first, frames next: frames that came before a connection's end are in the socket by then.
            self._asked = not self._hear_all_ends() or asked
        more = self._exchange()
        if not more and (self._ended or self._is_over):
            self._judge_ends()
        return more or self._asked

    def _exchange(self) -> bool:
        for _ in range(FRAMES_PER_TURN_MAX):
            # Without an expected backend, frames stay in the socket, and their senders wait.
            if not self._token or self.is_idle:
                # Clears ZeroMQ's descriptor, which would keep the worker awake.
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
        if (known := self._candidate or self._connection) is not None and connection != known:
            self._queue.hung_up()
            return
        self._queue.input(frames[1].buffer)
        if self._connection is None and self._queue.link in (LinkState.UP, LinkState.FENCING):
            # The descriptor number may have been another connection's before: handle that one's end first.
            self._candidate = connection
            self._asked = not self._hear_all_ends() or self._asked

    def _hear_all_ends(self) -> bool:
        """As `_hear_ends`; once none is left, the serving connection's number can have no earlier owner's end."""
        is_done = self._hear_ends()
        if is_done and self._candidate is not None:
            self._connection, self._candidate = self._candidate, None
        return is_done

    def _hear_ends(self) -> bool:
        """Read the monitor's events, up to the turn's limit; whether none is left."""
        for _ in range(ENDS_PER_TURN_MAX):
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return True
            # A new connection may get the number of an ended one.
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._ended.add(event["value"])
                self._is_over = self._is_over or event["value"] == self._connection
            else:
                self._ended.discard(event["value"])
        return False

    def _judge_ends(self) -> None:
        """After every frame was read: hang up if the serving backend's connection is among those that ended."""
        is_done = self._hear_all_ends()
        if self._is_over or self._connection in self._ended:
            self._queue.hung_up()
        if is_done:
            self._ended.clear()
        else:
            self._asked = True

    def close(self) -> None:
        self._token = b""
        self._place.close()
        self.socket.disable_monitor()
        for each in (self._monitor, self._gate.socket, self.socket):
            each.close()

    def _send(self) -> None:
        """Send queued descriptors.  Those that the pipe has no room for stay in the queue, which limits their number.

        Room is noticed in a later turn: ZeroMQ's descriptor becomes readable, or the loop ticks.
        """
        block = self._queue.output()
        if not block and not self.is_full:
            return
        sent = 0
        while sent < len(block) and self._pass_on(block[sent : sent + FRAME_BYTES_MAX]):
            sent = min(sent + FRAME_BYTES_MAX, len(block))
        self._queue.sent(sent // DESCRIPTOR_BYTES)
        self.is_full = sent < len(block)
        self._queue.hold_output(self.is_full)

    def _pass_on(self, frame: bytes) -> bool:
        """Send one frame; false if the pipe is full."""
        try:
            self.socket.send_multipart([self._token, frame], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError:
            # Its requests stay with it until the supervisor reports that it is gone.
            self._queue.hung_up()
            return True
        return True
