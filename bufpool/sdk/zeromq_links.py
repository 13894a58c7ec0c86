"""A backend's links over ZeroMQ, the transport that every daemon offers: one DEALER for each queue.

Owns the ZeroMQ context, the sockets and their monitors.  Make it after any fork: a context does not survive one.
"""

import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import zmq

from ublkpool.bufpool import wire
from ublkpool.bufpool.engine.ring_driver import nothing_to_serve
from ublkpool.bufpool.errors import WireError
from ublkpool.bufpool.sdk.doors import LOOK_S, Door
from ublkpool.bufpool.sdk.links import (
    Handshakes,
    LinkStatistics,
    Polled,
    epoch_after,
    hello,
    unread,
    unread_max,
)

FRAMES_PER_TURN_MAX = 64
"""Frames read from one queue before the others get their turn."""
_LINGER_MS = 1000
_LOOK_MS = int(1000 * LOOK_S)


class ZeroMQLinks:
    """`Links` over ZeroMQ."""

    def __init__(self, attached: wire.Attached) -> None:
        """Connects to every queue and sends HELLO, which ZeroMQ keeps until a worker listens."""
        self._attached = attached
        self._epoch = attached.epoch
        self._frames_received = self._frames_sent = 0
        self._bytes_received = self._bytes_sent = 0
        self._handshakes = Handshakes(attached.queues)
        self._doors = [
            Door(queue, endpoint.removeprefix("ipc://")) for queue, endpoint in enumerate(attached.endpoints)
        ]
        self._look_at_s, self._hears = 0.0, True
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._queues = [self._make_queue() for _ in attached.endpoints]
        # Before anything connects: `Handshakes` must see the first connection to know the second as a new worker's.
        self._monitors = [self._watch_connection(queue) for queue in self._queues]
        for queue, endpoint in zip(self._queues, attached.endpoints, strict=True):
            queue.connect(endpoint)
        self._queue_of = {each: number for number, each in enumerate(self._queues)}
        self._monitor_of = {each: number for number, each in enumerate(self._monitors)}
        for number in range(attached.queues):
            self._greet(number)

    def _make_queue(self) -> zmq.Socket[bytes]:
        queue = self._context.socket(zmq.DEALER)
        queue.setsockopt(zmq.ROUTING_ID, bytes.fromhex(self._attached.token))
        queue.setsockopt(zmq.LINGER, _LINGER_MS)
        # ZeroMQ may treat a pipe as full at a tenth of its limit, and a frame may hold one descriptor.
        queue.setsockopt(zmq.SNDHWM, 10 * unread_max(self._attached))
        # The queue's depth bounds the frames in flight; at a limit here ZeroMQ would drop some.
        queue.setsockopt(zmq.RCVHWM, 0)
        queue.setsockopt(zmq.RECONNECT_IVL, 10)
        queue.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        self._poller.register(queue, zmq.POLLIN)
        return queue

    def _watch_connection(self, queue: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
        monitor: zmq.Socket[bytes] = queue.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._poller.register(monitor, zmq.POLLIN)
        return monitor

    def _greet(self, queue: int) -> None:
        self.send_frame(queue, hello(self._attached, queue, self._epoch))

    def watch(self, descriptor: int, events: int = select.POLLIN) -> None:
        """See `Links`."""
        self._poller.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """See `Links`."""
        self._poller.unregister(descriptor)

    def poll(self, timeout_ms: int | None = None) -> Polled:
        """See `Links`."""
        found = Polled([], [])
        if self._handshakes.linked < len(self._queues):
            self._look_at_doors()
            timeout_ms = min(_LOOK_MS, _LOOK_MS if timeout_ms is None else timeout_ms)
        for source, _ in self._poller.poll(timeout_ms):
            if isinstance(source, int):
                found.descriptors.append(source)
            elif source in self._queue_of:
                found.queues.append(self._queue_of[source])
            else:
                self._link_changed(self._monitor_of[source])
        return found

    def _look_at_doors(self) -> None:
        """Check the sockets of unconnected queues: ZeroMQ retries for ever and reports no error."""
        if not self._hears or (now_s := time.monotonic()) < self._look_at_s:
            return
        self._look_at_s = now_s + LOOK_S
        for queue, door in enumerate(self._doors):
            if self._handshakes.has(queue):
                door.reached()
            else:
                door.look()

    def drive(self, engine: Any, serve: Callable[[], None] = nothing_to_serve) -> bool:
        """See `Links`: frames of ZeroMQ need Python."""
        return False

    @property
    def linked(self) -> int:
        """See `Links`."""
        return self._handshakes.linked

    def _link_changed(self, queue: int) -> None:
        event = _event(self._monitors[queue].recv_multipart())
        if self._handshakes.changed(queue, up=event != zmq.EVENT_DISCONNECTED):
            self._greet(queue)

    def frames(self, queue: int) -> Iterator[bytes]:
        """See `Links`; at most `FRAMES_PER_TURN_MAX`."""
        receive = self._queues[queue].recv
        for _ in range(FRAMES_PER_TURN_MAX):
            try:
                frame = receive(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._frames_received += 1
            self._bytes_received += len(frame)
            self._epoch = epoch_after(frame, self._epoch)
            yield frame

    def send_frame(self, queue: int, frame: bytes) -> None:
        """See `Links`."""
        try:
            self._queues[queue].send(frame, zmq.NOBLOCK)
        except zmq.Again as error:
            raise WireError(unread(queue, self._attached)) from error
        self._frames_sent += 1
        self._bytes_sent += len(frame)

    def stop_receiving(self) -> None:
        """See `Links`."""
        self._hears = False
        for queue in self._queues:
            self._poller.unregister(queue)

    def statistics(self) -> LinkStatistics:
        """See `Links`."""
        return LinkStatistics(
            frames_received=self._frames_received,
            frames_sent=self._frames_sent,
            bytes_received=self._bytes_received,
            bytes_sent=self._bytes_sent,
            reconnects=self._handshakes.reconnects,
        )

    def close(self) -> None:
        """See `Links`."""
        for queue, monitor in zip(self._queues, self._monitors, strict=True):
            queue.disable_monitor()
            monitor.close(linger=0)
            queue.close()
        self._context.term()


def _event(message: Sequence[bytes]) -> int:
    """The event of a monitor's message: its first 16 bits (zmq_socket_monitor(3)).

    pyzmq's own parser imports asyncio and with it TLS, some megabytes in each backend.
    """
    return int.from_bytes(message[0][:2], sys.byteorder)
