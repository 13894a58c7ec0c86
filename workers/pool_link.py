"""The worker's side of the pool broker: keeps the queue's stock between too little and too much.

Owns the DEALER to the broker and its side of the conversation in `bufpool/pool/device_leases.py`; the queue decides how
many buffers it wants.  Used by the worker's one thread; never waits.
"""

from collections import deque

import zmq

from ublkpool.bufpool.pool.device_leases import OP_SYNC_ASKED, worker_routing_id
from ublkpool.bufpool.wire import Descriptor, Kind, pack_slots, unpack_slots
from ublkpool.ublk.queue import Queue


class Orders:
    """What a queue has asked for of one class, as far as the broker's last GRANT did not know of it."""

    def __init__(self) -> None:
        self._sequence = 0
        self._unanswered: deque[tuple[int, int]] = deque()

    def ask(self, count: int) -> int:
        """So many more are asked for; the LEASE's sequence."""
        self._sequence += 1
        self._unanswered.append((self._sequence, count))
        return self._sequence

    def granted(self, sequence: int, on_order: int) -> int:
        """A GRANT says that `on_order` are to come after LEASE `sequence`; how many are, with the later ones."""
        while self._unanswered and self._unanswered[0][0] <= sequence:
            self._unanswered.popleft()
        return on_order + sum(count for _, count in self._unanswered)

    def forget(self) -> None:
        """The broker has forgotten them all."""
        self._unanswered.clear()


class PoolLink:
    """A queue's conversation with the broker."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, queue: Queue) -> None:
        self._queue = queue
        config = queue.config
        self._orders = [Orders() for _ in config.classes]
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
                sequence = self._orders[size_class].ask(want)
                lease = self._head._replace(kind=Kind.LEASE, op=size_class, sequence=sequence, length=want)
                frames.append(lease.pack())
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
            on_order = self._orders[descriptor.op].granted(descriptor.sequence, descriptor.offset)
            self._queue.stock_on_order(descriptor.op, on_order)
        elif descriptor.kind == Kind.RECALL and descriptor.op == OP_SYNC_ASKED:
            self._sync(descriptor.sequence)
        elif descriptor.kind == Kind.RECALL:
            self._queue.stock_recall(descriptor.op, descriptor.length)

    def _sync(self, sequence: int) -> None:
        """Say what the queue holds; a SYNC ends its waiting at the broker, so it will ask again."""
        frames = []
        for size_class, orders in enumerate(self._orders):
            head = self._head._replace(kind=Kind.SYNC, op=size_class, sequence=sequence)
            frames.append(pack_slots(head, self._queue.stock_held(size_class)))
            orders.forget()
            self._queue.stock_on_order(size_class, 0)
        self._socket.send_multipart(frames, zmq.NOBLOCK)
