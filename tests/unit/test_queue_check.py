"""The checked build of the queue core finds a broken invariant at the next call."""

import pytest

from support.fakes.queue_desk import Desk, data
from ublkpool.ublk.queue import Attention


def assert_broken(desk: Desk, tag: int) -> None:
    """A call unrelated to the damage finds it."""
    assert not desk.queue.attention() & Attention.FAULT
    desk.read(tag, 8)
    assert desk.queue.attention() & Attention.FAULT
    assert "broken invariant" in desk.queue.fault()


def test_a_buffer_whose_slot_header_names_another_tag_is_found() -> None:
    desk = Desk()
    desk.write(0, 0, data(1))
    [slot] = [slot for slot, header in enumerate(desk.rig.headers) if header.tag == 1]
    desk.rig.headers[slot].tag = 3
    assert_broken(desk, 1)


@pytest.mark.parametrize("gauge", ["in_flight", "buffers_lent"])
def test_a_wrong_gauge_is_found(gauge: str) -> None:
    desk = Desk()
    setattr(desk.side.statistics, gauge, 7)
    assert_broken(desk, 0)


@pytest.mark.parametrize("kind", range(3))
def test_a_request_without_its_duration_is_found(kind: int) -> None:
    desk = Desk()
    desk.side.block.latencies.of[kind].low[9] += 1
    assert_broken(desk, 0)
