"""The fence in the queue core: a backend of an earlier epoch gets no request before it has confirmed its end."""

from collections.abc import Callable

import pytest

from support.fakes.driver import SECTOR_BYTES
from support.fakes.queue_desk import Desk
from support.fakes.queue_rig import DEVICE
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op
from ublkpool.ublk.queue import Attention, LinkState
from ublkpool.workers.tag_state import State

EPOCH = 3
PLACEMENTS: tuple[dict[str, int], ...] = ({}, {"place_in_backend": 1, "reads_own": 1})


def word(kind: Kind, epoch: int = EPOCH) -> bytes:
    """A descriptor about the link."""
    return Descriptor(kind, device=DEVICE, epoch=epoch).pack()


def old_answer(kind: Kind, epoch: int = EPOCH - 1, sequence: int = 1) -> bytes:
    """An answer to the first request of an epoch, valid for the worker of that epoch."""
    return Descriptor(kind, Op.WRITE, device=DEVICE, epoch=epoch, sequence=sequence, result=512).pack()


def seen(desk: Desk) -> list[int]:
    assert desk.backend is not None
    return [each.kind for each in desk.backend.seen]


def three_requests(desk: Desk) -> None:
    """Deliver a read, a write and a flush, which wait for a backend."""
    desk.read(2, 8, 16)
    desk.write(0, 0, b"w" * SECTOR_BYTES)
    desk.other(1, Op.FLUSH, 0)
    if not desk.rig.plan.place_in_backend:
        desk.copy(0)


def at_rest(desk: Desk) -> list[State]:
    return [desk.state(tag) for tag in range(3)]


def fencing(**plan: int) -> Desk:
    """A queue with three requests, whose backend has received only FENCE."""
    desk = Desk(connected=False, epoch=EPOCH, **plan)
    three_requests(desk)
    desk.connect(fence=True)
    assert desk.queue.link is LinkState.FENCING
    return desk


@pytest.mark.parametrize("plan", PLACEMENTS, ids=["pool", "backend"])
def test_fence_follows_welcome_and_nothing_follows_fence(plan: dict[str, int]) -> None:
    desk = Desk(connected=False, epoch=EPOCH, **plan)
    three_requests(desk)
    before = at_rest(desk)
    backend = desk.connect(fence=True)
    welcome, fence = backend.seen
    assert (welcome.kind, fence.kind) == (Kind.WELCOME, Kind.FENCE)
    assert (fence.device, fence.queue, fence.epoch) == (DEVICE, 0, EPOCH)
    assert at_rest(desk) == before and not desk.queue.attention() & Attention.LINK
    desk.read(3, 16)
    assert desk.send() == [] and desk.queue.in_flight == 4


def test_a_new_backend_is_not_fenced() -> None:
    desk = Desk(epoch=EPOCH)
    assert seen(desk) == [Kind.WELCOME] and desk.queue.link is LinkState.UP


@pytest.mark.parametrize("plan", PLACEMENTS, ids=["pool", "backend"])
def test_after_fenced_waiting_requests_go_out_in_order(
    plan: dict[str, int],
) -> None:
    desk = fencing(**plan)
    desk.queue.input(word(Kind.FENCED))
    assert desk.queue.link is LinkState.UP and desk.queue.attention() & Attention.LINK
    given = desk.send()
    assert [each.tag for each in given] == [2, 0, 1]
    assert [each.kind == Kind.PLACE for each in given] == [False, "place_in_backend" in plan, False]
    assert not any(each.flags & Flag.REPLAY for each in given), "no backend of this epoch has seen them"
    desk.side.check()


WRONG: dict[str, Callable[[Desk], bytes]] = {
    "a future epoch": lambda desk: word(Kind.FENCED, EPOCH + 1),
    "an answer to what was never asked": lambda desk: old_answer(Kind.DONE, EPOCH, 2),
    "hello of this epoch": lambda desk: word(Kind.HELLO),
    "another queue": lambda desk: Descriptor(Kind.FENCED, device=DEVICE, queue=1, epoch=EPOCH).pack(),
    "twice in a frame": lambda desk: 2 * word(Kind.FENCED),
}


