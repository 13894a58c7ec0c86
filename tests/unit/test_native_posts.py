"""Regions that the native engine posts ahead: their number, their queue, and their return to the engine."""

from collections.abc import Iterator
from itertools import pairwise

import pytest

from support.fakes.native_rig import DEVICE_NUMBER, EPOCH, OWN_SEGMENT, NativeRig
from ublkpool.bufpool.engine.native import NullStorage
from ublkpool.bufpool.wire import Descriptor, Kind, Op

SMALL, LARGE = 4096, 65536
SIZE_BYTES = 1 << 30
DEPTH = 4
WELCOME = Descriptor(Kind.WELCOME, device=DEVICE_NUMBER, epoch=EPOCH)


def rig(own_bytes: int = 1 << 20, queues: int = 1) -> NativeRig:
    return NativeRig(
        NullStorage(),
        size_bytes=SIZE_BYTES,
        own_bytes=own_bytes,
        depth=DEPTH,
        queues=queues,
        post_bytes=(SMALL, LARGE),
    )


@pytest.fixture
def worker() -> Iterator[NativeRig]:
    made = rig()
    yield made
    made.close()


def posts(answers: list[Descriptor]) -> list[Descriptor]:
    return [each for each in answers if each.kind == Kind.POST]


def data(post: Descriptor, tag: int = 0, length: int = SMALL, sequence: int = 1) -> Descriptor:
    """A write that landed in a posted region."""
    return Descriptor(Kind.DATA, Op.WRITE, 0, DEVICE_NUMBER, post.queue, tag, post.epoch, sequence, 8192, length, 0,
                      OWN_SEGMENT, post.buffer)  # fmt: skip


def release(write: Descriptor) -> Descriptor:
    return write._replace(kind=Kind.RELEASE)


def place(tag: int, length: int = SMALL) -> Descriptor:
    return Descriptor(Kind.PLACE, Op.WRITE, 0, DEVICE_NUMBER, 0, tag, EPOCH, 1, 0, length)


def test_a_depth_of_each_size_is_posted_at_welcome_and_nothing_before(worker: NativeRig) -> None:
    assert worker.say([place(0)])[0].kind == Kind.PLACED
    posted = posts(worker.say([WELCOME]))
    assert [each.length for each in posted] == [SMALL] * DEPTH + [LARGE] * DEPTH
    assert all(
        (each.segment, each.epoch, each.tag, each.sequence) == (OWN_SEGMENT, EPOCH, 0, 0) for each in posted
    )
    ends = sorted((each.buffer, each.buffer + each.length) for each in posted)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] <= len(worker.own.view)


def test_without_sizes_nothing_is_posted() -> None:
    plain = NativeRig(NullStorage(), size_bytes=SIZE_BYTES, own_bytes=1 << 20)
    assert plain.say([WELCOME]) == []
    plain.close()


@pytest.mark.parametrize("own_bytes", [LARGE, LARGE + SMALL, 2 * LARGE, 3 * LARGE, 5 * LARGE])
def test_a_write_that_asks_finds_a_region_beside_the_posted_ones(own_bytes: int) -> None:
    worker = rig(own_bytes)
    worker.say([WELCOME])
    answers = worker.say([place(0, LARGE)])
    assert [each.kind for each in answers] == [Kind.PLACED]
    worker.close()


def test_a_write_in_a_posted_region_is_stored_and_its_region_is_posted_again(worker: NativeRig) -> None:
    posted = posts(worker.say([WELCOME]))
    small = posted[:DEPTH]
    writes = [data(each, tag) for tag, each in enumerate(small[:3])]
    answers = worker.say(writes)
    assert [(each.kind, each.tag, each.result) for each in answers[:3]] == [
        (Kind.DONE, tag, SMALL) for tag in range(3)
    ]
    used = {each.buffer for each in small[:3]}
    assert not used & {each.buffer for each in posts(answers)}, "they are lent until RELEASE"
    for write in writes:
        worker.say([release(write)])
    assert worker.engine.statistics().lent == 0
    fresh = posts(answers)
    later = posts(worker.say([data(each, tag, sequence=2) for tag, each in enumerate(fresh)]))
    assert used & {each.buffer for each in later}


