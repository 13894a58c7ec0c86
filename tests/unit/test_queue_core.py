"""The queue core, one scenario each: a fake driver on one side, a fake backend on the other, no kernel."""

import errno
from collections.abc import Sequence

import pytest

from support.fake_driver import IOD_FUA, IOD_NOUNMAP, SECTOR_BYTES, Holder, Request
from support.fake_liar import CUT, REGIONS, REJECTS, RESULTS, STALE
from support.queue_desk import Desk
from support.queue_rig import DEVICE
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op
from ublkpool.ublk.queue import NULL, Attention, Link
from ublkpool.workers.tag_state import State

FAR_SECTOR = (7 << 60) >> 9
OWN = {"place_in_backend": True, "reads_own": True}


def data(number: int, sectors: int = 1) -> bytes:
    return bytes([number]) * (sectors * SECTOR_BYTES)


def kinds(descriptors: Sequence[Descriptor]) -> list[int]:
    return [each.kind for each in descriptors]


def test_a_write_is_asked_for_placed_copied_stored_and_committed_once() -> None:
    desk = Desk(**OWN)
    request = desk.write(0, 8, data(1, 4))
    assert desk.state(0) is State.PLACING and not desk.driver.consume()
    desk.place(0)
    assert desk.state(0) is State.COPYING
    desk.copy(0)
    assert desk.state(0) is State.SERVING
    desk.serve(0)
    assert request.result == len(request.data)
    assert desk.store.read(8 * SECTOR_BYTES, 4 * SECTOR_BYTES) == request.data
    assert (desk.side.statistics.own_copy_bytes, desk.side.statistics.commits) == (0, 1)


def test_without_placement_a_write_lands_in_a_pool_buffer_of_its_size() -> None:
    desk = Desk()
    desk.write(0, 0, data(1, 1))
    desk.write(1, 8, data(2, 16))
    desk.copy(0)
    desk.copy(1)
    small, large = desk.send()
    assert small.segment == large.segment == 1
    classes = desk.rig.geometry.classes
    assert small.buffer < classes[1].base_offset <= large.buffer


def test_without_need_get_data_the_data_is_there_at_once() -> None:
    desk = Desk(need_get_data=False)
    request = desk.write(2, 0, data(5))
    assert desk.state(2) is State.SERVING
    desk.serve(2)
    assert request.result == SECTOR_BYTES and desk.store.read(0, SECTOR_BYTES) == data(5)


@pytest.mark.parametrize("own", [False, True])
def test_a_read_is_copied_out_of_the_buffer_that_the_commit_names(own: bool) -> None:
    desk = Desk(reads_own=own)
    desk.store.write(3 * SECTOR_BYTES, data(9, 2))
    request = desk.read(1, 3, 2)
    desk.serve(1)
    assert request.received == data(9, 2)


def test_a_read_buffer_is_free_only_when_its_commit_was_consumed() -> None:
    desk = Desk(spare=0)
    first, second = desk.read(0, 0), desk.read(1, 1)
    desk.send()
    assert desk.backend is not None and desk.state(1) is State.WAIT_BUFFER
    desk.backend.execute((0, 0))
    desk.queue.input(desk.backend.answer((0, 0)))
    assert (desk.state(0), desk.state(1)) == (State.COMMITTING, State.WAIT_BUFFER)
    assert desk.queue.stock_take(0, 9) == []
    desk.driver.consume()
    assert first.result == SECTOR_BYTES
    desk.serve(1)
    assert second.result == SECTOR_BYTES


def test_a_region_that_a_read_named_is_released_only_when_the_commit_was_consumed() -> None:
    desk = Desk(**OWN)
    desk.read(0, 0)
    desk.send()
    assert desk.backend is not None
    desk.backend.execute((0, 0))
    desk.queue.input(desk.backend.answer((0, 0)))
    assert desk.send() == []
    desk.driver.consume()
    assert kinds(desk.send()) == [Kind.RELEASE]


def test_a_placed_writes_region_is_released_when_its_done_was_read() -> None:
    desk = Desk(**OWN)
    desk.write(0, 0, data(1))
    desk.place(0)
    region = desk.driver.named[0]
    desk.copy(0)
    desk.serve(0)
    (release,) = desk.send()
    assert (release.kind, release.segment, release.buffer) == (Kind.RELEASE, *region)
    desk.write(0, 0, data(2))
    assert kinds(desk.send()) == [Kind.PLACE], "and only once"


