"""The pool broker: serves `LeaseTable`s to workers over ZeroMQ, as a process of its own.

Owns the ROUTER socket, the protocol between workers and broker, and the leases' columns of the slot headers.
Must not touch the data segment, which it never sees.  `run_broker` runs in a process forked for it (or
started for a test) and makes its ZeroMQ context there.  One thread; SIGTERM, SIGINT, `Stop` or, by default,
the end of the control socket end it.  It leaves every lease as it is: workers keep what they hold, and the
next broker takes it from the slot headers.

Workers and broker.  A worker is a DEALER whose routing id is `worker_routing_id(device, queue, epoch)`; a
message is one or more parts, each a frame of `wire.pack_slots`; device, queue and epoch of every frame are
those of the routing id.  `op` is the size class, or `OP_SYNC_ASKED`.

    worker                                    broker
      | SYNC op=0 sequence=0 []               |   a new worker's first message, one frame for each class
      | SYNC op=1 sequence=0 []               |
      |-------------------------------------->|
      |            GRANT op=0 [slots]         |   its reserve
      |            GRANT op=1 [slots]         |
      |<--------------------------------------|
      | LEASE op=0 length=32 sequence=1       |   what is free comes at once, 20 more later; a wish for
      |-------------------------------------->|   what the queue could never hold is cut
      |   GRANT op=0 sequence=1 offset=20 [slots]
      |<--------------------------------------|
      |   GRANT op=0 sequence=1 offset=17 [3 slots]
      |<--------------------------------------|
      |            RECALL op=0 length=5       |   others wait: it owes 5 in all (not 5 more), paid from
      |<--------------------------------------|   the stock, then as tags finish; the reserve is its own
      | RETURN op=0 [slots]                   |
      |-------------------------------------->|
      |                                       X   broker restarted, or a GRANT could not be delivered
      |  RECALL op=OP_SYNC_ASKED sequence=N   |
      |<--------------------------------------|
      | SYNC op=0 sequence=N [all it holds]   |   stock and lent, one frame for each class, and it
      | SYNC op=1 sequence=N [all it holds]   |   asks again, since a SYNC ends its waiting
      | LEASE op=0 length=9 sequence=2        |
      |-------------------------------------->|

What is on order.  Every LEASE in sync is answered by a GRANT, if need be of no slots, and every GRANT says how many are
still on order for its class (`offset`) after the worker's LEASE `sequence`.  The worker believes that and adds what it
has asked for in later ones: else it would wait for ever for what the broker has cut off.

Why N: a GRANT may be on its way while a SYNC is.  A worker answers the question when it has read it, so after
every GRANT sent before it, and no GRANT is sent between question and answer.  An answer to any other question
is dropped.  A worker may send SYNC with sequence 0 again after it made a new socket: it is asked, too.  Until
a class is in sync its LEASE and RETURN are dropped (the SYNC says it all).  The question is repeated, less
and less often.

The daemon and the broker.  A SOCK_SEQPACKET socketpair; each packet is one `Command`, answered by one `Reply`
in order.  `AddDevice` brings the control segment's descriptor.  After a restart of the broker: `AddDevice`,
then `Reclaim` for workers that have died, then `Register` for every worker that lives.  `Reclaim` must come
before the `Register` of the next epoch, and only when nobody uses the dead worker's buffers any more.
"""

import contextlib
import logging
import os
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import zmq

from ublkpool.bufpool.arena import Control
from ublkpool.bufpool.errors import PoolError, WireError
from ublkpool.bufpool.lease import Grant, LeaseStatistics, LeaseTable, Owner
from ublkpool.bufpool.wire import Descriptor, Kind, pack_slots, unpack_slots

OP_SYNC_ASKED = 255
"""In a RECALL's `op`, where a class would be: send SYNC for every class, with this frame's sequence."""
COMMAND_BYTES_MAX = 65536
MESSAGES_PER_TURN_MAX = 256
ASK_INTERVAL_MIN_S = 0.1
ASK_INTERVAL_MAX_S = 2.0
_SEND_QUEUE_MESSAGES_MAX = 1000
_MESSAGE_BYTES_MAX = 16 << 20
_LOGGED_MAX = 1024
_ROUTING_ID = struct.Struct("<IHI")

