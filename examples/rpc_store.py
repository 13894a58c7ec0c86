"""A write's data lands inside the message that carries it to a server: no copy in this process.

    python examples/rpc_server.py tcp://127.0.0.1:9900 /var/lib/vol0.store 1G
    ublkpool backend examples/rpc_store.py --device vol0 endpoint=tcp://127.0.0.1:9900

The backend's own segment is cut into slots: a header, and behind it, without a gap, the data of one write.  `place`
names the data part, the kernel copies the data there, and header and data are one ZeroMQ message where they lie.  A
slot is used again when two have let go of it: the worker (`released`) and ZeroMQ (its tracker of the message).

The server's disk has the data when it answers, so an answered write survives this process, and a power failure there.
Each connection has a routing
id of its own, which begins with the device's generation and the number of the connection: the server takes no request
of a connection that is older than one it knows, so what a dead predecessor or a broken connection left on its way
changes nothing.
"""

import queue
import struct
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import zmq

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties, Request
from ublkpool.bufpool.sdk.slots import Slots
from ublkpool.bufpool.sizes import ByteSize
from ublkpool.bufpool.wire import Op

HEAD = struct.Struct("<BBxxxxxxQQQ32x")
"""Before the data of each message: operation, flags, number of the request, offset and length in bytes."""
REPLY = struct.Struct("<Qq")
"""Before the data of each answer: number of the request, and bytes moved, 0, or a negative errno."""
SENDER = struct.Struct("<cQI3x")
"""A connection's routing id: a byte that is not 0, the device's generation, the number of the connection."""
ABOUT = struct.Struct("<QQ16s")
"""The answer to the operation `ASK_ABOUT`: size in bytes, highest generation seen, identity."""
ASK_ABOUT = 255
_ANSWER_TIMEOUT_MS = 10_000
_LARGEST_BYTES = 1 << 30
_HEAD_ROOM_BYTES = 4096
"""A slot's first part, so that the data begins at a whole page; the header is its end."""


class RpcOptions(msgspec.Struct, frozen=True, kw_only=True):
    endpoint: str
    segment: ByteSize = 16 << 20