@pytest.mark.parametrize("cut", [False, True])
def test_a_write_whose_answer_nobody_read_is_rescued_whole(cut: bool) -> None:
    desk = Desk(**OWN)
    request = desk.write(0, 8, data(6, 2))
    desk.place(0)
    desk.copy(0)
    desk.send()
    backend = desk.backend
    assert backend is not None and backend.execute((0, 0))
    if cut:
        desk.queue.cut()
    backend.answer((0, 0))
    assert (0, 0) in backend.named, "no RELEASE: the region is lent"
    desk.kill()
    desk.store.write(8 * SECTOR_BYTES, data(0, 2))
    desk.connect()
    desk.serve(0)
    assert request.result == 2 * SECTOR_BYTES
    assert desk.store.read(8 * SECTOR_BYTES, 2 * SECTOR_BYTES) == request.data


def test_a_backend_that_reads_nothing_more_fills_the_output_and_breaks_no_rule() -> None:
    depth = 8
    desk = Desk(depth=depth, **OWN)
    for tag in range(depth):
        desk.write(tag, tag, data(tag))
        desk.place(tag)
        desk.copy(tag)
        desk.send()
    assert desk.backend is not None
    for tag in range(depth):
        desk.backend.execute((0, tag))
        desk.queue.input(desk.backend.answer((0, tag)))
        desk.driver.consume()
        desk.write(tag, tag, data(tag))
    assert len(desk.queue.output()) // 64 == 2 * depth and desk.queue.link is Link.UP
    desk.queue.hold_output(True)
    assert not desk.queue.attention() & Attention.OUTPUT, "a full transport is no reason to come back at once"
    desk.queue.hold_output(False)
    assert desk.queue.attention() & Attention.OUTPUT


def test_a_write_that_was_copied_in_part_fails_for_no_driver_must_take_it_for_the_whole() -> None:
    desk = Desk()
    request = desk.write(0, 0, data(1, 4))
    desk.copy(0, 1)
    assert desk.send() == [], "no backend sees half a write"
    desk.driver.consume()
    assert request.result == -errno.EIO
    assert desk.side.statistics.short_copies == 1


def test_a_write_of_which_nothing_could_be_copied_begins_anew() -> None:
    desk = Desk(**OWN)
    request = desk.write(0, 0, data(1))
    desk.place(0)
    desk.copy(0, 0)
    desk.driver.deliver(0, desk.driver.again.popleft())
    assert kinds(desk.send()) == [Kind.RELEASE, Kind.PLACE]
    desk.place(0)
    desk.copy(0)
    desk.serve(0)
    assert request.result == SECTOR_BYTES


@pytest.mark.parametrize("op", [Op.READ, Op.FLUSH])
def test_a_tag_that_was_sent_back_may_carry_another_request(op: Op) -> None:
    desk = Desk()
    desk.write(0, 0, data(1))
    desk.copy(0, 0)
    other = desk.other(0, op, sectors=1 if op is Op.READ else 0)
    desk.serve(0)
    assert other.result == len(other.received)
    assert desk.store.read(0, SECTOR_BYTES) == bytes(SECTOR_BYTES)


def test_a_failing_write_that_was_sent_back_passes_its_error_to_nobody() -> None:
    desk = Desk(**OWN)
    desk.write(0, 0, data(1))
    desk.send()
    assert desk.backend is not None
    desk.queue.input(desk.backend.reject((0, 0), -errno.ENOSPC))
    desk.copy(0, 0)
    other = desk.write(0, 1, data(2))
    desk.place(0)
    desk.copy(0)
    desk.serve(0)
    assert other.result == SECTOR_BYTES


def test_a_failed_write_that_waits_for_its_data_is_copied_into_scratch_first() -> None:
    desk = Desk(**OWN)
    request = desk.write(0, 0, data(7))
    desk.send()
    assert desk.backend is not None
    desk.queue.input(desk.backend.reject((0, 0), -errno.ENOSPC))
    assert desk.state(0) is State.FAILING and request.result is None
    desk.copy(0)
    desk.driver.consume()
    assert request.result == -errno.ENOSPC
    assert desk.side.scratch.view[:SECTOR_BYTES] == data(7)


