"""The broker asks workers for their buffers after its own death, a lost GRANT, and a worker's new socket."""

from support.fakes.broker_rig import (
    DEVICE,
    RESERVE,
    BrokerProcess,
    Connect,
    Start,
    introduce,
    settle_ended_connections,
    slots_of,
    wait_until,
)
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.control import Control
from ublkpool.bufpool.pool.device_leases import DeviceLeases
from ublkpool.bufpool.pool.lease import Owner
from ublkpool.bufpool.wire import Descriptor, Kind, unpack_slots


def test_a_killed_brokers_successor_knows_every_lease(
    broker: BrokerProcess, start: Start, arena: Arena, worker: Connect
) -> None:
    first, second = worker(0, 1), worker(1, 1)
    first.say_hello()
    second.say_hello()
    first.lease(0, 4)
    first.take()
    before = list(arena.control.slot_owners())
    broker.kill()

    first.lease(0, 99)
    successor = start()
    introduce(successor, arena)
    assert list(arena.control.slot_owners()) == before
    for each in (first, second):
        each.sync(each.question())
    first.lease(0, 2)
    first.take()
    assert len(first.held[0]) == 8
    statistics = successor.statistics()
    assert statistics.leases is not None
    assert statistics.leases.conflicts == 0
    assert [each.waiting for each in statistics.leases.classes] == [0, 0]
    for each in (first, second):
        assert slots_of(arena, Owner(each.queue, 1)) == each.all_slots()


def test_a_grant_that_died_with_the_broker_comes_free_again(
    start: Start, arena: Arena, worker: Connect
) -> None:
    arena.control.grant(7, Owner(0, 1))
    introduce(start(), arena)
    first = worker(0, 1)
    first.sync(first.question())
    while sum(map(len, first.held.values())) < sum(RESERVE):
        first.take()
    assert slots_of(arena, Owner(0, 1)) == first.all_slots()


