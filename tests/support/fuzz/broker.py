"""Malformed frames and commands at the broker, from one worker of a device while its other worker behaves."""

import random
import socket
from collections import deque
from contextlib import suppress
from typing import Any, cast

import msgspec
import zmq

from support.fakes.broker_rig import receive_reply, send_command
from support.fuzz.bytes import spoil
from ublkpool.bufpool.pool import broker_commands
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.broker import Broker
from ublkpool.bufpool.pool.broker_commands import AddDevice, Register
from ublkpool.bufpool.pool.device_leases import worker_routing_id
from ublkpool.bufpool.pool.lease import Owner
from ublkpool.bufpool.wire import Descriptor, Kind, pack_slots

HOSTILE, BEHAVED = Owner(0, 1), Owner(1, 1)
KINDS = (Kind.LEASE, Kind.RETURN, Kind.SYNC)


class Post:
    """Stands for the broker's ROUTER socket, with lists of messages."""

    def __init__(self) -> None:
        self.inbox: deque[list[bytes]] = deque()
        self.sent: list[list[bytes]] = []

    def recv_multipart(self, _flags: int) -> list[bytes]:
        if not self.inbox:
            raise zmq.Again
        return self.inbox.popleft()

    def send_multipart(self, frames: list[bytes], _flags: int) -> None:
        self.sent.append(frames)


class BrokerFuzz:
    """A broker with one device and two workers."""

    def __init__(self, rng: random.Random, arena: Arena) -> None:
        self.rng, self.arena = rng, arena
        self.post = Post()
        self.daemon, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs = theirs
        self.daemon.setblocking(False)
        self.broker = Broker(cast(Any, self.post), theirs, exit_on_eof=False, clock=lambda: 0.0)
        number = arena.device_number
        send_command(self.daemon, AddDevice(number), arena.control_fd)
        for owner in (HOSTILE, BEHAVED):
            send_command(self.daemon, Register(number, *owner))
        for _ in range(3):
            self.broker._on_control()
            assert isinstance(receive_reply(self.daemon), broker_commands.Done)
        self._say(
            BEHAVED, [self._head(BEHAVED, Kind.SYNC, op, 0) for op in range(len(arena.geometry.classes))]
        )
        self.kept = self._slots_of(BEHAVED)
        assert len(self.kept) == sum(arena.reserve)

    def close(self) -> None:
        self.broker.close()
        self.daemon.close()
        self._theirs.close()

    def frames(self, count: int) -> None:
        """Send `count` messages; no buffer is lost, and the behaved worker keeps its buffers."""
        for number in range(count):
            self._say(self.rng.choice((HOSTILE, HOSTILE, HOSTILE, Owner(7, 1), Owner(0, 9))), self._message())
            if number % 16 == 0:
                self._check()
        self._check()
        read = self.broker.statistics()
        assert read.messages > count and read.malformed and read.mismatched and read.unknown_worker

    def commands(self, count: int) -> None:
        """Send `count` commands that no daemon sends over the daemon's socket."""
        true = [
            msgspec.json.encode(each)
            for each in (Register(99, 0, 1), AddDevice(5), broker_commands.GetStatistics())
        ]
        for _ in range(count):
            packet = spoil(self.rng, self.rng.choice(true)) or b" "
            files = [self.daemon.fileno()] * self.rng.choice((0, 0, 0, 1, 2))
            socket.send_fds(self.daemon, [packet], files)
            self.broker._on_control()
            assert receive_reply(self.daemon)
        self._check()

    def _message(self) -> list[bytes]:
        return [self._frame() for _ in range(self.rng.choice((0, 1, 1, 1, 2, 4)))]

    def _frame(self) -> bytes:
        rng = self.rng
        if rng.random() < 0.05:
            return rng.randbytes(rng.choice((0, 1, 63, 64, 68, 200)))
        slots = [
            rng.choice((rng.randrange(20), rng.randrange(1 << 32))) for _ in range(rng.choice((0, 1, 3)))
        ]
        length = rng.choice((0, 1, 5, 1 << 32, (1 << 64) - 1))
        head = self._head(
            HOSTILE, rng.choice(KINDS), rng.choice((0, 0, 1, 1, 2, 255)), rng.choice((0, 1, 1 << 63))
        )
        if rng.random() < 0.2:
            head = head._replace(device=rng.choice((0, 6)), epoch=rng.choice((0, 1, 2)))
        frame = head._replace(length=length).pack() if head.kind == Kind.LEASE else pack_slots(head, slots)
        return spoil(rng, frame) if rng.random() < 0.2 else frame

    def _head(self, owner: Owner, kind: Kind, op: int, sequence: int) -> Descriptor:
        return Descriptor(
            kind,
            op,
            device=self.arena.device_number,
            queue=owner.queue,
            epoch=owner.epoch,
            sequence=sequence,
        )

    def _say(self, owner: Owner, frames: list[bytes] | list[Descriptor]) -> None:
        packed = [each.pack() if isinstance(each, Descriptor) else each for each in frames]
        name = worker_routing_id(self.arena.device_number, *owner)
        self.post.inbox.append([spoil(self.rng, name) if self.rng.random() < 0.02 else name, *packed])
        self.broker._on_router()
        self.broker._ask()
        self.post.sent.clear()

    def _slots_of(self, owner: Owner) -> list[int]:
        owners = self.arena.control.slot_owners()
        return [slot for slot, each in enumerate(owners) if each == owner]

    def _check(self) -> None:
        assert self._slots_of(BEHAVED) == self.kept
        send_command(self.daemon, broker_commands.GetStatistics(self.arena.device_number))
        self.broker._on_control()
        reply = receive_reply(self.daemon)
        assert isinstance(reply, broker_commands.StatisticsReply) and reply.leases is not None
        owners = list(self.arena.control.slot_owners())
        assert sum(each.free for each in reply.leases.classes) == owners.count(None)
        with suppress(BlockingIOError):
            self.daemon.recv(1)
            raise AssertionError("a reply to nothing")