@pytest.mark.parametrize("need_get_data", [False, True])
def test_an_unsupported_operation_is_answered_eopnotsupp(need_get_data: bool) -> None:
    desk = Desk(need_get_data=need_get_data)
    request = desk.other(0, 15)
    desk.driver.consume()
    assert request.result == -errno.EOPNOTSUPP
    assert desk.side.statistics.unsupported == 1


def test_fua_and_nounmap_pass_through() -> None:
    desk = Desk()
    desk.write(0, 0, data(1), IOD_FUA)
    desk.copy(0)
    desk.other(1, Op.WRITE_ZEROES, flags=IOD_NOUNMAP)
    desk.other(2, Op.WRITE_ZEROES)
    assert [each.flags for each in desk.send()] == [Flag.FUA, Flag.NOUNMAP, 0]


def test_an_offset_of_seven_exbibytes_arrives_whole() -> None:
    desk = Desk(first_sector=FAR_SECTOR)
    request = desk.write(0, FAR_SECTOR + 5, data(3))
    desk.copy(0)
    (given,) = desk.send()
    assert given.offset == (7 << 60) + 5 * SECTOR_BYTES
    desk.serve(0)
    assert request.result == SECTOR_BYTES


def test_a_discard_may_exceed_four_gibibytes() -> None:
    desk = Desk()
    desk.driver.deliver(0, Request(Op.DISCARD, 0, (1 << 32) - 1))
    (given,) = desk.send()
    assert given.length == ((1 << 32) - 1) * SECTOR_BYTES


def test_requests_wait_for_a_backend_instead_of_failing() -> None:
    desk = Desk(connected=False)
    write, read = desk.write(0, 0, data(1)), desk.read(1, 9)
    desk.copy(0)
    assert (desk.state(0), desk.state(1)) == (State.WAIT_LINK, State.WAIT_LINK)
    desk.connect()
    desk.serve(0)
    desk.serve(1)
    assert write.result == read.result == SECTOR_BYTES


def test_replay_is_in_order_of_arrival_and_says_so() -> None:
    desk = Desk(need_get_data=False, depth=8)
    order = [5, 2, 7, 0]
    for tag in order:
        desk.write(tag, tag, data(tag))
    desk.send()
    desk.kill()
    desk.write(1, 1, data(1))
    successor = desk.connect()
    replayed = [(each.tag, each.flags) for each in successor.seen if each.kind == Kind.REQUEST]
    assert replayed == [*((tag, Flag.REPLAY) for tag in order), (1, 0)]
    assert desk.side.statistics.replays == 4


def test_an_answered_request_is_not_replayed() -> None:
    desk = Desk(need_get_data=False)
    desk.write(0, 0, data(1))
    desk.serve(0)
    desk.kill()
    assert [each.kind for each in desk.connect().seen] == [Kind.WELCOME]


@pytest.mark.parametrize("when", ["copying", "copied", "serving"])
def test_a_backend_that_dies_with_the_data_has_it_carried_to_its_successor(when: str) -> None:
    desk = Desk(**OWN)
    request = desk.write(0, 8, data(6, 2))
    desk.place(0)
    if when == "copying":
        desk.kill()
        desk.copy(0)
    else:
        if when == "copied":
            desk.queue.cut()
        desk.copy(0)
        desk.kill()
    statistics = desk.side.statistics
    assert (statistics.rescues, statistics.own_copy_bytes) == (1, 2 * SECTOR_BYTES)
    assert desk.side.idle_segments() == [2]
    (given,) = [each for each in desk.connect().seen if each.kind == Kind.REQUEST]
    assert given.segment == 1 and bool(given.flags & Flag.REPLAY) == (when == "serving")
    desk.serve(0)
    assert request.result == 2 * SECTOR_BYTES
    assert desk.store.read(8 * SECTOR_BYTES, 2 * SECTOR_BYTES) == request.data


def test_a_write_whose_place_was_not_named_yet_asks_the_successor() -> None:
    desk = Desk(**OWN)
    desk.write(0, 0, data(1))
    desk.send()
    desk.kill()
    assert desk.state(0) is State.WAIT_PLACE
    assert kinds(desk.connect().seen) == [Kind.WELCOME, Kind.PLACE]