_log = logging.getLogger("ublkpool.broker")


class AddDevice(msgspec.Struct, tag="add_device", tag_field="type", frozen=True, forbid_unknown_fields=True):
    """Serve this device; its control segment's descriptor travels with the packet."""

    device_number: int


class RemoveDevice(
    msgspec.Struct, tag="remove_device", tag_field="type", frozen=True, forbid_unknown_fields=True
):
    """Forget the device and unmap its control segment."""

    device_number: int


class Register(msgspec.Struct, tag="register", tag_field="type", frozen=True, forbid_unknown_fields=True):
    """This worker is alive, or about to be."""

    device_number: int
    queue: int
    epoch: int


class Reclaim(msgspec.Struct, tag="reclaim", tag_field="type", frozen=True, forbid_unknown_fields=True):
    """This worker is dead and its buffers are in nobody's hands."""

    device_number: int
    queue: int
    epoch: int


class GetStatistics(
    msgspec.Struct, tag="statistics", tag_field="type", frozen=True, forbid_unknown_fields=True
):
    """The broker's counters, and one device's leases if it is named."""

    device_number: int | None = None


class Ping(msgspec.Struct, tag="ping", tag_field="type", frozen=True, forbid_unknown_fields=True):
    """Answer with this number: another daemon took over, and drops what its predecessor was answered before."""

    number: int


class Stop(msgspec.Struct, tag="stop", tag_field="type", frozen=True, forbid_unknown_fields=True):
    """Answer, then end."""


Command = AddDevice | RemoveDevice | Register | Reclaim | GetStatistics | Ping | Stop


class BrokerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the broker started: messages and frames, then what was wrong with some."""

    messages: int = 0
    frames: int = 0
    malformed: int = 0
    """Frames that the wire format does not allow, or of a kind no worker sends."""
    mismatched: int = 0
    """Frames whose device, queue or epoch are not the sender's."""
    unknown_worker: int = 0
    """Messages from nobody that was registered: a dead epoch, a removed device, garbage."""
    out_of_sync: int = 0
    """Frames dropped because a SYNC is due, or no longer due."""
    asked: int = 0
    undeliverable: int = 0
    replies_dropped: int = 0


class Done(msgspec.Struct, tag="done", tag_field="type", frozen=True):
    """It is so.  `slots`: how many buffers a Reclaim took back."""

    slots: int = 0


class Failed(msgspec.Struct, tag="failed", tag_field="type", frozen=True):
    """It is not so, and nothing has changed."""

    reason: str


class StatisticsReply(msgspec.Struct, tag="statistics", tag_field="type", frozen=True):
    """The answer to `GetStatistics`."""

    broker: BrokerStatistics
    devices: tuple[int, ...]
    leases: LeaseStatistics | None = None


class Pong(msgspec.Struct, tag="pong", tag_field="type", frozen=True):
    """The answer to `Ping`."""

    number: int


Reply = Done | Failed | StatisticsReply | Pong
_encoder = msgspec.json.Encoder()
_command_decoder: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_reply_decoder: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def send_command(control_sock: socket.socket, command: Command, fd: int | None = None) -> None:
    """The daemon's half: one command; `fd` is the control segment's, for `AddDevice`, and stays open."""
    packet = _encoder.encode(command)
    if fd is None:
        control_sock.send(packet)
    else:
        socket.send_fds(control_sock, [packet], [fd])


def receive_reply(control_sock: socket.socket) -> Reply:
    """The daemon's half: the next reply, in the order of commands; waits as the socket's timeout says.

    Raises `PoolError` if the broker has gone.
    """
    try:
        packet = control_sock.recv(COMMAND_BYTES_MAX)
    except ConnectionError as error:
        raise PoolError("the pool broker is gone") from error
    if not packet:
        raise PoolError("the pool broker is gone")
    try:
        return _reply_decoder.decode(packet)
    except msgspec.DecodeError as error:
        raise WireError(f"broker: {error}") from error


def worker_routing_id(device: int, queue: int, epoch: int) -> bytes:
    """The ZeroMQ routing id that a worker's DEALER sets before it connects."""
    return b"w" + _ROUTING_ID.pack(device, queue, epoch)


