"""How long a worker's ring waits: one timer serves many waits, and none of them lasts longer than it was asked to."""

import os
import time
from collections.abc import Iterator

import pytest

from support.fakes.queue_desk import Desk
from ublkpool.ublk.queue import WATCH_SHIFT, IoUring

LONG_MS = 600_000
ROUNDING_S = 0.001
"""The ring counts in milliseconds."""


@pytest.fixture
def desk() -> Desk:
    return Desk(connected=False)


@pytest.fixture
def ring(desk: Desk) -> Iterator[IoUring]:
    made = IoUring(desk.queue, -1)
    yield made
    made.close()


@pytest.fixture
def event() -> Iterator[int]:
    made = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield made
    os.close(made)


def _waited_s(ring: IoUring, timeout_ms: int) -> float:
    started_s = time.monotonic()
    assert ring.run(timeout_ms) == 0
    return time.monotonic() - started_s


def _be_called(ring: IoUring, event: int, timeout_ms: int) -> None:
    """A wait that ends before its time, because of what is watched."""
    os.eventfd_write(event, 1)
    assert ring.run(timeout_ms) == 1 << WATCH_SHIFT
    os.eventfd_read(event)


def test_each_wait_ends_at_its_time(ring: IoUring) -> None:
    for _ in range(3):
        assert _waited_s(ring, 60) > 0.06 - ROUNDING_S


def test_a_timer_of_an_earlier_wait_does_not_end_a_longer_one(ring: IoUring, event: int) -> None:
    ring.watch(0, event)
    _be_called(ring, event, 20)
    assert _waited_s(ring, 100) > 0.1 - ROUNDING_S


def test_a_timer_of_an_earlier_wait_does_not_prolong_a_shorter_one(ring: IoUring, event: int) -> None:
    ring.watch(0, event)
    _be_called(ring, event, LONG_MS)
    for _ in range(3):
        assert _waited_s(ring, 10) < LONG_MS / 2000


def test_waits_that_end_early_share_a_timer(ring: IoUring, desk: Desk, event: int) -> None:
    """Else each would have one of its own, and the wait after them would be woken for them all."""
    ring.watch(0, event)
    for _ in range(500):
        _be_called(ring, event, 200)
    before = desk.side.statistics.enters
    _waited_s(ring, 400)
    assert desk.side.statistics.enters - before < 10