def test_a_segment_stays_until_the_read_in_it_was_taken() -> None:
    desk = Desk(**OWN)
    request = desk.read(0, 0)
    desk.send()
    assert desk.backend is not None
    desk.backend.execute((0, 0))
    desk.queue.input(desk.backend.answer((0, 0)))
    desk.kill()
    assert desk.side.idle_segments() == []
    desk.driver.consume()
    assert request.result == SECTOR_BYTES and desk.side.idle_segments() == [2]


@pytest.mark.parametrize("name", STALE)
def test_no_answer_of_an_old_epoch_or_request_is_believed(name: str) -> None:
    desk = Desk()
    request = desk.read(0, 0)
    desk.send()
    desk.lie(0, STALE[name])
    assert desk.side.statistics.stale_answers == 1
    assert desk.queue.link is Link.UP and desk.state(0) is State.SERVING
    desk.serve(0)
    assert request.result == SECTOR_BYTES


@pytest.mark.parametrize("placing", [False, True])
@pytest.mark.parametrize("name", CUT)
def test_a_lie_that_says_nothing_of_the_request_leaves_it_to_the_successor(name: str, placing: bool) -> None:
    desk = Desk(place_in_backend=placing)
    lied_on, other = desk.write(0, 0, data(1)), desk.read(1, 1)
    if not placing:
        desk.copy(0)
    desk.send()
    desk.lie(0, CUT[name])
    assert desk.queue.link is Link.CUT and desk.queue.attention() & Attention.CUT
    desk.kill()
    desk.connect()
    if placing:
        desk.place(0)
        desk.copy(0)
    desk.serve(0)
    desk.serve(1)
    assert lied_on.result == other.result == SECTOR_BYTES


@pytest.mark.parametrize("name", [*REGIONS, *REJECTS])
def test_a_wrong_region_or_refusal_fails_its_write_and_cuts_the_link(name: str) -> None:
    desk = Desk(**OWN)
    request, other = desk.write(0, 0, data(1)), desk.write(1, 1, data(2))
    desk.send()
    desk.lie(0, {**REGIONS, **REJECTS}[name])
    assert desk.queue.link is Link.CUT and desk.state(0) is State.FAILING
    desk.copy(0)
    desk.driver.consume()
    assert request.result == -errno.EIO and other.result is None


@pytest.mark.parametrize("shift", [-512, 0, 512])
def test_a_region_that_is_lent_to_another_tag_is_refused(shift: int) -> None:
    desk = Desk(**OWN)
    desk.write(0, 0, data(1, 2))
    desk.place(0)
    lent = desk.driver.named[0][1]
    desk.write(1, 8, data(2, 2))
    desk.send()
    desk.lie(1, lambda scene: scene.region(max(0, lent + shift)).pack())
    assert desk.queue.link is Link.CUT and "lent" in desk.queue.violation()


@pytest.mark.parametrize("name", [*REGIONS, *RESULTS])
@pytest.mark.parametrize("own", [False, True])
def test_a_wrong_read_answer_fails_the_read_when_the_backend_is_gone(name: str, own: bool) -> None:
    desk = Desk(reads_own=own)
    request = desk.read(0, 0)
    desk.send()
    desk.lie(0, {**REGIONS, **RESULTS}[name])
    assert desk.queue.link is Link.CUT
    desk.driver.consume()
    assert request.result is None, "the backend may still write into the buffer"
    desk.kill()
    desk.driver.consume()
    assert request.result == -errno.EIO


def test_a_second_answer_cuts_the_link_and_changes_nothing() -> None:
    desk = Desk(need_get_data=False)
    request = desk.write(0, 0, data(1))
    desk.serve(0)
    desk.lie(0, lambda scene: scene.done(SECTOR_BYTES).pack())
    assert desk.queue.link is Link.CUT and desk.driver.consume() == 0
    assert request.result == SECTOR_BYTES


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_moving_nothing_is_an_error_and_not_an_endless_loop(op: Op) -> None:
    desk = Desk(need_get_data=False)
    request = desk.read(0, 0) if op is Op.READ else desk.write(0, 0, data(1))
    desk.send()
    desk.lie(0, lambda scene: scene.done(0).pack())
    desk.driver.consume()
    assert request.result == -errno.EIO


