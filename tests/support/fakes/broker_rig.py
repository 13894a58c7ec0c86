"""A real broker process, for tests that play the daemon and the workers."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import zmq

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.broker_commands import (
    COMMAND_BYTES_MAX,
    AddDevice,
    Command,
    Done,
    GetStatistics,
    Register,
    Reply,
    StatisticsReply,
    decode_reply,
    encode,
)
from ublkpool.bufpool.pool.device_leases import OP_SYNC_ASKED, worker_routing_id
from ublkpool.bufpool.pool.lease import Owner
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.wire import Descriptor, Kind, pack_slots, unpack_slots

INSTANCE = f"test-broker-{os.getpid()}"
DEVICE = 5
QUEUES = 2
RESERVE = (2, 1)
GEOMETRY = Geometry.build([(4096, 10), (65536, 4)])
WAIT_MS = 60_000

_PROGRAM = """
import socket, sys
from ublkpool.bufpool.pool.broker import run_broker
run_broker(sys.argv[1], socket.socket(fileno=int(sys.argv[2])), exit_on_eof=sys.argv[3] == "True")
"""


def send_command(control: socket.socket, command: Command, fd: int | None = None) -> None:
    """The daemon's half; `fd` is the control segment's, for `AddDevice`, and stays open."""
    socket.send_fds(control, [encode(command)], [] if fd is None else [fd])


def receive_reply(control: socket.socket) -> Reply:
    """The daemon's half: the next reply; waits as the socket's timeout says."""
    packet = control.recv(COMMAND_BYTES_MAX)
    if not packet:
        raise PoolError("the pool broker is gone")
    return decode_reply(packet)


class BrokerProcess:
    """A real broker process, and the daemon's end of its control socket."""

    def __init__(self, endpoint: str, exit_on_eof: bool = True) -> None:
        self.control, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(WAIT_MS / 1000)
        with child:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, endpoint, str(child.fileno()), str(exit_on_eof)],
                pass_fds=[child.fileno()],
                stderr=subprocess.PIPE,
                text=True,
            )

    def call(self, command: Command, fd: int | None = None) -> Reply:
        send_command(self.control, command, fd)
        return receive_reply(self.control)

    def statistics(self) -> StatisticsReply:
        reply = self.call(GetStatistics(DEVICE))
        assert isinstance(reply, StatisticsReply)
        return reply

    def wait(self) -> tuple[int, str]:
        """Wait for the broker; returns its exit status and log."""
        _, logged = self.process.communicate(timeout=WAIT_MS / 1000)
        return self.process.returncode, logged

    def descriptor_count(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.process.communicate()
        self.control.close()


class Worker:
    """A worker's end of the protocol."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, queue: int, epoch: int
    ) -> None:
        self.queue, self.epoch = queue, epoch
        self.held: dict[int, list[int]] = {0: [], 1: []}
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, worker_routing_id(DEVICE, queue, epoch))
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self.socket.connect(endpoint)

    def frame(
        self, kind: Kind, op: int, slots: list[int] | None = None, length: int = 0, sequence: int = 0
    ) -> bytes:
        head = Descriptor(
            kind,
            op,
            device=DEVICE,
            queue=self.queue,
            epoch=self.epoch,
            sequence=sequence,
            length=length,
        )
        return head.pack() if slots is None else pack_slots(head, slots)

    def all_slots(self) -> list[int]:
        return sorted(slot for slots in self.held.values() for slot in slots)

    def say_hello(self) -> None:
        self.sync(0)
        while len(self.held[0]) < RESERVE[0] or len(self.held[1]) < RESERVE[1]:
            self.take()

    def sync(self, sequence: int) -> None:
        frames = [self.frame(Kind.SYNC, op, slots, sequence=sequence) for op, slots in self.held.items()]
        self.socket.send_multipart(frames)

    def lease(self, op: int, want: int, sequence: int = 0) -> None:
        self.socket.send(self.frame(Kind.LEASE, op, length=want, sequence=sequence))

    def give_back(self, op: int, slots: list[int]) -> None:
        self.held[op] = [slot for slot in self.held[op] if slot not in slots]
        self.socket.send(self.frame(Kind.RETURN, op, slots))

    def receive(self) -> list[Descriptor]:
        """The next message, after taking its grants."""
        assert self.socket.poll(WAIT_MS), "the broker says nothing"
        descriptors = []
        for frame in self.socket.recv_multipart():
            descriptor, slots = unpack_slots(frame)
            if descriptor.kind == Kind.GRANT:
                self.held[descriptor.op].extend(slots)
            descriptors.append(descriptor)
        return descriptors

    def take(self) -> list[Descriptor]:
        """The next message that is not a question; answers questions before it."""
        while True:
            received = self.receive()
            rest = [each for each in received if each.op != OP_SYNC_ASKED]
            for each in received:
                if each.op == OP_SYNC_ASKED:
                    self.sync(each.sequence)
            if rest:
                return rest

    def question(self) -> int:
        """The sequence of the next question."""
        while True:
            for each in self.receive():
                if each.op == OP_SYNC_ASKED:
                    return each.sequence


Start = Callable[..., BrokerProcess]
Connect = Callable[[int, int], Worker]


def introduce(broker: BrokerProcess, arena: Arena) -> None:
    assert broker.call(AddDevice(DEVICE), arena.control_fd) == Done()
    for queue in range(QUEUES):
        assert broker.call(Register(DEVICE, queue, 1)) == Done()


def send_as_strangers(endpoint: str, routing_ids: Iterable[bytes]) -> None:
    """Send a frame from a connection with each of these routing ids, which ends then."""
    for routing_id in routing_ids:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket_:
            socket_.setsockopt(zmq.ROUTING_ID, routing_id)
            socket_.connect(endpoint)
            socket_.send(b"hello")


def settle_ended_connections(broker: BrokerProcess, endpoint: str) -> None:
    """Return when the broker knows of every connection whose descriptor it has closed.

    libzmq's thread tells the broker of these ends before it takes the next connection's frame.
    """
    before = broker.statistics().broker.unknown_worker
    send_as_strangers(endpoint, [b"stranger"])
    wait_until(lambda: broker.statistics().broker.unknown_worker > before)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_MS / 1000
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.005)


def slots_of(arena: Arena, owner: Owner) -> list[int]:
    return [slot for slot, each in enumerate(arena.control.slot_owners()) if each == owner]