def parse_routing_id(routing_id: bytes) -> tuple[int, Owner]:
    """Device and owner that `worker_routing_id` was made of.  Raises `WireError` for any other bytes."""
    if len(routing_id) != 1 + _ROUTING_ID.size or routing_id[:1] != b"w":
        raise WireError(f"routing id {routing_id.hex()} is no worker's")
    device, queue, epoch = _ROUTING_ID.unpack_from(routing_id, 1)
    return device, Owner(queue, epoch)


class _Session:
    """What the broker knows of a worker beside its leases: which classes are in sync, the open question."""

    def __init__(self, owner: Owner, class_count: int, nonce: int, fresh: bool) -> None:
        self.owner = owner
        self.class_count = class_count
        self.fresh = fresh
        self.leases_seen = [0] * class_count
        self.ask(nonce)

    def ask(self, nonce: int) -> None:
        """Put a new question, to be sent at once."""
        self.nonce = nonce
        self.unsynced = set(range(self.class_count))
        self.ask_at_s = 0.0
        self.ask_interval_s = ASK_INTERVAL_MIN_S

    def asked(self, now_s: float) -> None:
        self.ask_at_s = now_s + self.ask_interval_s
        self.ask_interval_s = min(2 * self.ask_interval_s, ASK_INTERVAL_MAX_S)

    def accepts(self, sequence: int) -> bool:
        """Whether a SYNC answers the question, or is the first word of a worker that never had a GRANT."""
        return sequence == self.nonce or (sequence == 0 and self.fresh)