def test_answers_to_what_was_never_sent_cut_the_link_before_the_output_is_full() -> None:
    desk = Desk(need_get_data=False, depth=1)
    for sequence in range(1, 40):
        if desk.queue.link is not Link.UP:
            break
        desk.read(0, 0)
        guess = Descriptor(Kind.DONE, device=7, epoch=3, sequence=sequence, result=SECTOR_BYTES)
        desk.queue.input(guess.pack())
        desk.driver.consume()
    assert desk.queue.link is Link.CUT
    desk.side.check()


def test_a_cut_by_the_owner_is_nobodys_violation() -> None:
    desk = Desk()
    desk.queue.cut()
    assert desk.queue.link is Link.CUT and desk.side.statistics.violations == 0


@pytest.mark.parametrize(("epoch", "link"), [(2, Link.UP), (3, Link.UP), (4, Link.CUT)])
def test_a_hello_may_come_from_an_earlier_epoch_but_not_from_a_later_one(epoch: int, link: Link) -> None:
    desk = Desk(connected=False)
    assert desk.queue.expect(0, NULL, 0, False)
    desk.queue.input(Descriptor(Kind.HELLO, device=DEVICE, epoch=epoch).pack())
    assert desk.queue.link is link
    assert desk.side.statistics.violations == (link is Link.CUT)


def test_a_new_link_is_not_blamed_with_the_words_of_the_last() -> None:
    desk = Desk(timeout_ms=1000, fail_on_timeout=True)
    desk.read(0, 0)
    desk.send()
    desk.lie(0, CUT["foreign device"])
    desk.kill()
    desk.connect()
    desk.queue.tick(2000)
    assert desk.queue.violation() == "no answer within io_timeout_s"


@pytest.mark.parametrize("fails", [False, True])
def test_a_silent_backend_is_waited_for_or_cut_off_as_the_device_says(fails: bool) -> None:
    desk = Desk(timeout_ms=1000, fail_on_timeout=fails)
    request = desk.read(0, 0)
    desk.send()
    desk.queue.tick(999)
    assert not desk.queue.attention() & Attention.SILENT
    desk.queue.tick(1200)
    assert desk.queue.attention() & Attention.SILENT
    assert desk.queue.link is (Link.CUT if fails else Link.UP)
    desk.driver.consume()
    assert request.result is None
    if fails:
        desk.kill()
        desk.driver.consume()
        assert request.result == -errno.EIO


def test_what_waits_past_its_deadline_for_a_backend_fails_if_the_device_says_so() -> None:
    desk = Desk(connected=False, timeout_ms=1000, fail_on_timeout=True)
    request = desk.read(0, 0)
    desk.queue.tick(5000)
    desk.driver.consume()
    assert request.result == -errno.ETIMEDOUT


def test_a_waiter_that_fails_leaves_the_others_in_line() -> None:
    desk = Desk(spare=0, timeout_ms=1000, fail_on_timeout=True)
    holder, first = desk.read(0, 0), desk.read(1, 1)
    desk.queue.tick(500)
    later = [desk.read(2, 2), desk.read(3, 3)]
    desk.queue.tick(1200)
    desk.kill()
    desk.driver.consume()
    assert (holder.result, first.result) == (-errno.EIO, -errno.ETIMEDOUT)
    desk.connect()
    desk.serve(2)
    desk.serve(3)
    assert [each.result for each in later] == [SECTOR_BYTES] * 2


def test_giving_up_fails_what_waits_and_what_comes() -> None:
    desk = Desk(connected=False, place_in_backend=True)
    waiting, read = desk.write(0, 0, data(1)), desk.read(1, 0)
    desk.queue.give_up()
    later = desk.write(2, 8, data(2))
    desk.copy(0)
    desk.copy(2)
    desk.driver.consume()
    assert waiting.result == read.result == later.result == -errno.EIO


def test_a_backend_that_stays_away_fails_what_waits_and_what_comes_until_the_next_is_there() -> None:
    desk = Desk(connected=False, place_in_backend=True, absent_ms=1000)
    desk.queue.tick(5000)
    waiting, read = desk.write(0, 0, data(1)), desk.read(1, 0)
    desk.queue.tick(5999)
    assert desk.state(0) is State.WAIT_PLACE and not desk.queue.attention() & Attention.ABSENT
    desk.queue.tick(6000)
    assert desk.queue.attention() & Attention.ABSENT
    later = desk.write(2, 8, data(2))
    desk.copy(0)
    desk.copy(2)
    desk.driver.consume()
    assert waiting.result == read.result == later.result == -errno.EIO
    desk.queue.clear(Attention.ABSENT)
    desk.queue.tick(9000)
    assert not desk.queue.attention() & Attention.ABSENT, "said once"
    desk.connect()
    after = desk.read(1, 0)
    desk.serve(1)
    assert after.result == SECTOR_BYTES


