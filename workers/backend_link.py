"""The worker's side of the wire: frames between the queue and the one backend whose token it was told.

Owns the ROUTER that backends connect to.  Frames of anybody else are dropped and counted; what is in a frame is the
queue's to judge.  Used by the worker's one thread; never waits.
"""

import os
from pathlib import Path

import zmq

from ublkpool.bufpool.wire import DESCRIPTOR_BYTES, DESCRIPTORS_PER_FRAME_MAX
from ublkpool.ublk.queue import Queue

FRAME_BYTES_MAX = DESCRIPTOR_BYTES * DESCRIPTORS_PER_FRAME_MAX
FRAMES_PER_TURN_MAX = 256
_RECEIVE_QUEUE_MAX = 1024
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
        self.strangers = 0
        """Frames from anybody but the backend."""
        self._socket = context.socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        # A backend that connects again before the end of its old connection was seen must not be ignored.
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        # A backend that answers what it has not read may not fill our memory; see `_send`.
        self._socket.set(zmq.SNDHWM, _SEND_QUEUE_MAX)
        self._socket.set(zmq.RCVHWM, _RECEIVE_QUEUE_MAX)
        self._socket.set(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)

    def fileno(self) -> int:
        """Readable when `turn` has something to look at (edge-triggered by ZeroMQ)."""
        return int(self._socket.get(zmq.FD))

    @property
    def token(self) -> bytes:
        """The routing id that it listens to, empty if to none."""
        return self._token

    def expect(self, token: bytes) -> None:
        """Listen to this routing id and no other.  Raises `OSError`, `zmq.ZMQError` if the socket cannot be made."""
        self._token = token
        # Not before: a backend that comes back after a worker's death says HELLO once, and must not be a stranger.
        if token and not self._bound:
            self._bind()

    def _bind(self) -> None:
        self._path.unlink(missing_ok=True)
        self._socket.bind(f"ipc://{self._path}")
        self._path.chmod(self._mode)
        if self._group is not None:
            os.chown(self._path, -1, self._group)
        self._bound = True

    def turn(self) -> bool:
        """Send what waits and take what came, until both are done; whether there is more of the latter.

        ZeroMQ's descriptor may become unreadable by a send, so that every send is followed by a look.
        """
        for _ in range(FRAMES_PER_TURN_MAX):
            self._send()
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            if len(frames) == 2 and frames[0] == self._token:
                self._queue.input(frames[1])
            else:
                self.strangers += 1
        return True

    def close(self) -> None:
        self._token = b""
        self._socket.close()

    def _send(self) -> None:
        """Send what waits.  What the pipe has no room for stays with the queue, whose own bound counts from then on.

        Room is noticed in a later turn: ZeroMQ's descriptor becomes readable, or the loop ticks.
        """
        block = self._queue.output()
        sent = 0
        while sent < len(block) and self._pass_on(block[sent : sent + FRAME_BYTES_MAX]):
            sent = min(sent + FRAME_BYTES_MAX, len(block))
        self._queue.sent(sent // DESCRIPTOR_BYTES)
        self._queue.hold_output(sent < len(block))

    def _pass_on(self, frame: bytes) -> bool:
        """Send one frame; whether the queue is rid of it."""
        try:
            self._socket.send_multipart([self._token, frame], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError:
            # If it is gone, what it was to get stays with it until the supervisor says so.
            return True
        return True
