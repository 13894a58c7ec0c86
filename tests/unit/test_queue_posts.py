"""Posted regions: writes land there without a PLACE, and every other rule still holds."""

import pytest

from support.fakes.driver import SECTOR_BYTES
from support.fakes.liar import posts_that_lie
from support.fakes.queue_desk import Desk
from ublkpool.bufpool.wire import Descriptor, Kind
from ublkpool.ublk.queue import LinkState
from ublkpool.workers.tag_state import State

OWN = {"place_in_backend": True, "posts": True}
SMALL, LARGE = 4096, 16384
UNUSABLE = "a region posted that no write can use"
LENT = "a region that is lent to another tag"


def data(number: int, sectors: int = 1) -> bytes:
    return bytes([number]) * (sectors * SECTOR_BYTES)


def post(desk: Desk, buffer: int, size: int) -> Descriptor:
    """A correct POST of a region of the backend."""
    assert desk.backend is not None
    posted = desk.backend.post_at(0, buffer, size)
    desk.backend.posted[0, buffer] = size
    desk.driver.posted.add((posted.segment, buffer))
    desk.queue.input(posted.pack())
    return posted


def said(desk: Desk) -> list[tuple[int, int]]:
    return [(each.kind, each.buffer) for each in desk.send()]


def is_cut_for(desk: Desk, reason: str = "") -> bool:
    return desk.queue.link is LinkState.CUT and desk.queue.violation().startswith(reason)


def test_a_write_lands_in_a_posted_region_without_a_place() -> None:
    desk = Desk(**OWN)
    post(desk, SMALL, SMALL)
    request = desk.write(0, 8, data(1, 4))
    assert desk.state(0) is State.COPYING and said(desk) == []
    desk.copy(0)
    assert said(desk) == [(Kind.DATA, SMALL)]
    desk.serve(0)
    assert request.result == len(request.data)
    assert desk.store.read(8 * SECTOR_BYTES, 4 * SECTOR_BYTES) == request.data
    assert said(desk) == [(Kind.RELEASE, SMALL)]
    assert (desk.side.statistics.posts, desk.side.statistics.posts_used) == (1, 1)


def test_a_write_takes_the_smallest_that_fits_and_asks_if_none_does() -> None:
    desk = Desk(**OWN)
    post(desk, 0, SMALL)
    post(desk, LARGE, LARGE)
    desk.write(0, 0, data(1, 9))
    desk.write(1, 16, data(2, 8))
    desk.write(2, 24, data(3, 1))
    desk.copy(0)
    desk.copy(1)
    assert said(desk) == [(Kind.PLACE, 0), (Kind.DATA, LARGE), (Kind.DATA, 0)]
    assert desk.state(2) is State.PLACING


def test_a_small_write_takes_a_large_region_rather_than_ask() -> None:
    desk = Desk(**OWN)
    post(desk, LARGE, LARGE)
    desk.write(0, 0, data(1))
    desk.copy(0)
    assert said(desk) == [(Kind.DATA, LARGE)]


@pytest.mark.parametrize("name", posts_that_lie(Descriptor(Kind.POST, segment=2, length=SMALL), LARGE, 512))
def test_a_wrong_post_cuts_the_link(name: str) -> None:
    desk = Desk(**OWN)
    assert desk.backend is not None
    true = desk.backend.post_at(0, 0, SMALL)
    lies = posts_that_lie(true, desk.backend.segment.size_bytes, desk.rig.plan.block_bytes)
    desk.queue.input(lies[name].pack())
    assert is_cut_for(desk)
    assert desk.side.statistics.posts == 0


def test_with_placement_pool_a_post_cuts_the_link() -> None:
    desk = Desk(reads_own=True)
    assert desk.backend is not None
    desk.queue.input(desk.backend.post_at(0, 0, SMALL).pack())
    assert is_cut_for(desk, UNUSABLE)


@pytest.mark.parametrize("shift", [-LARGE + 512, -512, 0, 512, LARGE - 512])
def test_a_posted_region_may_not_be_posted_again_even_in_part(shift: int) -> None:
    desk = Desk(**OWN)
    assert desk.backend is not None
    post(desk, LARGE, LARGE)
    desk.queue.input(desk.backend.post_at(0, LARGE + shift, LARGE).pack())
    assert is_cut_for(desk, LENT)


@pytest.mark.parametrize("shift", [-SMALL + 512, 0, LARGE - 512])
def test_what_is_lent_may_not_be_posted(shift: int) -> None:
    """The whole region is lent, including the part that the write does not fill."""
    desk = Desk(**OWN)
    assert desk.backend is not None
    post(desk, LARGE, LARGE)
    desk.write(0, 0, data(1))
    desk.queue.input(desk.backend.post_at(0, LARGE + shift, SMALL).pack())
    assert is_cut_for(desk, LENT)


def test_a_released_region_may_be_posted_again_or_named_for_a_write() -> None:
    desk = Desk(**OWN)
    for tag in (0, 1):
        post(desk, LARGE, LARGE)
        request = desk.write(tag, 8 * tag, data(tag + 1))
        desk.copy(tag)
        desk.serve(tag)
        assert request.result == SECTOR_BYTES
        assert said(desk)[-1] == (Kind.RELEASE, LARGE)
    desk.write(2, 0, data(3))
    (asked,) = desk.send()
    assert desk.backend is not None
    named = asked.answer(Kind.PLACED)._replace(segment=desk.backend.segment.number, buffer=LARGE + SMALL)
    desk.queue.input(named.pack())
    assert desk.state(2) is State.COPYING and desk.queue.link is LinkState.UP


