"""The lease table: each slot has one owner, reserves stay available, each wait ends, and no death loses a slot."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ublkpool.bufpool.pool.lease import Change, Grant, LeaseError, LeaseTable, Owner, Recall
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.pool.size_pool import held_max

QUEUES = 3
RESERVE = (2, 1)
GEOMETRY = Geometry.build([(4096, 12), (65536, 5)])


def table(count: int = 10, reserve: int = 1, queues: int = 3) -> LeaseTable:
    """A table of one class with every queue registered in epoch 1."""
    made = LeaseTable(Geometry.build([(4096, count)]), (reserve,), queues)
    for queue in range(queues):
        made.register(Owner(queue, 1))
    return made


def held(made: LeaseTable, owner: Owner) -> list[int]:
    return [slot for slot in range(made.geometry.slot_count) if made.owner_of(slot) == owner]


A, B, C = (Owner(queue, 1) for queue in range(3))


def test_a_new_worker_has_its_reserve_at_once() -> None:
    made = LeaseTable(GEOMETRY, RESERVE, QUEUES)
    assert made.register(A) == [Grant(A, 0, (0, 1)), Grant(A, 1, (12,))]
    assert made.register(A) == []
    assert made.held_count(A) == 3


def test_a_lease_gets_free_buffers_beyond_the_reserves_of_other_queues() -> None:
    made = LeaseTable(Geometry.build([(4096, 10)]), (2,), 3)
    made.register(A)
    assert len(made.lease(A, 0, 100)) == 4
    assert made.statistics().classes[0].free == 4
    assert len(made.register(B)[0].slots) == len(made.register(C)[0].slots) == 2


def test_waiting_is_served_one_buffer_a_turn_over_queues() -> None:
    made = table()
    taken = made.lease(A, 0, 7)
    assert made.lease(B, 0, 3) == made.lease(C, 0, 3) == ()
    grants = made.give_back(A, taken[:3])
    assert [(grant.owner, len(grant.slots)) for grant in grants] == [(B, 2), (C, 1)]
    grants = made.give_back(A, taken[3:6])
    assert [(grant.owner, len(grant.slots)) for grant in grants] == [(C, 2), (B, 1)]
    assert made.statistics().classes[0].waiting == 0


def test_no_queue_overtakes_a_waiting_one() -> None:
    made = table()
    taken = made.lease(A, 0, 7)
    made.lease(B, 0, 1)
    assert made.lease(C, 0, 1) == ()
    assert made.give_back(A, taken[:1])[0].owner == B
    assert made.give_back(A, taken[1:2])[0].owner == C


def test_a_queue_below_its_reserve_is_served_though_others_wait() -> None:
    made = table(reserve=2)
    mine = held(made, C)
    made.lease(A, 0, 4)
    made.lease(B, 0, 1)
    assert made.give_back(C, mine) == []
    assert len(made.lease(C, 0, 2)) == 2
    assert made.statistics().classes[0].waiting == 1


def test_a_lease_of_more_than_a_queue_can_hold_is_cut() -> None:
    made = table()
    assert len(made.lease(A, 0, 1 << 63)) == 7
    made.lease(A, 0, 1 << 63)
    statistics = made.statistics()
    assert statistics.classes[0].waiting == 0
    assert statistics.clipped == 2 * (1 << 63) - 7


def test_buffers_on_order_are_those_neither_granted_nor_cut() -> None:
    made = table()
    taken = made.lease(A, 0, 6)
    assert made.on_order(A, 0) == 0
    made.lease(B, 0, 3)
    assert made.on_order(B, 0) == 2
    made.lease(B, 0, 100)
    assert made.on_order(B, 0) == held_max(10, 1, 3) - len(held(made, B)) == 6
    made.give_back(A, taken[:2])
    assert made.on_order(B, 0) == 4
    made.sync(B, 0, held(made, B))
    assert made.on_order(B, 0) == made.on_order(Owner(0, 9), 0) == made.on_order(A, 7) == 0


@pytest.mark.parametrize(
    ("owner", "size_class", "want"),
    [(Owner(0, 2), 0, 1), (Owner(3, 1), 0, 1), (Owner(-1, 1), 0, 1), (A, 1, 1), (A, -1, 1), (A, 0, 0)],
)
def test_an_invalid_lease_is_counted_and_ignored(owner: Owner, size_class: int, want: int) -> None:
    made = table()
    before = made.statistics()
    assert made.lease(owner, size_class, want) == ()
    after = made.statistics()
    assert after.rejected == 1 and "no lease" in after.last_error
    assert after.classes == before.classes
    assert isinstance(made.last_error, LeaseError)


def test_a_slot_returned_twice_or_by_another_is_counted_and_ignored() -> None:
    made = table()
    (slot, *_) = made.lease(A, 0, 2)
    free = made.statistics().classes[0].free
    made.give_back(B, [slot])
    made.give_back(Owner(0, 2), [slot])
    made.give_back(A, [slot, slot, 10, -1, 9999])
    statistics = made.statistics()
    assert (statistics.returned, statistics.rejected) == (1, 6)
    assert statistics.classes[0].free == free + 1


def test_a_dead_worker_gives_everything_back_exactly_once() -> None:
    made = table()
    made.lease(A, 0, 7)
    made.lease(B, 0, 9)
    grants = made.reclaim(A)
    assert [(grant.owner, len(grant.slots)) for grant in grants] == [(B, 7)]
    assert made.statistics().reclaimed == 8
    assert made.reclaim(A) == []
    assert made.reclaim(Owner(99, 1)) == []
    assert made.statistics().reclaimed == 8
    assert made.owner_of(held(made, B)[0]) == B


def test_a_dead_worker_no_longer_waits() -> None:
    made = table()
    taken = made.lease(A, 0, 7)
    made.lease(B, 0, 2)
    made.reclaim(B)
    assert made.give_back(A, taken) == []
    assert made.recalls() == []


def test_an_epoch_follows_only_when_the_one_before_is_reclaimed_and_never_returns() -> None:
    made = table()
    with pytest.raises(LeaseError, match="still belongs to epoch 1: reclaim that first"):
        made.register(Owner(0, 2))
    made.reclaim(A)
    with pytest.raises(LeaseError, match="epoch 1 of queue 0 is over"):
        made.register(A)
    assert len(made.register(Owner(0, 2))) == 1
    with pytest.raises(LeaseError, match="queue 3 is none of the 3"):
        made.register(Owner(3, 1))


def test_a_reclaim_that_comes_before_the_registration_keeps_that_epoch_out() -> None:
    made = LeaseTable(GEOMETRY, RESERVE, QUEUES)
    made.reclaim(Owner(0, 7))
    with pytest.raises(LeaseError, match="epoch 7 of queue 0 is over"):
        made.register(Owner(0, 7))


def test_sync_frees_lost_grants_and_reports_slots_of_other_owners() -> None:
    made = table()
    taken = made.lease(A, 0, 3)
    theirs = held(made, B)[0]
    free = made.geometry.slot_count - 1
    synced = made.sync(A, 0, [taken[0], theirs, free, 9999])
    assert set(synced.freed) == {*taken[1:], 0}
    assert synced.conflicts == tuple(sorted((theirs, free, 9999)))
    assert synced.grants == []
    assert made.owner_of(theirs) == B and made.owner_of(free) is None
    assert made.statistics().conflicts == 3
    assert made.sync(A, 0, [taken[0]]) == ((), (), [])


def test_sync_refills_the_reserve_and_serves_waiting_queues() -> None:
    made = table()
    made.lease(A, 0, 7)
    made.lease(B, 0, 3)
    synced = made.sync(A, 0, [])
    assert [(grant.owner, len(grant.slots)) for grant in synced.grants] == [(A, 1), (B, 3)]


def test_sync_ends_the_workers_waiting() -> None:
    made = table()
    taken = made.lease(A, 0, 7)
    made.lease(B, 0, 3)
    made.sync(B, 0, held(made, B))
    assert made.give_back(A, taken) == []


def test_a_sync_of_an_unregistered_worker_is_counted() -> None:
    made = table()
    assert made.sync(Owner(0, 9), 0, [0]) == ((), (), [])
    assert made.sync(A, 5, [0]) == ((), (), [])
    assert made.statistics().rejected == 2


def test_a_new_table_is_filled_from_the_slot_headers() -> None:
    made = table()
    made.lease(A, 0, 4)
    rebuilt = LeaseTable(made.geometry, (1,), 3)
    owners = [made.owner_of(slot) for slot in range(10)]
    assert rebuilt.rebuild(owners) == (A, B, C)
    assert [rebuilt.owner_of(slot) for slot in range(10)] == owners
    assert rebuilt.take_changes() == []
    assert rebuilt.statistics().classes == made.statistics().classes
    assert len(rebuilt.lease(B, 0, 9)) == 3


def test_headers_that_contradict_each_other_are_settled_for_the_newest_epoch() -> None:
    rebuilt = LeaseTable(Geometry.build([(4096, 4)]), (1,), 2)
    assert rebuilt.rebuild([Owner(0, 3), Owner(0, 4), Owner(9, 1), None]) == (Owner(0, 4),)
    assert [rebuilt.owner_of(slot) for slot in range(4)] == [None, Owner(0, 4), None, None]
    assert rebuilt.take_changes() == [Change(0, None), Change(2, None)]
    assert rebuilt.statistics().conflicts == 2


def test_only_a_new_table_is_rebuilt() -> None:
    with pytest.raises(LeaseError, match="only a new table"):
        table().rebuild([None] * 10)
    with pytest.raises(LeaseError, match="one owner per slot"):
        LeaseTable(GEOMETRY, RESERVE, QUEUES).rebuild([None])


@pytest.mark.parametrize("reserve", [(2,), (5, 1), (2, 2), (-1, 1)])
def test_reserves_that_the_pool_does_not_have_are_refused(reserve: tuple[int, ...]) -> None:
    with pytest.raises(LeaseError, match="reserve"):
        LeaseTable(GEOMETRY, reserve, QUEUES)


def test_idle_queues_are_asked_once_for_the_buffers_above_their_reserve() -> None:
    made = table()
    taken = made.lease(A, 0, 7)
    assert made.recalls() == []
    made.lease(B, 0, 3)
    assert made.recalls() == [Recall(A, 0, 3)]
    assert made.recalls() == []
    made.lease(C, 0, 2)
    assert made.recalls() == [Recall(A, 0, 5)]
    made.give_back(A, taken[:2])
    assert made.recalls() == []
    made.lease(C, 0, 1)
    assert made.recalls() == [Recall(A, 0, 4)]
    made.give_back(A, taken[2:6])
    assert made.recalls() == []


def test_no_more_is_recalled_than_lies_above_the_reserve() -> None:
    made = table(reserve=3)
    made.lease(A, 0, 1)
    made.lease(B, 0, 4)
    assert made.recalls() == [Recall(A, 0, 1)]


def test_a_waiting_queue_gives_buffers_above_an_even_share_to_queues_below_it() -> None:
    made = table(count=12)
    made.lease(A, 0, 8)
    made.lease(B, 0, 1)
    made.lease(A, 0, 1)
    assert made.recalls() == [Recall(B, 0, 1)]
    made.lease(C, 0, 3)
    assert made.recalls() == [Recall(A, 0, 2)]


class Leases(RuleBasedStateMachine):
    """All operations in any order, against a model that knows only grants and its own returns."""

    @initialize()
    def start(self) -> None:
        self.table = LeaseTable(GEOMETRY, RESERVE, QUEUES)
        self.epochs = [0] * QUEUES
        self.alive: set[int] = set()
        self.mine: dict[Owner, set[int]] = {}
        self.headers: list[Owner | None] = [None] * GEOMETRY.slot_count

    def owner(self, queue: int) -> Owner:
        return Owner(queue, self.epochs[queue])

    def accept(self, grants: list[Grant]) -> None:
        self.write_headers()
        for owner, size_class, slots in grants:
            assert slots
            for slot in slots:
                assert slot in GEOMETRY.classes[size_class].slots
                assert all(slot not in others for others in self.mine.values()), "two owners"
                assert self.headers[slot] == owner, "the header comes before the GRANT"
                self.mine[owner].add(slot)

    def write_headers(self) -> None:
        for slot, owner in self.table.take_changes():
            self.headers[slot] = owner

    queues = st.integers(0, QUEUES - 1)
    classes = st.integers(0, 1)

    @rule(queue=queues)
    def register(self, queue: int) -> None:
        self.alive.add(queue)
        self.mine.setdefault(self.owner(queue), set())
        self.accept(self.table.register(self.owner(queue)))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), size_class=classes, want=st.integers(1, 20))
    def lease(self, data: st.DataObject, size_class: int, want: int) -> None:
        owner = self.owner(data.draw(st.sampled_from(sorted(self.alive))))
        slots = self.table.lease(owner, size_class, want)
        self.accept([Grant(owner, size_class, slots)] if slots else [])
        of_class = self.mine[owner] & set(GEOMETRY.classes[size_class].slots)
        assert len(of_class) >= RESERVE[size_class] or len(slots) == want, "the reserve can always be had"

    @precondition(lambda self: any(self.mine.values()))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(owner for owner, slots in self.mine.items() if slots)))
        slots = data.draw(st.lists(st.sampled_from(sorted(self.mine[owner])), min_size=1, unique=True))
        self.mine[owner] -= set(slots)
        self.accept(self.table.give_back(owner, slots))

    @rule(queue=queues, slots=st.lists(st.integers(-1, GEOMETRY.slot_count), max_size=4))
    def give_back_what_is_not_held(self, queue: int, slots: list[int]) -> None:
        wrong = [slot for slot in slots if slot not in self.mine.get(self.owner(queue), ())]
        assert self.table.give_back(self.owner(queue), wrong) == []

    @rule(queue=queues)
    def die(self, queue: int) -> None:
        owner = self.owner(queue)
        self.mine.pop(owner, None)
        self.alive.discard(queue)
        self.epochs[queue] += 1
        self.accept(self.table.reclaim(owner))
        assert self.table.reclaim(owner) == []

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), size_class=classes)
    def sync_after_losing_some(self, data: st.DataObject, size_class: int) -> None:
        owner = self.owner(data.draw(st.sampled_from(sorted(self.alive))))
        slots = self.mine[owner] & set(GEOMETRY.classes[size_class].slots)
        kept = {slot for slot in sorted(slots) if data.draw(st.booleans())}
        self.mine[owner] -= slots - kept
        synced = self.table.sync(owner, size_class, kept)
        assert (set(synced.freed), synced.conflicts) == (slots - kept, ())
        self.accept(synced.grants)

    @rule()
    def broker_restarts(self) -> None:
        self.table = LeaseTable(GEOMETRY, RESERVE, QUEUES)
        self.table.rebuild(self.headers)
        assert self.table.take_changes() == []
        for queue in sorted(self.alive):
            self.accept(self.table.register(self.owner(queue)))

    @rule()
    def recalls_are_paid(self) -> None:
        for owner, size_class, owed in self.table.recalls():
            of_class = sorted(self.mine[owner] & set(GEOMETRY.classes[size_class].slots))
            assert 0 < owed <= len(of_class) - RESERVE[size_class], "a recall leaves the reserve"
            self.mine[owner] -= set(of_class[:owed])
            self.accept(self.table.give_back(owner, of_class[:owed]))

    @precondition(lambda self: self.alive)
    @rule(size_class=classes)
    def waiting_ends_when_holders_return(self, size_class: int) -> None:
        for _ in range(20 * QUEUES):
            if not self.table.statistics().classes[size_class].waiting:
                return
            for owner in sorted(self.mine):
                slots = sorted(self.mine[owner] & set(GEOMETRY.classes[size_class].slots))
                self.mine[owner] -= set(slots)
                self.accept(self.table.give_back(owner, slots))
        raise AssertionError("a queue waits for ever")

    @invariant()
    def every_slot_has_the_owner_that_everybody_thinks(self) -> None:
        for slot in range(GEOMETRY.slot_count):
            holders = [owner for owner, slots in self.mine.items() if slot in slots]
            assert len(holders) <= 1
            expected = holders[0] if holders else None
            assert self.table.owner_of(slot) == expected == self.headers[slot]

    @invariant()
    def free_and_leased_add_up_and_cover_the_reserves(self) -> None:
        for size_class, statistics in enumerate(self.table.statistics().classes):
            slots = set(GEOMETRY.classes[size_class].slots)
            counts = [len(self.mine.get(self.owner(queue), set()) & slots) for queue in range(QUEUES)]
            assert statistics.leased == sum(counts)
            assert statistics.free + statistics.leased == statistics.count
            unclaimed = sum(max(0, RESERVE[size_class] - each) for each in counts)
            assert statistics.free >= unclaimed
            assert not statistics.waiting or statistics.free == unclaimed, (
                "a queue waits although a buffer is free"
            )


Leases.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLeases = Leases.TestCase
