"""The worker's connection to the pool broker: leases buffers for the queue's stock and returns surplus ones.

Owns the DEALER to the broker and the worker's half of the protocol in `bufpool/pool/device_leases.py`; the queue
decides how many buffers it wants.  Used by the worker's one thread; never waits.
"""

from collections import deque

import zmq

from ublkpool.bufpool.pool.device_leases import OP_SYNC_ASKED, worker_routing_id
from ublkpool.bufpool.wire import Descriptor, Kind, pack_slots, unpack_slots
from ublkpool.ublk.queue import Queue


class Orders:
    """The LEASEs of one size class that the broker's last GRANT did not take into account."""

    def __init__(self) -> None:
        self._sequence = 0
        self._unanswered: deque[tuple[int, int]] = deque()

    def ask(self, count: int) -> int:
        """Record a LEASE of `count` buffers; its sequence."""
        self._sequence += 1
        self._unanswered.append((self._sequence, count))
        return self._sequence

    def granted(self, sequence: int, on_order: int) -> int:
        """The buffers on order after a GRANT: `on_order` as of LEASE `sequence`, and those of later LEASEs."""
        while self._unanswered and self._unanswered[0][0] <= sequence:
            self._unanswered.popleft()
        return on_order + sum(count for _, count in self._unanswered)

    def forget(self) -> None:
        """The broker has dropped every order."""
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
        # No limit, so that no message is lost while the broker restarts; the pool's buffers bound their number.
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.connect(endpoint)
        self._sync(0)

    def fileno(self) -> int:
        """The descriptor that becomes readable when `receive` has work (edge-triggered by ZeroMQ)."""
        return int(self._socket.get(zmq.FD))

    def receive(self) -> None:
        """Receive every message that has come."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            for frame in frames:
                self._on_frame(frame)

    def balance(self) -> None:
        """Lease the buffers that the queue wants, return its surplus, then receive answers that came meanwhile."""
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
        """Send the slots that the queue holds; a SYNC cancels its orders at the broker, so it will ask again."""
        frames = []
        for size_class, orders in enumerate(self._orders):
            head = self._head._replace(kind=Kind.SYNC, op=size_class, sequence=sequence)
            frames.append(pack_slots(head, self._queue.stock_held(size_class)))
            orders.forget()
            self._queue.stock_on_order(size_class, 0)
        self._socket.send_multipart(frames, zmq.NOBLOCK)