class DeviceLeases:
    """One device: its table, its workers' sessions, and the frames it owes them.  No sockets."""

    def __init__(self, control: Control, count: Callable[[str], None]) -> None:
        """Rebuild from the slot headers; `count` notes an event of `BrokerStatistics` by name."""
        header = control.header
        self.device_number = header.device_number
        self._control = control
        self._count = count
        self._table = LeaseTable(header.geometry, header.reserve, header.queues)
        # Random, so that an answer to a question of the broker before this one is not taken for one of ours.
        self._nonce = int.from_bytes(os.urandom(6), "little")
        self._outbox: list[tuple[Owner, bytes]] = []
        self._sessions: dict[Owner, _Session] = {}
        self._complained = False
        for owner in self._table.rebuild(control.slot_owners()):
            self._sessions[owner] = self._new_session(owner, fresh=False)

    def knows(self, owner: Owner) -> bool:
        return owner in self._sessions

    def is_due(self, owner: Owner) -> bool:
        """Whether no later epoch of this queue is known: it may be registered next."""
        return all(owner.epoch > each.epoch for each in self._sessions if each.queue == owner.queue)

    def register(self, owner: Owner) -> None:
        """Expect this worker; its reserve is set aside now and sent when it has said SYNC."""
        if self.knows(owner):
            return
        self._table.register(owner)
        self._sessions[owner] = self._new_session(owner, fresh=True)

    def reclaim(self, owner: Owner) -> int:
        """Take everything from a dead worker; returns how many buffers that were."""
        slots = self._table.held_count(owner)
        self._sessions.pop(owner, None)
        self._grant(self._table.reclaim(owner))
        return slots

    def on_frame(self, owner: Owner, descriptor: Descriptor, slots: Sequence[int]) -> None:
        """Act on a known worker's frame."""
        session = self._sessions[owner]
        if (descriptor.device, descriptor.queue, descriptor.epoch) != (self.device_number, *owner):
            self._count("mismatched")
        elif descriptor.op >= session.class_count:
            self._count("malformed")
        elif descriptor.kind == Kind.SYNC:
            self._on_sync(session, descriptor, slots)
        elif descriptor.op in session.unsynced:
            self._count("out_of_sync")
            session.ask_at_s = 0.0
        elif descriptor.kind == Kind.LEASE and not slots:
            session.leases_seen[descriptor.op] = descriptor.sequence
            granted = self._table.lease(owner, descriptor.op, descriptor.length)
            self._grant([Grant(owner, descriptor.op, granted)])
        elif descriptor.kind == Kind.RETURN:
            self._grant(self._table.give_back(owner, slots))
        else:
            self._count("malformed")

    def unreachable(self, owner: Owner) -> None:
        """A frame to this worker was lost: find out what it holds when it is back."""
        if session := self._sessions.get(owner):
            self._ask_again(session)

    def take_outbox(self) -> list[tuple[Owner, list[bytes]]]:
        """Bring the slot headers up to date, then hand out what is to be sent, by worker."""
        for recall in self._table.recalls():
            self._send(
                recall.owner, self._head(recall.owner, Kind.RECALL, recall.size_class, length=recall.owed)
            )
        for slot, owner in self._table.take_changes():
            if owner is None:
                self._control.release(slot)
            else:
                self._control.grant(slot, owner)
        self._complain_once()
        outbox, self._outbox = self._outbox, []
        by_owner: dict[Owner, list[bytes]] = {}
        for owner, frame in outbox:
            by_owner.setdefault(owner, []).append(frame)
        return list(by_owner.items())

    def questions(self, now_s: float) -> list[tuple[Owner, bytes]]:
        """The questions that are due."""
        due = [each for each in self._sessions.values() if each.unsynced and each.ask_at_s <= now_s]
        for session in due:
            session.asked(now_s)
        return [
            (each.owner, self._head(each.owner, Kind.RECALL, OP_SYNC_ASKED, each.nonce).pack())
            for each in due
        ]

    def next_question_at_s(self) -> float | None:
        """When `questions` has something again."""
        return min((each.ask_at_s for each in self._sessions.values() if each.unsynced), default=None)

    def statistics(self) -> LeaseStatistics:
        return self._table.statistics()

    def close(self) -> None:
        self._control.close()

    def _on_sync(self, session: _Session, descriptor: Descriptor, slots: Sequence[int]) -> None:
        size_class = descriptor.op
        if size_class in session.unsynced and session.accepts(descriptor.sequence):
            session.unsynced.discard(size_class)
            self._grant(self._table.sync(session.owner, size_class, slots).grants)
        elif descriptor.sequence == 0:
            self._ask_again(session)
        else:
            self._count("out_of_sync")

    def _ask_again(self, session: _Session) -> None:
        # While no class is in sync no GRANT goes out, so an answer to the open question will still be right.
        if len(session.unsynced) < session.class_count:
            session.ask(self._next_nonce())
        session.ask_at_s = 0.0
        session.fresh = False
        self._table.cancel(session.owner)

    def _complain_once(self) -> None:
        error = self._table.last_error
        if error is not None and not self._complained:
            self._complained = True
            _log.warning("device %d: %s; further ones are only counted", self.device_number, error)

    def _new_session(self, owner: Owner, fresh: bool) -> _Session:
        return _Session(owner, len(self._control.header.geometry.classes), self._next_nonce(), fresh)

    def _next_nonce(self) -> int:
        self._nonce += 1
        return self._nonce

    def _grant(self, grants: Iterable[Grant]) -> None:
        for owner, size_class, slots in grants:
            session = self._sessions.get(owner)
            seen = session.leases_seen[size_class] if session is not None else 0
            on_order = self._table.on_order(owner, size_class)
            self._send(
                owner, self._head(owner, Kind.GRANT, size_class, seen)._replace(offset=on_order), slots
            )

    def _send(self, owner: Owner, head: Descriptor, slots: Sequence[int] = ()) -> None:
        session = self._sessions.get(owner)
        # A grant during a question stays unsent: the answer cannot mention it, so it comes free again then.
        if session is not None and head.op not in session.unsynced:
            self._outbox.append((owner, pack_slots(head, slots) if head.kind == Kind.GRANT else head.pack()))

    def _head(self, owner: Owner, kind: Kind, op: int, sequence: int = 0, length: int = 0) -> Descriptor:
        return Descriptor(
            kind,
            op,
            device=self.device_number,
            queue=owner.queue,
            epoch=owner.epoch,
            sequence=sequence,
            length=length,
        )


