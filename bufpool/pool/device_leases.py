"""One device's workers at the broker: their leases, and the protocol between them and the broker.

Owns that protocol, and the broker's fields of the slot headers.  Knows no sockets: `broker.py` brings frames with the
name of their sender and sends the frames of `take_outbox`.  Must not touch the data segment, which the broker never
maps.

A worker is a DEALER whose routing id is `worker_routing_id(device, queue, epoch)`; a
message is one or more parts, each a frame of `wire.pack_slots`; device, queue and epoch of every frame are
those of the routing id.  `op` is the size class, or `OP_SYNC_ASKED`.

    worker                                    broker
      | SYNC op=0 sequence=0 []               |   a new worker's first message, one frame for each class
      | SYNC op=1 sequence=0 []               |
      |-------------------------------------->|
      |            GRANT op=0 [slots]         |   its reserve
      |            GRANT op=1 [slots]         |
      |<--------------------------------------|
      | LEASE op=0 length=32 sequence=1       |   free buffers are granted at once, 20 more are on order;
      |-------------------------------------->|   what the queue could never hold is not
      |   GRANT op=0 sequence=1 offset=20 [slots]
      |<--------------------------------------|
      |   GRANT op=0 sequence=1 offset=17 [3 slots]
      |<--------------------------------------|
      |            RECALL op=0 length=5       |   another queue waits: return 5 in all (not 5 more), from
      |<--------------------------------------|   the stock, then as tags finish; the worker keeps its reserve
      | RETURN op=0 [slots]                   |
      |-------------------------------------->|
      |                                       X   broker restarted, or a GRANT could not be delivered
      |  RECALL op=OP_SYNC_ASKED sequence=N   |
      |<--------------------------------------|
      | SYNC op=0 sequence=N [all it holds]   |   stock and lent, one frame for each class, and it
      | SYNC op=1 sequence=N [all it holds]   |   asks again, since a SYNC ends its waiting
      | LEASE op=0 length=9 sequence=2        |
      |-------------------------------------->|

On order.  The broker answers every LEASE of a class in sync with a GRANT, if need be of no slots.  Every GRANT says
how many buffers of its class are still on order (`offset`) after the worker's LEASE number `sequence`.  The worker
takes that number and adds what it asked for in later LEASEs: otherwise it would wait for ever for buffers that the
broker did not put on order.

Why N: GRANT and SYNC may cross.  A worker answers the question after it has read every GRANT that was sent before it,
and the broker sends no GRANT between question and answer.  The broker drops answers to any other question.  A worker
may send SYNC with sequence 0 again after it made a new socket: the broker asks it, too.  Until a class is in sync, the
broker drops its LEASE and RETURN, since the SYNC says what they would say.  The broker repeats the question at growing
intervals.
"""

import logging
import os
import struct
from collections.abc import Callable, Iterable, Sequence

from ublkpool.bufpool.errors import WireError
from ublkpool.bufpool.pool.control import Control
from ublkpool.bufpool.pool.lease import Grant, LeaseStatistics, LeaseTable, Owner
from ublkpool.bufpool.wire import Descriptor, Kind, pack_slots

OP_SYNC_ASKED = 255
"""The `op` of a RECALL that asks for a SYNC of every class, with this frame's sequence."""
ASK_INTERVAL_MIN_S = 0.1
ASK_INTERVAL_MAX_S = 2.0
_ROUTING_ID = struct.Struct("<IHI")

_log = logging.getLogger("ublkpool.broker")


def worker_routing_id(device: int, queue: int, epoch: int) -> bytes:
    """The ZeroMQ routing id that a worker's DEALER sets before it connects."""
    return b"w" + _ROUTING_ID.pack(device, queue, epoch)


def parse_routing_id(routing_id: bytes) -> tuple[int, Owner]:
    """The device and owner of a worker's routing id.  Raises `WireError` for any other bytes."""
    if len(routing_id) != 1 + _ROUTING_ID.size or routing_id[:1] != b"w":
        raise WireError(f"routing id {routing_id.hex()} is no worker's")
    device, queue, epoch = _ROUTING_ID.unpack_from(routing_id, 1)
    return device, Owner(queue, epoch)


class _Session:
    """A worker's state beside its leases: which classes are in sync, and the open question."""

    def __init__(self, owner: Owner, class_count: int, nonce: int, fresh: bool) -> None:
        self.owner = owner
        self.class_count = class_count
        self.fresh = fresh
        self.leases_seen = [0] * class_count
        self.ask(nonce)

    def ask(self, nonce: int) -> None:
        """Make a new question, due at once."""
        self.nonce = nonce
        self.unsynced = set(range(self.class_count))
        self.ask_at_s = 0.0
        self.ask_interval_s = ASK_INTERVAL_MIN_S

    def asked(self, now_s: float) -> None:
        self.ask_at_s = now_s + self.ask_interval_s
        self.ask_interval_s = min(2 * self.ask_interval_s, ASK_INTERVAL_MAX_S)

    def accepts(self, sequence: int) -> bool:
        """Whether a SYNC answers the open question, or is the first one of a worker that never had a GRANT."""
        return sequence == self.nonce or (sequence == 0 and self.fresh)


class DeviceLeases:
    """One device: its table, its workers' sessions, and the frames to send to them.  No sockets."""

    def __init__(self, control: Control, count: Callable[[str], None]) -> None:
        """Rebuild from the slot headers; `count` notes an event of `BrokerStatistics` by name."""
        header = control.header
        self.device_number = header.device_number
        self._control = control
        self._count = count
        self._table = LeaseTable(header.geometry, header.reserve, header.queues)
        # Random, so that an answer to a question of the previous broker fits no question of this one.
        self._nonce = int.from_bytes(os.urandom(6), "little")
        self._outbox: list[tuple[Owner, bytes]] = []
        self._sessions: dict[Owner, _Session] = {}
        self._complained = False
        for owner in self._table.rebuild(control.slot_owners()):
            self._sessions[owner] = self._new_session(owner, fresh=False)

    def knows(self, owner: Owner) -> bool:
        return owner in self._sessions

    def is_due(self, owner: Owner) -> bool:
        """Whether this is a later epoch than all known ones of its queue, which may be registered soon."""
        return all(owner.epoch > each.epoch for each in self._sessions if each.queue == owner.queue)

    def register(self, owner: Owner) -> None:
        """Register a worker; its reserve is taken now and sent after its SYNC.  Raises `LeaseError`."""
        if self.knows(owner):
            return
        self._table.register(owner)
        self._sessions[owner] = self._new_session(owner, fresh=True)

    def reclaim(self, owner: Owner) -> int:
        """Take all buffers from a dead worker; returns how many."""
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
        """A frame to this worker was lost: ask for a SYNC when it is connected again."""
        if session := self._sessions.get(owner):
            self._ask_again(session)

    def take_outbox(self) -> list[tuple[Owner, list[bytes]]]:
        """Write the changes of ownership to the slot headers, then return the frames to send, by worker."""
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
        """The questions that are due at `now_s`, in seconds."""
        due = [each for each in self._sessions.values() if each.unsynced and each.ask_at_s <= now_s]
        for session in due:
            session.asked(now_s)
        return [
            (each.owner, self._head(each.owner, Kind.RECALL, OP_SYNC_ASKED, each.nonce).pack())
            for each in due
        ]

    def next_question_at_s(self) -> float | None:
        """When the next question is due; None if none is open."""
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
        # While no class is in sync no GRANT is sent, so the answer to the open question will still be right.
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
        # A grant during an open question is not sent: the SYNC cannot list it, so its slots become free again then.
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
