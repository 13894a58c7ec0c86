"""The queue core's limits for a backend: stale descriptors, silence, a hang-up, a pool that it keeps mapped."""

import os

import pytest

from support.fakes.driver import SECTOR_BYTES
from support.fakes.liar import STALE
from support.fakes.queue_desk import Desk
from support.fakes.queue_rig import DEVICE
from ublkpool.bufpool.wire import Descriptor, Kind, Op
from ublkpool.ublk import mappings
from ublkpool.ublk import queue as core
from ublkpool.ublk.queue import HELLO_TIMEOUT_MS, Attention, LinkState
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


def link_of(desk: Desk) -> LinkState:
    """The link's present state; a function, so that mypy does not narrow it."""
    return desk.queue.link


@pytest.mark.parametrize("name", STALE)
def test_stale_answers_are_dropped_up_to_a_limit(name: str) -> None:
    desk = served()
    for _ in range(STALE_MAX):
        desk.lie(0, STALE[name])
    assert desk.queue.link is LinkState.UP
    desk.lie(0, STALE[name])
    assert link_of(desk) is LinkState.CUT and "too many" in desk.queue.violation()
    assert (desk.side.statistics.stale_answers, desk.side.statistics.violations) == (STALE_MAX + 1, 1)


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.FENCED])
def test_stale_descriptors_about_the_link_count_too(kind: Kind) -> None:
    desk = served()
    desk.queue.input(Descriptor(kind, device=DEVICE, epoch=EPOCH - 1).pack() * (STALE_MAX + 1))
    assert desk.queue.link is LinkState.CUT


def test_the_next_backend_starts_with_counts_of_zero() -> None:
    desk = served()
    for _ in range(STALE_MAX):
        desk.lie(0, STALE["old epoch"])
    desk.kill()
    desk.connect()
    desk.send()
    desk.lie(0, STALE["old epoch"])
    assert desk.queue.link is LinkState.UP


@pytest.mark.parametrize("fence", [False, True])
def test_a_backend_that_never_says_hello_is_cut_off(fence: bool) -> None:
    desk = Desk(connected=False)
    desk.queue.tick(1000)
    desk.expect(fence)
    desk.queue.tick(1000 + HELLO_TIMEOUT_MS - 1)
    assert desk.queue.link is LinkState.EXPECTED
    desk.queue.tick(1000 + HELLO_TIMEOUT_MS)
    assert link_of(desk) is LinkState.CUT and "HELLO" in desk.queue.violation()
    assert desk.queue.attention() & Attention.CUT and desk.side.statistics.violations == 1


def test_a_backend_that_said_hello_may_be_silent_while_nothing_is_asked() -> None:
    desk = Desk()
    desk.queue.tick(10 * HELLO_TIMEOUT_MS)
    assert desk.queue.link is LinkState.UP


def test_after_a_hang_up_nothing_passes_and_the_next_backend_gets_every_request() -> None:
    desk = served()
    answer = Descriptor(Kind.DONE, Op.READ, device=DEVICE, epoch=EPOCH, sequence=1, result=SECTOR_BYTES)
    desk.queue.hung_up()
    desk.read(1, 8)
    desk.queue.input(answer.pack())
    assert desk.queue.link is LinkState.CUT and not desk.queue.output()
    assert (desk.side.statistics.hangups, desk.side.statistics.violations) == (1, 0)
    desk.kill()
    desk.connect()
    for tag in range(2):
        desk.serve(tag)
    assert desk.side.statistics.replays == 1


def test_without_a_served_link_a_hang_up_changes_nothing() -> None:
    desk = Desk(connected=False)
    desk.queue.hung_up()
    desk.expect()
    desk.queue.hung_up()
    assert desk.queue.link is LinkState.EXPECTED and not desk.side.statistics.hangups


@pytest.mark.parametrize("need_get_data", [True, False])
def test_what_requests_have_in_the_pool_comes_along_into_other_memory(need_get_data: bool) -> None:
    """A process with the old memory neither sees nor changes the next backend's data."""
    desk = Desk(spare=8, need_get_data=need_get_data, connected=False)
    size_bytes = desk.rig.pool.size_bytes
    old, fresh = (mappings.sealed_memory(size_bytes, name) for name in ("old", "fresh"))
    desk.queue.change_pool(old, size_bytes)
    desk.connect()
    requests = [desk.write(tag, 8 * tag, DATA) for tag in range(3)]
    desk.rig.settle(0)
    for tag in range(2) if need_get_data else ():
        desk.copy(tag)
    desk.send()
    desk.kill()
    desk.queue.change_pool(fresh, size_bytes)
    os.pwrite(old, b"x" * size_bytes, 0)
    if need_get_data:
        # The driver got its address before, and copies there.
        desk.copy(2)
    desk.connect()
    for tag in range(3):
        desk.serve(tag)
    assert [each.result for each in requests] == [SECTOR_BYTES] * 3
    assert [desk.store.read(8 * tag * SECTOR_BYTES, SECTOR_BYTES) for tag in range(3)] == [DATA] * 3
    assert os.pread(old, size_bytes, 0) == b"x" * size_bytes
    desk.side.check()
    for fd in (old, fresh):
        os.close(fd)


def test_memory_that_cannot_be_mapped_leaves_the_pool_as_it_is() -> None:
    desk = Desk()
    empty = os.memfd_create("empty")
    with pytest.raises(OSError) as failure:
        desk.queue.change_pool(empty, desk.rig.pool.size_bytes)
    os.close(empty)
    assert not isinstance(failure.value, core.PoolLost)
    request = desk.write(0, 0, DATA)
    desk.copy(0)
    desk.serve(0)
    assert request.result == SECTOR_BYTES


def test_a_backend_that_answers_what_was_not_sent_to_it_is_cut_off_when_the_output_is_full() -> None:
    """The worker sends nothing here, so each answer frees a tag for another request and adds to the output."""
    desk = Desk()
    room = 4 * 4 + 16
    for sequence in range(1, room + 1):
        desk.other(0, Op.FLUSH)
        desk.queue.input(Descriptor(Kind.DONE, device=DEVICE, epoch=EPOCH, sequence=sequence).pack())
        desk.driver.consume()
    assert desk.queue.link is LinkState.UP
    desk.other(0, Op.FLUSH)
    assert desk.queue.output() == b"" and desk.queue.attention() & Attention.CUT
    assert link_of(desk) is LinkState.CUT and desk.state(0) is State.SERVING
    desk.kill()
    assert desk.state(0) is State.WAIT_LINK
