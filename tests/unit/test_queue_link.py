"""The queue core and its backend, one scenario each: deaths, hang-ups, wrong answers and too many answers."""

import errno

import pytest

from support.fakes.driver import SECTOR_BYTES
from support.fakes.liar import CUT, REGIONS, REJECTS, RESULTS, STALE
from support.fakes.queue_desk import OWN, Desk, data, kinds
from support.fakes.queue_rig import DEVICE
from ublkpool.bufpool.wire import Descriptor, Flag, Kind
from ublkpool.ublk.queue import NULL, Attention, LinkState
from ublkpool.workers.tag_state import State


@pytest.mark.parametrize("cut", [False, True])
def test_a_write_whose_answer_was_not_read_is_replayed_whole(cut: bool) -> None:
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


def test_a_backend_that_stops_reading_fills_the_output_and_breaks_no_rule() -> None:
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
    assert len(desk.queue.output()) // 64 == 2 * depth and desk.queue.link is LinkState.UP
    desk.queue.hold_output(True)
    assert not desk.queue.attention() & Attention.OUTPUT, "a full transport is no reason to come back at once"
    desk.queue.hold_output(False)
    assert desk.queue.attention() & Attention.OUTPUT


def test_requests_wait_for_a_backend_instead_of_failing() -> None:
    desk = Desk(connected=False)
    write, read = desk.write(0, 0, data(1)), desk.read(1, 9)
    desk.copy(0)
    assert (desk.state(0), desk.state(1)) == (State.WAIT_LINK, State.WAIT_LINK)
    desk.connect()
    desk.serve(0)
    desk.serve(1)
    assert write.result == read.result == SECTOR_BYTES


def test_replay_is_in_order_of_arrival_and_flagged() -> None:
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
def test_the_data_of_a_dead_backend_is_copied_for_the_next(when: str) -> None:
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


def test_a_write_without_a_named_region_asks_the_next_backend() -> None:
    desk = Desk(**OWN)
    desk.write(0, 0, data(1))
    desk.send()
    desk.kill()
    assert desk.state(0) is State.WAIT_PLACE
    assert kinds(desk.connect().seen) == [Kind.WELCOME, Kind.PLACE]


def test_a_segment_stays_mapped_until_the_kernel_took_the_read_in_it() -> None:
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
def test_an_answer_of_an_old_epoch_or_request_is_dropped(name: str) -> None:
    desk = Desk()
    request = desk.read(0, 0)
    desk.send()
    desk.lie(0, STALE[name])
    assert desk.side.statistics.stale_answers == 1
    assert desk.queue.link is LinkState.UP and desk.state(0) is State.SERVING
    desk.serve(0)
    assert request.result == SECTOR_BYTES


@pytest.mark.parametrize("placing", [False, True])
@pytest.mark.parametrize("name", CUT)
def test_a_violation_not_about_the_request_leaves_it_to_the_next_backend(name: str, placing: bool) -> None:
    desk = Desk(place_in_backend=placing)
    lied_on, other = desk.write(0, 0, data(1)), desk.read(1, 1)
    if not placing:
        desk.copy(0)
    desk.send()
    desk.lie(0, CUT[name])
    assert desk.queue.link is LinkState.CUT and desk.queue.attention() & Attention.CUT
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
    assert desk.queue.link is LinkState.CUT and desk.state(0) is State.FAILING
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
    assert desk.queue.link is LinkState.CUT and "lent" in desk.queue.violation()


@pytest.mark.parametrize("name", [*REGIONS, *RESULTS])
@pytest.mark.parametrize("own", [False, True])
def test_a_wrong_read_answer_fails_the_read_when_the_backend_is_gone(name: str, own: bool) -> None:
    desk = Desk(reads_own=own)
    request = desk.read(0, 0)
    desk.send()
    desk.lie(0, {**REGIONS, **RESULTS}[name])
    assert desk.queue.link is LinkState.CUT
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
    assert desk.queue.link is LinkState.CUT and desk.driver.consume() == 0
    assert request.result == SECTOR_BYTES


def test_answers_to_unsent_requests_cut_the_link_before_the_output_is_full() -> None:
    desk = Desk(need_get_data=False, depth=1)
    for sequence in range(1, 40):
        if desk.queue.link is not LinkState.UP:
            break
        desk.read(0, 0)
        guess = Descriptor(Kind.DONE, device=7, epoch=3, sequence=sequence, result=SECTOR_BYTES)
        desk.queue.input(guess.pack())
        desk.driver.consume()
    assert desk.queue.link is LinkState.CUT
    desk.side.check()


def test_a_cut_by_the_worker_is_no_violation() -> None:
    desk = Desk()
    desk.queue.cut()
    assert desk.queue.link is LinkState.CUT and desk.side.statistics.violations == 0


@pytest.mark.parametrize(("epoch", "link"), [(2, LinkState.UP), (3, LinkState.UP), (4, LinkState.CUT)])
def test_a_hello_may_come_from_an_earlier_epoch_but_not_from_a_later_one(epoch: int, link: LinkState) -> None:
    desk = Desk(connected=False)
    assert desk.queue.expect(0, NULL, 0, False)
    desk.queue.input(Descriptor(Kind.HELLO, device=DEVICE, epoch=epoch).pack())
    assert desk.queue.link is link
    assert desk.side.statistics.violations == (link is LinkState.CUT)


def test_a_new_link_is_not_cut_for_descriptors_of_the_last() -> None:
    desk = Desk(timeout_ms=1000, fail_on_timeout=True)
    desk.read(0, 0)
    desk.send()
    desk.lie(0, CUT["foreign device"])
    desk.kill()
    desk.connect()
    desk.queue.tick(2000)
    assert desk.queue.violation() == "no answer within io_timeout_s"