class RpcStore(Backend):
    Options = RpcOptions

    def __init__(self, options: RpcOptions) -> None:
        self.options: RpcOptions = options
        self.waiting: dict[int, Request] = {}
        """Sent and not answered, in the order of sending."""
        self.sending: dict[int, list[zmq.MessageTracker]] = {}
        """For each region the messages that may still be read from it."""
        self.free_again: deque[int] = deque()
        self.late: queue.SimpleQueue[tuple[int, list[zmq.MessageTracker]] | None] = queue.SimpleQueue()
        self.numbers = self.connections = self.sent_in_place = 0

    def open(self, hint: Hint) -> Properties:
        if hint.placement != "backend":
            raise BackendError("the device must place writes in the backend: add it with --placement backend")
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        size_bytes, generation, identity = self.ask_about()
        return Properties(
            size_bytes=size_bytes,
            discard_granularity_bytes=4096,
            discard_max_bytes=_LARGEST_BYTES,
            write_zeroes_max_bytes=_LARGEST_BYTES,
            placement="backend",
            segment_bytes=max(self.options.segment, _HEAD_ROOM_BYTES + hint.max_io_bytes),
            identity=identity.hex(),
            generation_seen=generation,
        )

    def ask_about(self) -> tuple[int, int, bytes]:
        """The store's size, the highest generation that it has seen, and its identity."""
        with self.context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(self.options.endpoint)
            socket.send(HEAD.pack(ASK_ABOUT, 0, 0, 0, 0))
            if not socket.poll(_ANSWER_TIMEOUT_MS):
                raise BackendError(f"no answer from {self.options.endpoint}: is the server running?")
            size_bytes, generation, identity = ABOUT.unpack(socket.recv()[REPLY.size :])
            return size_bytes, generation, identity

    def started(self, device: Device) -> None:
        self.device = device
        self.slots = Slots(len(device.own), _HEAD_ROOM_BYTES + device.max_io_bytes)
        self.reaper = threading.Thread(target=self.wait_for_late)
        self.reaper.start()
        self.connect()

    def connect(self) -> None:
        """A new connection, on which everything that is not answered is sent again, in order."""
        self.connections += 1
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndhwm = self.socket.rcvhwm = 0  # the device's depth bounds the messages
        sender = SENDER.pack(b"\1", self.device.generation, self.connections)
        self.socket.setsockopt(zmq.ROUTING_ID, sender)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.socket.connect(self.options.endpoint)
        self.device.watch(self.socket.FD, self.hear)
        self.device.watch(self.monitor.FD, self.look_at_connection)
        for number, request in self.waiting.items():
            self.send(number, request)
        self.look_at_connection()

    def reconnect(self) -> None:
        for socket in (self.socket, self.monitor):
            self.device.unwatch(socket.FD)
        self.disconnect()
        self.connect()

    def disconnect(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close()

    def look_at_connection(self) -> None:
        # ZeroMQ's descriptor reports changes only: what is there is read until nothing is left.
        with suppress(zmq.Again):
            self.monitor.recv_multipart(zmq.NOBLOCK)
            self.reconnect()
        self.hear()

    def place(self, offset: int, length: int, flags: int) -> int | None:
        while self.free_again:
            self.slots.give(self.free_again.popleft())
        slot = self.slots.take()
        return None if slot is None else slot + _HEAD_ROOM_BYTES

    def submit(self, batch: Sequence[Request]) -> None:
        for request in batch:
            self.numbers += 1
            self.waiting[self.numbers] = request
            self.send(self.numbers, request)
        self.hear()

    def send(self, number: int, request: Request) -> None:
        head = HEAD.pack(request.op, request.flags, number, request.offset, request.length)
        if request.op != Op.WRITE:
            self.socket.send(head, zmq.NOBLOCK)
        elif request.region < 0:
            # A client's own memory, which the client may change: the server gets what it is now.
            self.socket.send(head + bytes(request.buffer), zmq.NOBLOCK)
        else:
            self._send_in_place(head, request)

    def _send_in_place(self, head: bytes, request: Request) -> None:
        """Send header and data from where they lie; ZeroMQ reads them later, on a thread of its own."""
        start = request.region - HEAD.size
        message = self.device.own[start : request.region + request.length]
        if not self.sending.get(request.region):
            message[: HEAD.size] = head
        frame = zmq.Frame(message, copy=False, track=True)
        self.socket.send(frame, zmq.NOBLOCK, copy=False)
        assert frame.tracker is not None
        self.sending.setdefault(request.region, []).append(frame.tracker)
        self.sent_in_place += 1

    def hear(self) -> None:
        with suppress(zmq.Again):
            while True:
                answer = self.socket.recv(zmq.NOBLOCK, copy=False).buffer
                number, result = REPLY.unpack_from(answer)
                request = self.waiting.pop(number, None)
                if request is not None:  # None: its answer came over the connection before this one, too
                    self.answer(request, result, answer[REPLY.size :])

    def answer(self, request: Request, result: int, data: memoryview) -> None:
        if request.op == Op.READ and result >= 0:
            request.buffer[: len(data)] = data
        request.complete(result)

    def released(self, region: int) -> None:
        trackers = self.sending.pop(region, [])
        if all(each.done for each in trackers):
            self.slots.give(region - _HEAD_ROOM_BYTES)
        else:
            self.late.put((region - _HEAD_ROOM_BYTES, trackers))

    def wait_for_late(self) -> None:
        """A thread: give back the slots that ZeroMQ has not let go of when the worker did."""
        while (late := self.late.get()) is not None:
            slot, trackers = late
            for each in trackers:
                each.wait()
            self.free_again.append(slot)
            self.device.wake()

    def statistics(self) -> dict[str, int]:
        return {"sent_in_place": self.sent_in_place, "connections": self.connections}

    def close(self) -> None:
        if self.connections:
            self.disconnect()
            self.late.put(None)
            self.reaper.join()
        if hasattr(self, "context"):
            self.context.term()