@pytest.mark.parametrize("name", WRONG)
def test_anything_but_the_answer_to_the_fence_cuts_the_link(name: str) -> None:
    desk = fencing()
    desk.queue.input(WRONG[name](desk))
    assert desk.queue.link is LinkState.CUT and desk.side.statistics.violations == 1
    assert desk.queue.output() == b"", "a backend that was cut off gets nothing"


@pytest.mark.parametrize("said_hello", [False, True])
def test_fenced_without_a_fence_cuts_the_link(said_hello: bool) -> None:
    desk = Desk(connected=said_hello, epoch=EPOCH)
    if not said_hello:
        desk.expect()
    desk.queue.input(word(Kind.FENCED))
    assert desk.queue.link is LinkState.CUT


def test_fenced_before_hello_cuts_the_link() -> None:
    desk = Desk(connected=False, epoch=EPOCH)
    desk.expect(fence=True)
    desk.queue.input(word(Kind.FENCED))
    assert desk.queue.link is LinkState.CUT


def test_a_second_fenced_cuts_the_link() -> None:
    desk = fencing()
    desk.queue.input(word(Kind.FENCED))
    desk.queue.input(word(Kind.FENCED))
    assert desk.queue.link is LinkState.CUT


@pytest.mark.parametrize("kind", [Kind.DONE, Kind.PLACED, Kind.REJECT, Kind.FENCED])
def test_descriptors_for_the_previous_worker_are_counted_but_no_violation_before_hello(kind: Kind) -> None:
    desk = Desk(connected=False, epoch=EPOCH)
    three_requests(desk)
    backend = desk.expect(fence=True)
    desk.queue.input(old_answer(kind))
    assert (desk.queue.link, desk.side.statistics.stale_answers) == (LinkState.EXPECTED, 1)
    desk.queue.input(backend.hello(0))
    assert desk.queue.link is LinkState.FENCING and desk.side.statistics.violations == 0


@pytest.mark.parametrize("kind", [Kind.DONE, Kind.PLACED, Kind.REJECT])
@pytest.mark.parametrize("plan", PLACEMENTS, ids=["pool", "backend"])
def test_an_answer_of_the_old_epoch_changes_nothing_during_the_fence(
    kind: Kind, plan: dict[str, int]
) -> None:
    desk = fencing(**plan)
    before = at_rest(desk)
    desk.queue.input(old_answer(kind))
    assert (at_rest(desk), desk.queue.link) == (before, LinkState.FENCING)
    assert desk.driver.consume() == 0, "nothing was committed"
    assert (desk.side.statistics.stale_answers, desk.side.statistics.violations) == (1, 0)


def test_a_fenced_for_a_worker_that_died_is_not_the_answer_to_the_next_fence() -> None:
    desk = fencing()
    desk.queue.input(word(Kind.FENCED, EPOCH - 1))
    assert (desk.queue.link, desk.side.statistics.stale_answers) == (LinkState.FENCING, 1)
    assert desk.send() == []
    desk.queue.input(word(Kind.FENCED))
    assert desk.queue.link is LinkState.UP and len(desk.send()) == 3


@pytest.mark.parametrize("fenced", [False, True])
def test_a_hello_for_a_worker_that_died_is_no_second_hello(fenced: bool) -> None:
    desk = fencing()
    if fenced:
        desk.queue.input(word(Kind.FENCED))
    link = desk.queue.link
    desk.queue.input(word(Kind.HELLO, EPOCH - 1))
    assert (desk.queue.link, desk.side.statistics.stale_answers) == (link, 1)


def test_a_backend_that_dies_during_the_fence_leaves_all_requests_to_the_next() -> None:
    desk = fencing()
    desk.kill()
    desk.queue.input(word(Kind.FENCED))
    assert desk.queue.link is LinkState.NONE and desk.queue.in_flight == 3
    desk.connect()
    assert seen(desk) == [Kind.WELCOME, Kind.REQUEST, Kind.REQUEST, Kind.REQUEST]


def test_giving_up_during_the_fence_fails_waiting_requests() -> None:
    desk = fencing()
    desk.queue.give_up()
    desk.driver.consume()
    assert desk.queue.in_flight == 0 and seen(desk) == [Kind.WELCOME, Kind.FENCE]