def test_a_silent_worker_is_asked_without_having_said_a_word(
    broker: BrokerProcess, start: Start, arena: Arena, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    broker.kill()
    introduce(start(), arena)
    assert first.question() > 0


def test_an_answer_to_an_older_question_is_not_believed(
    broker: BrokerProcess, start: Start, arena: Arena, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    broker.kill()
    successor = start()
    introduce(successor, arena)
    question = first.question()
    held, first.held = first.held, {0: [], 1: []}
    first.sync(question - 1)
    first.held = held
    first.sync(question)
    first.lease(0, 1)
    first.take()
    assert slots_of(arena, Owner(0, 1)) == first.all_slots()
    assert successor.statistics().broker.out_of_sync >= 2


def test_a_worker_with_a_new_socket_is_asked_what_it_holds(
    broker: BrokerProcess, arena: Arena, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    again = worker(0, 1)
    again.held = first.held
    first.socket.close()
    again.sync(0)
    again.sync(again.question())
    again.lease(0, 1)
    again.take()
    assert len(again.held[0]) == RESERVE[0] + 1
    assert slots_of(arena, Owner(0, 1)) == again.all_slots()


def test_a_grant_to_a_worker_that_has_gone_is_found_out_when_it_is_back(
    broker: BrokerProcess, arena: Arena, endpoint: str, worker: Connect
) -> None:
    first, second = worker(0, 1), worker(1, 1)
    first.say_hello()
    second.say_hello()
    first.lease(0, 6)
    first.take()
    second.lease(0, 2)
    first.take()
    connections = broker.descriptor_count()
    second.socket.close()
    wait_until(lambda: broker.descriptor_count() < connections)
    # Before that a message would vanish, which the new socket's SYNC mends.
    settle_ended_connections(broker, endpoint)
    before = broker.statistics().broker.undeliverable
    first.give_back(0, first.held[0][:2])
    wait_until(lambda: broker.statistics().broker.undeliverable > before)
    again = worker(1, 1)
    again.held = second.held
    again.sync(again.question())
    again.lease(0, 1)
    again.take()
    assert slots_of(arena, Owner(1, 1)) == again.all_slots()


def identity(owner: Owner) -> tuple[int, int, int]:
    """A descriptor's queue, tag and epoch."""
    return owner.queue, 0, owner.epoch


def lease(device: DeviceLeases, owner: Owner, want: int) -> None:
    device.on_frame(owner, Descriptor(Kind.LEASE, 0, 0, DEVICE, *identity(owner), length=want), ())


def test_no_grant_goes_out_between_a_question_and_its_answer(arena: Arena) -> None:
    events: list[str] = []
    device = DeviceLeases(Control(arena.control_fd), events.append)
    asked, other = Owner(0, 1), Owner(1, 1)
    for owner in (asked, other):
        device.register(owner)
        for op in range(2):
            device.on_frame(owner, Descriptor(Kind.SYNC, op, 0, DEVICE, *identity(owner)), ())
    lease(device, other, 99)
    lease(device, asked, 2)
    device.take_outbox()
    device.unreachable(asked)
    ((_, question),) = device.questions(now_s=1e9)
    device.on_frame(
        other, Descriptor(Kind.RETURN, 0, 0, DEVICE, *identity(other)), slots_of(arena, other)[:4]
    )
    lease(device, asked, 2)
    assert [owner for owner, _ in device.take_outbox()] == []
    assert len(slots_of(arena, asked)) == sum(RESERVE)
    assert events == ["out_of_sync"]
    nonce = unpack_slots(question)[0].sequence
    for op in range(2):
        answer = Descriptor(Kind.SYNC, op, 0, DEVICE, *identity(asked), sequence=nonce)
        device.on_frame(asked, answer, ())
    assert {owner for owner, _ in device.take_outbox()} == {asked}
    device.close()


def test_a_rebuilt_lease_is_not_undone_by_a_first_word_that_came_late(arena: Arena) -> None:
    arena.control.grant(3, Owner(0, 1))
    device = DeviceLeases(Control(arena.control_fd), lambda _: None)
    device.on_frame(Owner(0, 1), Descriptor(Kind.SYNC, 0, 0, DEVICE, *identity(Owner(0, 1))), ())
    assert device.take_outbox() == []
    assert slots_of(arena, Owner(0, 1)) == [3]
    device.close()


def test_a_recall_waits_until_its_holder_is_in_sync(arena: Arena) -> None:
    holder, wanting = Owner(0, 1), Owner(1, 1)
    for slot in range(8):
        arena.control.grant(slot, holder)
    device = DeviceLeases(Control(arena.control_fd), lambda _: None)
    device.register(wanting)
    device.on_frame(wanting, Descriptor(Kind.SYNC, 0, 0, DEVICE, *identity(wanting)), ())
    lease(device, wanting, 3)
    assert [owner for owner, _ in device.take_outbox()] == [wanting]
    nonces = {owner: unpack_slots(frame)[0].sequence for owner, frame in device.questions(now_s=1e9)}
    answer = Descriptor(Kind.SYNC, 0, 0, DEVICE, *identity(holder), sequence=nonces[holder])
    device.on_frame(holder, answer, range(8))
    ((owner, (recall,)),) = device.take_outbox()
    assert (owner, unpack_slots(recall)[0].kind, unpack_slots(recall)[0].length) == (holder, Kind.RECALL, 3)
    device.close()


def test_questions_are_repeated_less_and_less_often(arena: Arena) -> None:
    device = DeviceLeases(Control(arena.control_fd), lambda _: None)
    device.register(Owner(0, 1))
    now_s, gaps_s = 0.0, []
    for _ in range(8):
        assert len(device.questions(now_s)) == 1
        assert device.questions(now_s) == []
        next_s = device.next_question_at_s()
        assert next_s is not None
        gaps_s.append(round(next_s - now_s, 3))
        now_s = next_s
    assert gaps_s == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    device.close()
