"""The shadow model of a check: which content each block may have, and which promise other content breaks."""

import random

import pytest

from ublkpool.bufpool.wire import Flag, Op
from ublkpool.daemon.check.requests import Offer, Requests
from ublkpool.daemon.check.shadow import FENCE_MARK, Change, Kind, Shadow
from ublkpool.daemon.check.verdict import Event, EventKind, broken_by

BLOCK = 512
NONCE = 0x1234


class Disk:
    """A shadow, with numbers for changes."""

    def __init__(self, is_volatile: bool = False) -> None:
        self.shadow = Shadow(BLOCK, NONCE)
        self.shadow.is_volatile = is_volatile
        self.events: list[Event] = []
        self._number = 0

    def begin(self, first: int, count: int = 1, kind: Kind = "data", fua: bool = False) -> Change:
        self._number += 1
        change = Change(self._number, kind, first, count, fua)
        self.shadow.begin(change)
        return change

    def change(self, first: int, count: int = 1, kind: Kind = "data", fua: bool = False) -> Change:
        change = self.begin(first, count, kind, fua)
        self.shadow.end(change)
        return change

    def flush(self) -> None:
        self.shadow.flushed(self.shadow.tick())

    def may_hold(self, block: int, data: bytes) -> bool:
        return not self.shadow.end_read(self.shadow.begin_read(block, 1), data)

    def data(self, change: Change, block: int | None = None) -> bytes:
        return self.shadow.block_data(change.number, change.first if block is None else block)

    def happens(self, kind: EventKind, *hit: Change) -> None:
        blocks = tuple((each.first, each.count) for each in hit)
        self.events.append(Event(kind, self.shadow.tick(), kind, blocks))

    def broken(self, block: int, data: bytes) -> str:
        wrong = self.shadow.end_read(self.shadow.begin_read(block, len(data) // BLOCK), data)
        return broken_by(wrong, self.events, BLOCK).promise


def test_a_block_that_was_never_written_keeps_what_it_was_first_read_with() -> None:
    disk = Disk()
    assert disk.may_hold(5, b"a" * BLOCK)
    assert disk.may_hold(5, b"a" * BLOCK)
    assert not disk.may_hold(5, b"b" * BLOCK)
    assert disk.broken(5, b"b" * BLOCK) == "neighbours"


def test_an_answered_write_replaces_what_was_before_it() -> None:
    disk = Disk()
    first, second = disk.change(3), disk.change(3)
    assert disk.may_hold(3, disk.data(second))
    assert not disk.may_hold(3, disk.data(first))
    assert not disk.may_hold(3, bytes(BLOCK))


def test_writes_that_ran_together_may_have_come_in_either_order_until_a_read_tells() -> None:
    disk = Disk()
    one, other = disk.begin(3), disk.begin(3)
    disk.shadow.end(one)
    disk.shadow.end(other)
    assert disk.may_hold(3, disk.data(one))
    assert not disk.may_hold(3, disk.data(other))


def test_a_read_may_see_what_was_there_before_or_after_a_write_that_runs() -> None:
    disk = Disk()
    before = disk.change(3)
    reading = disk.shadow.begin_read(3, 1)
    disk.change(3)
    assert not disk.shadow.end_read(reading, disk.data(before))
    running = disk.begin(3)
    assert disk.may_hold(3, disk.data(running))
    # Not answered, so it may be gone with its process.
    assert not disk.may_hold(3, disk.data(before))


def test_a_read_beside_a_change_may_see_parts_of_both_and_of_no_other() -> None:
    disk = Disk()
    older, before = disk.change(3), disk.change(3)
    reading = disk.shadow.begin_read(3, 1)
    after = disk.change(3)

    def mixed(*changes: Change) -> bytes:
        part = BLOCK // len(changes)
        return b"".join(disk.data(each)[:part] for each in changes)

    assert not disk.shadow.end_read(reading, mixed(before, after))
    # Nothing runs now.
    assert not disk.may_hold(3, mixed(before, after))
    assert disk.broken(3, mixed(before, after)) == "last-write"
    running = disk.begin(3, kind="zeros")
    half_cleared = disk.data(after)[: BLOCK // 2] + bytes(BLOCK // 2)
    assert disk.may_hold(3, half_cleared)
    for other in (older, before):
        (wrong,) = disk.shadow.end_read(disk.shadow.begin_read(3, 1), mixed(after, other))
        assert wrong.found.words == f"parts of write #{after.number} and write #{other.number}"
    disk.shadow.end(running)
    assert not disk.may_hold(3, half_cleared)


def test_a_read_beside_the_first_change_may_see_part_of_what_was_there() -> None:
    disk = Disk()
    assert disk.may_hold(3, b"a" * BLOCK)
    running = disk.begin(3)
    assert disk.may_hold(3, b"a" * (BLOCK // 2) + disk.data(running)[BLOCK // 2 :])
    assert not disk.may_hold(3, b"b" * (BLOCK // 2) + disk.data(running)[BLOCK // 2 :])


def test_a_write_that_failed_may_have_taken_effect() -> None:
    disk = Disk()
    before, failed = disk.change(3), disk.begin(3)
    disk.shadow.end(failed, failed=True)
    assert disk.may_hold(3, disk.data(before)) or disk.may_hold(3, disk.data(failed))


def test_a_discarded_block_may_hold_anything_and_a_zeroed_one_zeros() -> None:
    disk = Disk()
    disk.change(3)
    disk.change(3, kind="anything")
    assert disk.may_hold(3, b"x" * BLOCK)
    disk.change(3, kind="zeros")
    assert disk.may_hold(3, bytes(BLOCK))
    assert disk.broken(3, b"x" * BLOCK) == "neighbours"


def test_a_power_failure_takes_what_was_not_flushed_and_nothing_else() -> None:
    disk = Disk(is_volatile=True)
    flushed = disk.change(1)
    disk.flush()
    cached, forced = disk.change(1), disk.change(2, fua=True)
    disk.shadow.lost_power()
    assert disk.may_hold(1, disk.data(flushed))
    assert disk.may_hold(2, disk.data(forced))
    assert not disk.may_hold(2, bytes(BLOCK))
    disk.flush()
    assert not disk.may_hold(1, disk.data(cached))


def test_a_read_that_runs_in_a_power_failure_may_find_what_is_left() -> None:
    disk = Disk(is_volatile=True)
    flushed = disk.change(1)
    disk.flush()
    disk.change(1)
    reading = disk.shadow.begin_read(1, 1)
    disk.shadow.lost_power()
    assert not disk.shadow.end_read(reading, disk.data(flushed))


def test_a_flush_does_not_bring_back_what_a_power_failure_took() -> None:
    disk = Disk(is_volatile=True)
    flushed = disk.change(1)
    disk.flush()
    disk.change(1)
    disk.shadow.lost_power()
    disk.flush()
    disk.shadow.lost_power()
    assert disk.may_hold(1, disk.data(flushed))


def test_a_loss_breaks_the_strongest_promise_that_was_made() -> None:
    for fua, flushes, kind, promise in (
        (False, False, "kill", "survives-kill"),
        (False, False, "stop", "survives-stop"),
        (False, True, "kill", "flush"),
        (True, True, "kill", "fua"),
    ):
        disk = Disk(is_volatile=True)
        disk.change(3, fua=fua)
        if flushes:
            disk.flush()
        disk.happens(kind)  # type: ignore[arg-type]
        assert disk.broken(3, bytes(BLOCK)) == promise


def test_a_flush_that_a_death_interrupts_promises_nothing_of_what_the_death_lost() -> None:
    """The successor executes it, and has nothing to flush."""
    for ends, promise in (("before", "flush"), ("after", "survives-kill")):
        disk = Disk(is_volatile=True)
        disk.change(3)
        begun = disk.shadow.tick()
        if ends == "before":
            disk.shadow.flushed(begun)
        disk.happens("kill")
        if ends == "after":
            disk.shadow.flushed(begun)
        assert disk.broken(3, bytes(BLOCK)) == promise


def test_after_a_power_failure_the_last_flushed_write_is_missed() -> None:
    disk = Disk(is_volatile=True)
    disk.change(3, fua=True)
    disk.change(3)
    disk.happens("kill")
    disk.shadow.lost_power()
    disk.happens("power")
    assert disk.broken(3, bytes(BLOCK)) == "fua"


def test_a_late_write_is_told_from_a_loss() -> None:
    for kind, promise in (("kill", "predecessor"), ("fence", "fence")):
        disk = Disk()
        late = disk.begin(3)
        disk.happens(kind, late)  # type: ignore[arg-type]
        disk.shadow.end(late)
        disk.change(3)
        assert disk.broken(3, disk.data(late)) == promise


def test_data_of_a_buffer_whose_epoch_is_over_breaks_the_fence() -> None:
    disk = Disk()
    hit = disk.begin(3)
    disk.happens("fence", hit)
    disk.shadow.end(hit)
    assert disk.broken(3, disk.shadow.block_data(FENCE_MARK, 1)) == "fence"
    other = disk.change(9)
    assert disk.broken(3, disk.data(other)) == "fence"


def test_data_at_another_offset_and_zeros_beside_a_trim_are_named() -> None:
    disk = Disk()
    write, other = disk.change(3), disk.change(4)
    assert disk.broken(3, disk.data(other)) == "offset"
    assert disk.broken(3, disk.data(write, 4)) == "offset"
    disk.change(5, kind="anything")
    assert disk.broken(4, bytes(BLOCK)) == "neighbours"
    disk.change(7)
    assert disk.broken(7, bytes(BLOCK)) == "last-write"
    disk.change(9)
    disk.change(9, kind="zeros")
    assert disk.broken(9, b"x" * BLOCK) == "zeroes"


@pytest.mark.parametrize("end", ["kill", "stop", "power"])
def test_a_block_that_was_right_after_an_end_was_not_lost_by_it(end: EventKind) -> None:
    disk = Disk()
    never_written, write, other = 8, disk.change(9), disk.change(40)
    assert disk.may_hold(never_written, b"a" * BLOCK)
    disk.happens(end)
    assert disk.may_hold(never_written, b"a" * BLOCK) and disk.may_hold(9, disk.data(write))
    assert disk.may_hold(40, disk.data(other))
    disk.change(7, kind="anything")
    disk.change(10, kind="anything")
    assert disk.broken(never_written, bytes(BLOCK)) == "neighbours"
    assert disk.broken(9, bytes(BLOCK)) == "neighbours"
    assert disk.broken(40, bytes(BLOCK)) == "neighbours"
    disk.happens("kill")
    assert disk.broken(40, bytes(BLOCK)) == "survives-kill", "no read has found it since"


def test_zeros_beside_a_trim_are_no_loss_unless_other_blocks_are_lost_too() -> None:
    disk = Disk()
    disk.change(3)
    disk.change(30)
    disk.change(4, kind="anything")
    disk.happens("kill")
    assert disk.broken(3, bytes(BLOCK)) == "neighbours"
    reads = [disk.shadow.begin_read(block, 1) for block in (3, 30)]
    wrong = [each for reading in reads for each in disk.shadow.end_read(reading, bytes(BLOCK))]
    assert broken_by(wrong, disk.events, BLOCK).promise == "survives-kill"


def test_several_broken_promises_are_told_together() -> None:
    disk = Disk(is_volatile=True)
    disk.change(1)
    disk.change(2, fua=True)
    disk.happens("kill")
    wrong = disk.shadow.end_read(disk.shadow.begin_read(1, 2), bytes(2 * BLOCK))
    broken = broken_by(wrong, disk.events, BLOCK)
    assert broken.promise == "fua"
    assert "also broken: survives-kill, in 1 blocks" in broken.what


def test_a_forgotten_disk_may_hold_anything() -> None:
    disk = Disk()
    disk.change(3)
    disk.shadow.forget()
    assert disk.may_hold(3, b"x" * BLOCK)
    assert disk.shadow.touched() == [(3, 1)]


@pytest.mark.parametrize("block", [512, 4096])
@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_requests_lie_on_the_disk_in_whole_blocks_and_the_seed_replays_them(block: int, size: int) -> None:
    offer = Offer(size * block, block, 64 << 10, False, True, 1 << 40, 40960)
    made = [Requests(random.Random(7), offer) for _ in range(2)]
    lengths = set()
    for _ in range(500):
        request, again = (each.next() for each in made)
        assert (request.op, request.offset, request.length, request.flags) == (
            again.op,
            again.offset,
            again.length,
            again.flags,
        )
        assert request.offset % block == request.length % block == 0
        assert request.offset + request.length <= size * block
        assert request.op in (Op.DISCARD,) or request.length <= offer.max_io_bytes
        assert not request.flags & Flag.FUA or request.op in (Op.WRITE, Op.WRITE_ZEROES)
        lengths.add((request.op, request.length))
    assert {op for op, _ in lengths} == set(Op)
    if size == 1 << 20:
        assert max(length for op, length in lengths if op == Op.DISCARD) > offer.max_io_bytes


def test_a_read_only_disk_is_only_read() -> None:
    requests = Requests(random.Random(1), Offer(1 << 20, 512, 65536, True, True, 1 << 20, 1 << 20))
    assert {requests.next().op for _ in range(200)} == {Op.READ}
