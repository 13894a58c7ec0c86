"""One device's workers at the broker: who holds what, and the conversation with each of them.

Owns the protocol between workers and broker, and the leases' columns of the slot headers.  Knows no sockets: frames
come in with the name of their sender, and go out by worker (`broker.py` carries them).  Must not touch the data
segment, which the broker never sees.

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
"""In a RECALL's `op`, where a class would be: send SYNC for every class, with this frame's sequence."""
ASK_INTERVAL_MIN_S = 0.1
ASK_INTERVAL_MAX_S = 2.0
_ROUTING_ID = struct.Struct("<IHI")

_log = logging.getLogger("ublkpool.broker")


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