def test_regions_are_posted_in_batches_when_half_are_used(worker: NativeRig) -> None:
    posted = posts(worker.say([WELCOME]))
    assert posts(worker.say([data(posted[0])])) == []
    assert len(posts(worker.say([data(posted[1], tag=1)]))) == 2


def test_a_region_that_comes_back_unused_is_free(worker: NativeRig) -> None:
    """A write without copied data: RELEASE follows without DATA."""
    posted = posts(worker.say([WELCOME]))
    again = posts(worker.say([release(data(each, tag)) for tag, each in enumerate(posted[:DEPTH])]))
    assert len(again) == DEPTH and worker.engine.statistics().lent == 0


def test_a_region_is_used_once_and_only_as_posted(worker: NativeRig) -> None:
    posted = posts(worker.say([WELCOME]))
    first = data(posted[0])
    assert len(worker.say([first])) == 1
    wrong = [
        data(posted[0], tag=1),
        data(posted[1], tag=1)._replace(buffer=posted[1].buffer + 512),
        data(posted[1], tag=1)._replace(segment=1),
        data(posted[1], tag=1)._replace(buffer=1 << 63),
        data(posted[1], tag=1)._replace(epoch=EPOCH + 1),
    ]
    assert worker.say(wrong) == []
    assert worker.engine.statistics().dropped == len(wrong)


@pytest.mark.parametrize(("length", "result"), [(0, -22), (SMALL + 512, -22), (1 << 63, -22)])
def test_a_write_that_does_not_fit_its_region_fails(worker: NativeRig, length: int, result: int) -> None:
    posted = posts(worker.say([WELCOME]))
    (answer, *_) = worker.say([data(posted[0], length=length)])
    assert (answer.kind, answer.result) == (Kind.DONE, result)


def test_regions_posted_to_a_dead_worker_are_posted_to_the_next(worker: NativeRig) -> None:
    first = posts(worker.say([WELCOME]))
    used = data(first[0])
    assert worker.say([used])[0].kind == Kind.DONE
    later = WELCOME._replace(epoch=EPOCH + 1)
    fence = later._replace(kind=Kind.FENCE)
    answers = worker.say([later, fence])
    assert answers[0].kind == Kind.FENCED
    assert {each.epoch for each in posts(answers)} == {EPOCH + 1} and len(posts(answers)) == 2 * DEPTH
    assert worker.engine.statistics().lent == 0
    assert worker.say([data(first[1])]) == [], "a word of the dead worker's"


def test_a_queue_keeps_its_posted_regions_when_another_gets_a_new_worker() -> None:
    worker = rig(own_bytes=4 << 20, queues=2)
    other = WELCOME._replace(queue=1)
    posted = posts(worker.say([WELCOME, other]))
    mine = [each for each in posted if each.queue == 0]
    assert len(mine) == len(posted) - len(mine) == 2 * DEPTH
    foreign = next(each for each in posted if each.queue == 1)
    assert worker.say([data(foreign)._replace(queue=0, tag=1)]) == []
    worker.say([other._replace(epoch=EPOCH + 1)])
    assert worker.say([data(mine[0])])[0].result == SMALL
    worker.close()


def test_a_request_that_waits_for_a_region_goes_before_posting() -> None:
    worker = rig(own_bytes=3 * LARGE)
    worker.say([WELCOME])
    placed = [each for tag in range(DEPTH) for each in worker.say([place(tag, LARGE)])]
    assert 0 < len(placed) < DEPTH
    answers = worker.say([place(placed[0].tag)._replace(kind=Kind.RELEASE)])
    assert [each.kind for each in answers] == [Kind.PLACED]
    worker.close()
