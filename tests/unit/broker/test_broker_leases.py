"""Leases of a real broker process, and the frames of a worker that it counts and drops."""

import pytest

from support.fakes.broker_rig import (
    DEVICE,
    RESERVE,
    BrokerProcess,
    Connect,
    send_as_strangers,
    slots_of,
    wait_until,
)
from ublkpool.bufpool.errors import WireError
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.broker_commands import (
    BrokerStatistics,
    Done,
    Failed,
    GetStatistics,
    Reclaim,
    Register,
    StatisticsReply,
    Stop,
)
from ublkpool.bufpool.pool.device_leases import parse_routing_id, worker_routing_id
from ublkpool.bufpool.pool.lease import Owner
from ublkpool.bufpool.wire import Descriptor, Kind


def test_a_new_worker_gets_its_reserve_and_the_headers_say_so(
    broker: BrokerProcess, arena: Arena, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    assert [len(slots) for slots in first.held.values()] == list(RESERVE)
    assert slots_of(arena, Owner(0, 1)) == first.all_slots()


def test_leases_come_at_once_or_when_another_worker_returns_some(
    broker: BrokerProcess, arena: Arena, worker: Connect
) -> None:
    first, second = worker(0, 1), worker(1, 1)
    first.say_hello()
    second.say_hello()
    first.lease(0, 6)
    first.take()
    assert len(first.held[0]) == 8
    second.lease(0, 3)
    second.take()
    assert [(each.kind, each.op, each.length) for each in first.take()] == [(Kind.RECALL, 0, 3)]
    first.give_back(0, first.held[0][:3])
    second.take()
    assert len(second.held[0]) == 5
    assert not set(first.held[0]) & set(second.held[0])
    assert slots_of(arena, Owner(1, 1)) == second.all_slots()


def test_every_lease_is_answered_with_the_number_on_order(broker: BrokerProcess, worker: Connect) -> None:
    first, second = worker(0, 1), worker(1, 1)
    first.say_hello()
    second.say_hello()
    first.lease(0, 4, sequence=1)
    answers = [*first.take()]
    second.lease(0, 3, sequence=1)
    answers += second.take()
    second.lease(0, 99, sequence=2)
    answers += second.take()
    first.receive()
    first.give_back(0, first.held[0][:1])
    answers += second.take()
    told = [(each.kind, each.length, each.sequence, each.offset) for each in answers]
    assert told == [
        (Kind.GRANT, 4, 1, 0),
        (Kind.GRANT, 2, 1, 1),
        (Kind.GRANT, 0, 2, 4),
        (Kind.GRANT, 1, 2, 3),
    ]


def test_a_dead_workers_buffers_return_once_and_its_successor_is_served(
    broker: BrokerProcess, arena: Arena, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    first.lease(0, 6)
    first.take()
    assert isinstance(broker.call(Register(DEVICE, 0, 2)), Failed)
    assert broker.call(Reclaim(DEVICE, 0, 1)) == Done(slots=9)
    assert broker.call(Reclaim(DEVICE, 0, 1)) == Done(slots=0)
    assert slots_of(arena, Owner(0, 1)) == []
    first.lease(0, 1)
    assert broker.call(Register(DEVICE, 0, 2)) == Done()
    successor = worker(0, 2)
    successor.say_hello()
    assert slots_of(arena, Owner(0, 2)) == successor.all_slots()
    assert broker.statistics().broker.unknown_worker == 1


@pytest.mark.parametrize(
    ("frame", "counter"),
    [
        (b"", "malformed"),
        (b"garbage", "malformed"),
        (Descriptor(Kind.LEASE, 0, device=DEVICE, queue=0, epoch=2, length=1).pack(), "mismatched"),
        (Descriptor(Kind.LEASE, 0, device=DEVICE, queue=1, epoch=1, length=1).pack(), "mismatched"),
        (Descriptor(Kind.LEASE, 0, device=6, queue=0, epoch=1, length=1).pack(), "mismatched"),
        (Descriptor(Kind.LEASE, 2, device=DEVICE, queue=0, epoch=1, length=1).pack(), "malformed"),
        (Descriptor(Kind.GRANT, 0, device=DEVICE, queue=0, epoch=1).pack(), "malformed"),
        (Descriptor(200, 0, device=DEVICE, queue=0, epoch=1).pack(), "malformed"),
        (
            Descriptor(Kind.LEASE, 0, device=DEVICE, queue=0, epoch=1, length=1).pack() + bytes(4),
            "malformed",
        ),
        (Descriptor(Kind.RETURN, 0, device=DEVICE, queue=0, epoch=1, length=9).pack(), "malformed"),
        (Descriptor(Kind.SYNC, 0, device=DEVICE, queue=0, epoch=1, sequence=9).pack(), "out_of_sync"),
    ],
)
def test_a_wrong_frame_is_counted_and_the_next_right_one_served(
    broker: BrokerProcess, worker: Connect, frame: bytes, counter: str
) -> None:
    first = worker(0, 1)
    first.say_hello()
    before = getattr(broker.statistics().broker, counter)
    first.socket.send(frame)
    first.lease(0, 1)
    first.take()
    assert len(first.held[0]) == RESERVE[0] + 1
    assert getattr(broker.statistics().broker, counter) == before + 1


def test_strangers_are_counted(broker: BrokerProcess, endpoint: str, worker: Connect) -> None:
    strangers = [b"nobody", worker_routing_id(DEVICE, 0, 9), worker_routing_id(9, 0, 1)]
    send_as_strangers(endpoint, strangers)
    first = worker(0, 1)
    first.say_hello()
    wait_until(lambda: broker.statistics().broker.unknown_worker == len(strangers))


def test_slots_that_are_not_the_workers_are_rejected_and_logged_once(
    broker: BrokerProcess, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    first.give_back(0, [9, 9, 1 << 30])
    first.give_back(0, [9])
    first.lease(0, 1)
    first.take()
    leases = broker.statistics().leases
    assert leases is not None and leases.rejected == 4
    assert broker.call(Stop()) == Done()
    status, logged = broker.wait()
    assert status == 0
    assert logged.count("is not held by") == 1


def test_statistics_count_messages_and_frames(broker: BrokerProcess, worker: Connect) -> None:
    first = worker(0, 1)
    first.say_hello()
    reply = broker.statistics()
    assert reply.leases is not None
    assert [(each.free, each.leased) for each in reply.leases.classes] == [(6, 4), (2, 2)]
    assert reply.broker.messages >= 1 and reply.broker.frames >= 2
    everything = broker.call(GetStatistics())
    assert isinstance(everything, StatisticsReply) and everything.leases is None


def test_counters_start_at_nothing() -> None:
    assert BrokerStatistics() == BrokerStatistics(messages=0, frames=0)


@pytest.mark.parametrize("identity", [(0, 0, 0), (1, 2, 3), ((1 << 32) - 1, (1 << 16) - 1, (1 << 32) - 1)])
def test_a_routing_id_survives_the_round_trip(identity: tuple[int, int, int]) -> None:
    device, owner = parse_routing_id(worker_routing_id(*identity))
    assert (device, *owner) == identity


@pytest.mark.parametrize("routing_id", [b"", b"w", b"x" + bytes(10), b"w" + bytes(9), b"w" + bytes(11)])
def test_a_routing_id_of_another_shape_is_an_error(routing_id: bytes) -> None:
    with pytest.raises(WireError, match="is no worker's"):
        parse_routing_id(routing_id)