class Broker:
    """The sockets: commands in, frames in, frames out.  `run` until told to stop."""

    def __init__(
        self,
        router: "zmq.Socket[bytes]",
        control_sock: socket.socket,
        exit_on_eof: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._router = router
        self._control_sock = control_sock
        self._exit_on_eof = exit_on_eof
        self._clock = clock
        self._devices: dict[int, DeviceLeases] = {}
        self._counts: Counter[str] = Counter()
        self._logged: set[tuple[str, bytes]] = set()
        self._stopping = False

    def run(self, wakeup_fd: int) -> None:
        """Serve until Stop, a signal that writes to `wakeup_fd`, or the end of the control socket."""
        poller = zmq.Poller()
        for source in (self._router, self._control_sock.fileno(), wakeup_fd):
            poller.register(source, zmq.POLLIN)
        while not self._stopping:
            ready = dict(poller.poll(self._timeout_ms()))
            if wakeup_fd in ready:
                break
            if self._control_sock.fileno() in ready and not self._on_control():
                poller.unregister(self._control_sock.fileno())
            if self._router in ready:
                self._on_router()
            self._ask()

    def close(self) -> None:
        """Unmap every device; leases stay as they are."""
        for device in self._devices.values():
            device.close()
        self._devices.clear()

    def statistics(self) -> BrokerStatistics:
        """Counters now."""
        return msgspec.convert(dict(self._counts), BrokerStatistics)

    def _timeout_ms(self) -> int | None:
        due = [at_s for each in self._devices.values() if (at_s := each.next_question_at_s()) is not None]
        return max(0, int(1000 * (min(due) - self._clock())) + 1) if due else None

    def _on_control(self) -> bool:
        """Execute one command; returns False when the other side is gone and that is no reason to stop."""
        try:
            packet, fds, flags, _ = socket.recv_fds(
                self._control_sock, COMMAND_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return True
        except ConnectionError:
            packet, fds, flags = b"", [], 0
        reply = self._command(packet, fds, flags) if packet else None
        for fd in fds:
            os.close(fd)
        if reply is None:
            # Without a daemon there will be no device either.
            self._stopping = self._exit_on_eof or not self._devices
            return False
        self._reply(reply)
        return True

    def _command(self, packet: bytes, fds: Sequence[int], flags: int) -> Reply:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            return Failed("a command larger than a packet may be, or with more than one descriptor")
        try:
            reply = self._execute(_command_decoder.decode(packet), fds)
            for device in self._devices.values():
                self._flush(device)
        except (PoolError, OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return Failed(str(error))
        return reply

    def _execute(self, command: Command, fds: Sequence[int]) -> Reply:
        match command:
            case AddDevice(device_number=number):
                return self._add_device(number, fds)
            case RemoveDevice(device_number=number):
                self._device(number).close()
                del self._devices[number]
            case Register(device_number=number, queue=queue, epoch=epoch):
                self._device(number).register(Owner(queue, epoch))
            case Reclaim(device_number=number, queue=queue, epoch=epoch):
                return Done(self._device(number).reclaim(Owner(queue, epoch)))
            case GetStatistics(device_number=number):
                leases = None if number is None else self._device(number).statistics()
                return StatisticsReply(self.statistics(), tuple(sorted(self._devices)), leases)
            case Ping(number=number):
                return Pong(number)
            case Stop():
                self._stopping = True
        return Done()

    def _add_device(self, device_number: int, fds: Sequence[int]) -> Reply:
        if device_number in self._devices:
            raise PoolError(f"device {device_number} is served already")
        if len(fds) != 1:
            raise PoolError(f"device {device_number} came without its control segment's descriptor")
        control = Control(fds[0])
        try:
            if control.header.device_number != device_number:
                raise PoolError(
                    f"a control segment of device {control.header.device_number}, not {device_number}"
                )
            self._devices[device_number] = DeviceLeases(control, self._count)
        except PoolError:
            control.close()
            raise
        return Done()

    def _device(self, device_number: int) -> DeviceLeases:
        if device_number not in self._devices:
            raise PoolError(f"device {device_number} is not served")
        return self._devices[device_number]

    def _reply(self, reply: Reply) -> None:
        try:
            self._control_sock.send(_encoder.encode(reply), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            # A daemon that does not read, or has died, must not stop the leases.
            self._count("replies_dropped")
            self._log_once("replies_dropped", b"", f"a reply was dropped: {error.strerror}")

    def _on_router(self) -> None:
        for _ in range(MESSAGES_PER_TURN_MAX):
            try:
                routing_id, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._count("messages")
            if device := self._on_message(routing_id, frames):
                self._flush(device)

    def _on_message(self, routing_id: bytes, frames: Sequence[bytes]) -> DeviceLeases | None:
        try:
            device_number, owner = parse_routing_id(routing_id)
        except WireError as error:
            self._count("unknown_worker")
            self._log_once("unknown_worker", routing_id[:32], str(error))
            return None
        device = self._devices.get(device_number)
        if device is None or not device.knows(owner):
            self._count("unknown_worker")
            # A dead worker's successor speaks before it is registered; it will be asked then.
            if device is None or not device.is_due(owner):
                self._log_once(
                    "unknown_worker", routing_id, f"device {device_number}: {owner} is not registered"
                )
            return None
        for frame in frames:
            self._on_frame(device, owner, frame, routing_id)
        return device

    def _on_frame(self, device: DeviceLeases, owner: Owner, frame: bytes, routing_id: bytes) -> None:
        self._count("frames")
        try:
            descriptor, slots = unpack_slots(frame)
        except WireError as error:
            self._count("malformed")
            self._log_once("malformed", routing_id, f"device {device.device_number}: {owner}: {error}")
            return
        device.on_frame(owner, descriptor, slots)

    def _flush(self, device: DeviceLeases) -> None:
        for owner, frames in device.take_outbox():
            if not self._deliver(device, owner, frames):
                device.unreachable(owner)

    def _ask(self) -> None:
        now_s = self._clock()
        for device in self._devices.values():
            for owner, frame in device.questions(now_s):
                self._count("asked" if self._deliver(device, owner, [frame]) else "undeliverable")

    def _deliver(self, device: DeviceLeases, owner: Owner, frames: Sequence[bytes]) -> bool:
        """Send, or say that the worker is not connected or does not read."""
        try:
            routing_id = worker_routing_id(device.device_number, *owner)
            self._router.send_multipart([routing_id, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def _count(self, event: str) -> None:
        self._counts[event] += 1

    def _log_once(self, event: str, sender: bytes, text: str) -> None:
        if (event, sender) not in self._logged and len(self._logged) < _LOGGED_MAX:
            self._logged.add((event, sender))
            _log.warning("%s; further ones are only counted", text)


def run_broker(endpoint: str, control_sock: socket.socket, exit_on_eof: bool = True) -> None:
    """Be the broker until told to stop: binds `endpoint` (ipc), takes commands from `control_sock`.

    For a process of its own: sets its signal handlers and its umask.  Raises `PoolError` if it cannot bind.
    """
    os.umask(0o077)
    with contextlib.ExitStack() as stack:
        wakeup_fd = stack.enter_context(_stop_signals())
        context = zmq.Context()
        stack.callback(context.term)
        router = stack.enter_context(context.socket(zmq.ROUTER))
        _bind(router, endpoint)
        stack.callback(_remove_socket, endpoint)
        broker = Broker(router, control_sock, exit_on_eof)
        stack.callback(broker.close)
        broker.run(wakeup_fd)


def _bind(router: "zmq.Socket[bytes]", endpoint: str) -> None:
    # Undeliverable must be an error, not a silent drop: a lost GRANT is a buffer that nobody uses.
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A worker that reconnects before its old connection's end was seen is the same worker.
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    router.setsockopt(zmq.SNDHWM, _SEND_QUEUE_MESSAGES_MAX)
    router.setsockopt(zmq.MAXMSGSIZE, _MESSAGE_BYTES_MAX)
    router.setsockopt(zmq.LINGER, 0)
    try:
        router.bind(endpoint)
    except zmq.ZMQError as error:
        raise PoolError(f"the pool broker cannot listen on {endpoint}: {error.strerror}") from error


def _remove_socket(endpoint: str) -> None:
    # libzmq replaces a stale socket when it binds, and leaves its own.
    Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


@contextlib.contextmanager
def _stop_signals() -> Iterator[int]:
    """A descriptor that becomes readable on SIGTERM or SIGINT; the handlers themselves do nothing."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = {each: signal.signal(each, lambda *_: None) for each in signals}
    previous_fd = signal.set_wakeup_fd(write_fd)
    try:
        yield read_fd
    finally:
        signal.set_wakeup_fd(previous_fd)
        for each, handler in previous.items():
            signal.signal(each, handler)
        os.close(read_fd)
        os.close(write_fd)