def test_regions_side_by_side_may_be_posted() -> None:
    desk = Desk(**OWN)
    for buffer in (LARGE, 0, 2 * LARGE):
        post(desk, buffer, LARGE)
    post(desk, 3 * LARGE, SMALL)
    assert desk.queue.link is LinkState.UP and desk.side.statistics.posts == 4


def test_a_posted_region_may_not_be_named_for_a_write() -> None:
    desk = Desk(**OWN)
    assert desk.backend is not None
    desk.write(0, 0, data(1))
    (asked,) = desk.send()
    post(desk, LARGE, LARGE)
    placed = asked.answer(Kind.PLACED)._replace(segment=desk.backend.segment.number, buffer=2 * LARGE - 512)
    desk.queue.input(placed.pack())
    assert is_cut_for(desk, LENT)


def test_at_most_depth_regions_of_each_size_may_be_posted() -> None:
    desk = Desk(depth=3, **OWN)
    assert desk.backend is not None
    for number in range(3):
        post(desk, number * SMALL, SMALL)
    post(desk, 2 * LARGE, LARGE)
    desk.write(0, 0, data(1))
    post(desk, 3 * SMALL, SMALL)
    assert desk.queue.link is LinkState.UP
    desk.queue.input(desk.backend.post_at(0, 3 * LARGE, SMALL).pack())
    assert is_cut_for(desk, UNUSABLE)


def test_a_write_without_copied_data_returns_its_region() -> None:
    desk = Desk(**OWN)
    post(desk, 0, SMALL)
    desk.write(0, 8, data(1, 2))
    desk.copy(0, 0)
    assert said(desk) == []
    desk.driver.deliver(0, desk.driver.again.popleft())
    assert said(desk) == [(Kind.RELEASE, 0), (Kind.PLACE, 0)]


def test_all_regions_that_come_back_unused_fit_the_output() -> None:
    """The driver sends a write repeatedly while the backend reads nothing."""
    depth, sizes, largest = 20, (4096, 8192, 12288), 1 << 16
    desk = Desk(depth=depth, sizes=sizes, max_io_bytes=largest, **OWN)
    regions = [size for size in (*sizes, largest) for _ in range(depth)]
    for number, size in enumerate(regions):
        post(desk, sum(regions[:number]), size)
    desk.write(0, 8, data(1, 2))
    for _ in regions:
        desk.copy(0, 0)
        desk.driver.deliver(0, desk.driver.again.popleft())
    for tag in range(1, depth):
        desk.write(tag, 8 * tag, data(tag))
    assert desk.queue.link is LinkState.UP
    words = [kind for kind, _ in said(desk)]
    assert (words.count(Kind.RELEASE), words.count(Kind.PLACE)) == (len(regions), depth)


def test_posts_of_a_dead_backend_are_forgotten() -> None:
    desk = Desk(**OWN)
    post(desk, 0, SMALL)
    desk.kill()
    desk.connect()
    desk.write(0, 0, data(1))
    assert said(desk) == [(Kind.PLACE, 0)]


def test_data_in_a_posted_region_is_copied_for_the_next_backend() -> None:
    desk = Desk(**OWN)
    post(desk, 0, SMALL)
    request = desk.write(0, 8, data(7, 2))
    desk.copy(0)
    desk.send()
    desk.kill()
    desk.connect()
    desk.rig.settle(0)
    desk.serve(0)
    assert request.result == len(request.data) and desk.side.statistics.rescues == 1
    assert desk.store.read(8 * SECTOR_BYTES, 2 * SECTOR_BYTES) == request.data


def test_a_copy_into_a_dead_backends_post_reaches_the_next_backend() -> None:
    desk = Desk(**OWN)
    post(desk, 0, SMALL)
    request = desk.write(0, 8, data(7, 2))
    desk.driver.consume()
    desk.kill()
    desk.copy(0)
    desk.connect()
    desk.rig.settle(0)
    desk.serve(0)
    assert request.result == len(request.data) and desk.side.statistics.rescues == 1


def test_a_post_to_the_previous_worker_is_dropped_and_counted() -> None:
    desk = Desk(**OWN)
    assert desk.backend is not None
    old = desk.backend.post_at(0, 0, SMALL)
    desk.queue.input(old._replace(epoch=old.epoch - 1).pack())
    assert desk.queue.link is LinkState.UP
    assert (desk.side.statistics.stale_answers, desk.side.statistics.posts) == (1, 0)


def test_posts_before_hello_cut_the_link() -> None:
    desk = Desk(connected=False, **OWN)
    desk.queue.input(desk.expect().post_at(0, 0, SMALL).pack())
    assert is_cut_for(desk, "unsolicited answer")


def test_posts_before_fenced_serve_writes_after_it() -> None:
    desk = Desk(connected=False, **OWN)
    backend = desk.connect(fence=True)
    post(desk, 0, SMALL)
    desk.write(0, 0, data(1))
    desk.write(1, 8, data(2))
    assert said(desk) == [] and desk.queue.link is LinkState.FENCING
    desk.queue.input(Descriptor(Kind.FENCED, device=7, epoch=backend.seen[-1].epoch).pack())
    assert said(desk) == [(Kind.PLACE, 0)]
    assert (desk.state(0), desk.state(1)) == (State.COPYING, State.PLACING)
