"""What bounds a backend at the queue core: words that mean nothing, silence, a hang-up, a pool that it cut short."""

import errno

import pytest

from support.fake_driver import SECTOR_BYTES
from support.fake_liar import STALE
from support.queue_desk import Desk
from support.queue_rig import DEVICE
from ublkpool.bufpool.wire import Descriptor, Kind, Op
from ublkpool.ublk.queue import HELLO_TIMEOUT_MS, Attention, Link
from ublkpool.workers.tag_state import State

EPOCH = 3
STALE_MAX = 8 * 4 + 64
"""For the desk's depth of 4."""
DATA = b"d" * SECTOR_BYTES


def served() -> Desk:
    """A desk whose backend has a read on tag 0."""
    desk = Desk()
    desk.read(0, 0)
    desk.send()
    return desk


def link_of(desk: Desk) -> Link:
    """The link now, which mypy must not take for what it was before."""
    return desk.queue.link


@pytest.mark.parametrize("name", STALE)
def test_answers_to_what_is_over_are_dropped_but_not_for_ever(name: str) -> None:
    desk = served()
    for _ in range(STALE_MAX):
        desk.lie(0, STALE[name])
    assert desk.queue.link is Link.UP
    desk.lie(0, STALE[name])
    assert link_of(desk) is Link.CUT and "too many" in desk.queue.violation()
    assert (desk.side.statistics.stale_answers, desk.side.statistics.violations) == (STALE_MAX + 1, 1)


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.FENCED])
def test_old_words_about_the_link_count_as_well(kind: Kind) -> None:
    desk = served()
    desk.queue.input(Descriptor(kind, device=DEVICE, epoch=EPOCH - 1).pack() * (STALE_MAX + 1))
    assert desk.queue.link is Link.CUT


def test_the_next_backend_starts_with_a_clean_slate() -> None:
    desk = served()
    for _ in range(STALE_MAX):
        desk.lie(0, STALE["old epoch"])
    desk.kill()
    desk.connect()
    desk.send()
    desk.lie(0, STALE["old epoch"])
    assert desk.queue.link is Link.UP


@pytest.mark.parametrize("fence", [False, True])
def test_a_backend_that_never_says_hello_is_cut_off(fence: bool) -> None:
    desk = Desk(connected=False)
    desk.queue.tick(1000)
    desk.expect(fence)
    desk.queue.tick(1000 + HELLO_TIMEOUT_MS - 1)
    assert desk.queue.link is Link.EXPECTED
    desk.queue.tick(1000 + HELLO_TIMEOUT_MS)
    assert link_of(desk) is Link.CUT and "HELLO" in desk.queue.violation()
    assert desk.queue.attention() & Attention.CUT and desk.side.statistics.violations == 1


def test_a_backend_that_said_hello_may_be_silent_while_nothing_is_asked() -> None:
    desk = Desk()
    desk.queue.tick(10 * HELLO_TIMEOUT_MS)
    assert desk.queue.link is Link.UP


def test_after_a_hang_up_nothing_is_said_or_heard_and_the_next_backend_gets_it_all() -> None:
    desk = served()
    answer = Descriptor(Kind.DONE, Op.READ, device=DEVICE, epoch=EPOCH, sequence=1, result=SECTOR_BYTES)
    desk.queue.hung_up()
    desk.read(1, 8)
    desk.queue.input(answer.pack())
    assert desk.queue.link is Link.CUT and not desk.queue.output()
    assert (desk.side.statistics.hangups, desk.side.statistics.violations) == (1, 0)
    desk.kill()
    desk.connect()
    for tag in range(2):
        desk.serve(tag)
    assert desk.side.statistics.replays == 1


def test_who_does_not_serve_cannot_hang_up() -> None:
    desk = Desk(connected=False)
    desk.queue.hung_up()
    desk.expect()
    desk.queue.hung_up()
    assert desk.queue.link is Link.EXPECTED and not desk.side.statistics.hangups


def test_writes_whose_data_a_cut_pool_may_have_lost_fail_and_reads_go_on() -> None:
    desk = Desk(spare=8)
    requests = [desk.write(tag, 8 * tag, DATA) for tag in range(2)] + [desk.read(2, 32)]
    desk.rig.settle(0)
    desk.copy(0)
    desk.send()
    desk.queue.pool_damaged()
    assert [desk.state(tag) for tag in range(3)] == [State.SERVING, State.COPYING, State.SERVING]
    assert desk.queue.link is Link.CUT and "size" in desk.queue.violation()
    desk.kill()
    desk.copy(1)
    desk.driver.consume()
    assert [each.result for each in requests] == [-errno.EIO, -errno.EIO, None]
    desk.connect()
    desk.serve(2)
    assert requests[2].result == SECTOR_BYTES
    desk.side.check()


def test_a_damaged_pool_fails_writes_that_wait_for_a_backend() -> None:
    desk = Desk(connected=False)
    request = desk.write(0, 0, DATA)
    desk.copy(0)
    assert desk.state(0) is State.WAIT_LINK
    desk.queue.pool_damaged()
    desk.driver.consume()
    assert request.result == -errno.EIO and desk.queue.link is Link.NONE


def test_data_in_the_backends_own_segment_survives_a_damaged_pool() -> None:
    desk = Desk(place_in_backend=1)
    request = desk.write(0, 0, DATA)
    desk.place(0)
    desk.copy(0)
    desk.queue.pool_damaged()
    desk.kill()
    desk.connect()
    desk.serve(0)
    assert request.result == SECTOR_BYTES and desk.store.read(0, SECTOR_BYTES) == DATA


def test_a_backend_that_answers_what_was_not_sent_to_it_is_cut_off_when_the_output_is_full() -> None:
    """The worker sends nothing here, so each answer makes room for another request and adds to the output."""
    desk = Desk()
    room = 4 * 4 + 16
    for sequence in range(1, room + 1):
        desk.other(0, Op.FLUSH)
        desk.queue.input(Descriptor(Kind.DONE, device=DEVICE, epoch=EPOCH, sequence=sequence).pack())
        desk.driver.consume()
    assert desk.queue.link is Link.UP
    desk.other(0, Op.FLUSH)
    assert desk.queue.output() == b"" and desk.queue.attention() & Attention.CUT
    assert link_of(desk) is Link.CUT and desk.state(0) is State.SERVING
    desk.kill()
    assert desk.state(0) is State.WAIT_LINK