def test_every_absence_is_waited_for_anew() -> None:
    desk = Desk(absent_ms=1000)
    desk.queue.tick(5000)
    request = desk.read(0, 0)
    desk.kill()
    desk.queue.tick(5400)
    desk.connect()
    desk.kill()
    desk.queue.tick(6399)
    desk.queue.tick(7398)
    assert desk.state(0) is State.WAIT_LINK
    desk.queue.tick(7399)
    desk.driver.consume()
    assert request.result == -errno.EIO


def test_a_backend_that_was_cut_off_is_absent_but_keeps_what_it_holds_until_it_is_dead() -> None:
    desk = Desk(absent_ms=1000)
    held = desk.read(0, 0)
    desk.send()
    desk.queue.cut()
    desk.queue.tick(1)
    desk.queue.tick(1001)
    assert desk.queue.attention() & Attention.ABSENT and desk.state(0) is State.SERVING
    desk.kill()
    desk.driver.consume()
    assert held.result == -errno.EIO


@pytest.mark.parametrize("fence", [False, True])
def test_a_backend_that_is_expected_is_not_absent(fence: bool) -> None:
    desk = Desk(connected=False, absent_ms=1000)
    backend = desk.expect(fence)
    request = desk.read(0, 0)
    for now_ms in (1, 5000, 9000):
        desk.queue.tick(now_ms)
    desk.queue.input(backend.hello(0))
    desk.queue.tick(20000)
    assert request.result is None and not desk.queue.attention() & Attention.ABSENT


def test_giving_up_lets_a_living_backend_finish() -> None:
    desk = Desk()
    request = desk.read(0, 0)
    desk.queue.give_up()
    desk.serve(0)
    assert request.result == SECTOR_BYTES


def test_at_a_stop_every_tag_goes_and_every_buffer_is_back() -> None:
    desk = Desk()
    copying, serving = desk.write(0, 0, data(1)), desk.read(1, 0)
    desk.driver.consume()
    desk.driver.stop()
    assert copying.result == -errno.EIO and desk.driver.holders[1] is Holder.SERVER
    desk.serve(1)
    assert serving.result == SECTOR_BYTES
    assert desk.queue.attention() & Attention.GONE and desk.queue.in_flight == 0
    desk.rig.give_all_back()
    assert [each.free for each in desk.rig.table.statistics().classes] == [3, 3]


def test_a_recall_is_paid_before_waiters_but_never_out_of_the_reserve() -> None:
    desk = Desk(spare=1)
    reads = [desk.read(0, 0)]
    desk.rig.settle(0)
    reads += [desk.read(tag, tag) for tag in (1, 2)]
    assert desk.state(2) is State.WAIT_BUFFER
    desk.queue.stock_recall(0, 9)
    desk.serve(0)
    assert desk.state(2) is State.WAIT_BUFFER and dict(desk.queue.stock_wants())[0] == -1
    assert len(desk.queue.stock_take(0, 1)) == 1
    for tag in (1, 2):
        desk.serve(tag)
    assert [each.result for each in reads] == [SECTOR_BYTES] * 3


def test_a_second_burst_has_every_buffer_that_is_free() -> None:
    """Two queues, six large buffers: one of them can hold five, and wishes for more must not be waited for."""
    desk = Desk(queues=2, depth=16, spare=4)
    for burst in range(3):
        reads = [desk.read(tag, 16 * tag, 16) for tag in range(8)]
        desk.rig.settle(0)
        serving = [tag for tag in range(8) if desk.state(tag) is State.SERVING]
        assert len(serving) == 5, f"burst {burst}: {len(serving)} at once"
        waiting = set(range(8))
        while waiting:
            now = [tag for tag in waiting if desk.state(tag) is State.SERVING]
            assert now, "nobody is served"
            for tag in now:
                desk.serve(tag)
            waiting.difference_update(now)
            desk.rig.settle(0)
        assert [each.result for each in reads] == [16 * SECTOR_BYTES] * 8
        assert len(desk.queue.stock_held(1)) < 5, "the stock goes back between bursts"
