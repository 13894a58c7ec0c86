"""The worker's side of the pool broker: keeps the queue's stock between too little and too much.

Owns the DEALER to the broker and the conversation of `bufpool/broker.py`'s header; the queue decides how many buffers
it wants.  Used by the worker's one thread; never waits.
"""

import zmq

from ublkpool.bufpool.broker import OP_SYNC_ASKED, worker_routing_id
from ublkpool.bufpool.wire import Descriptor, Kind, pack_slots, unpack_slots
from ublkpool.ublk.queue import Queue


class PoolLink:
    """A queue's conversation with the broker."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, queue: Queue) -> None:
        self._queue = queue
        config = queue.config
        self._classes = range(len(config.classes))
        self._head = Descriptor(0, device=config.device_number, queue=config.queue, epoch=config.epoch)
        self._socket = context.socket(zmq.DEALER)
        self._socket.set(zmq.ROUTING_ID, worker_routing_id(config.device_number, config.queue, config.epoch))
        self._socket.set(zmq.LINGER, 0)
        # Nothing is lost while the broker restarts: what waits in the pipe is bounded by the buffers there are.
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.connect(endpoint)
        self._sync(0)

    def fileno(self) -> int:
        """Readable when `receive` has something to look at (edge-triggered by ZeroMQ)."""
        return int(self._socket.get(zmq.FD))

    def receive(self) -> None:
        """Take every message that is there."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            for frame in frames:
                self._on_frame(frame)

    def balance(self) -> None:
        """Lease what the queue wants, return what it has over; then look for answers that came meanwhile."""
        frames = []
        for size_class, want in list(self._queue.stock_wants()):
            if want > 0:
                self._queue.stock_asked(size_class, want)
                frames.append(self._head._replace(kind=Kind.LEASE, op=size_class, length=want).pack())
            else:
                slots = self._queue.stock_take(size_class, -want)
                frames.append(pack_slots(self._head._replace(kind=Kind.RETURN, op=size_class), slots))
        if frames:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
            self.receive()

    def close(self) -> None:
        self._socket.close()

    def _on_frame(self, frame: bytes) -> None:
        descriptor, slots = unpack_slots(frame)
        if descriptor.kind == Kind.GRANT:
            self._queue.stock_add(descriptor.op, slots)
        elif descriptor.kind == Kind.RECALL and descriptor.op == OP_SYNC_ASKED:
            self._sync(descriptor.sequence)
        elif descriptor.kind == Kind.RECALL:
            self._queue.stock_recall(descriptor.op, descriptor.length)

    def _sync(self, sequence: int) -> None:
        """Say what the queue holds; a SYNC ends its waiting at the broker, so it will ask again."""
        frames = []
        for size_class in self._classes:
            head = self._head._replace(kind=Kind.SYNC, op=size_class, sequence=sequence)
            frames.append(pack_slots(head, self._queue.stock_held(size_class)))
            self._queue.stock_unask(size_class)
        self._socket.send_multipart(frames, zmq.NOBLOCK)
