"""A worker's clock: after a pause of the process no request is overdue and no backend counts as silent."""

import time
from collections.abc import Iterator

import pytest

from support.fakes.queue_desk import Desk
from support.fakes.ring_peer import RingMemory
from ublkpool.bufpool.wire import Op
from ublkpool.ublk import calls
from ublkpool.ublk.queue import Attention, IoUring, LinkState, Port

_lib, _ffi = calls.lib, calls.ffi
PAUSE_MS, QUIET_MS = int(_lib.UQ_PAUSE_MS), int(_lib.UQ_QUIET_MS)
BEGIN_MS = 1_000_000


class Clock:
    """The C clock, on a system clock that the test sets."""

    def __init__(self) -> None:
        self.raw = _ffi.new("struct uq_clock *")
        self.system_ms = BEGIN_MS
        assert self.after(0) == BEGIN_MS

    def after(self, passed_ms: int, waited_ms: int = 0) -> int:
        self.system_ms += passed_ms
        return int(_lib.uq_clock_read(self.raw, self.system_ms, waited_ms))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_time_of_running_and_of_intended_waits_counts(clock: Clock) -> None:
    for _ in range(20):
        clock.after(3)
        now_ms = clock.after(500, waited_ms=500)
    assert now_ms == BEGIN_MS + 20 * 503 and clock.raw.pauses == 0


@pytest.mark.parametrize("pause_ms", [PAUSE_MS + 1, 15_000, 30 * 86_400_000])
@pytest.mark.parametrize("waited_ms", [0, 500])
def test_a_pause_does_not_count(clock: Clock, pause_ms: int, waited_ms: int) -> None:
    before_ms = clock.after(100)
    assert clock.after(waited_ms + pause_ms, waited_ms) == before_ms
    assert clock.raw.pauses == 1


def test_after_a_pause_the_other_side_has_time_to_run_again(clock: Clock) -> None:
    before_ms = clock.after(15_000)
    for _ in range(QUIET_MS // 100):
        assert clock.after(100) == before_ms
    assert clock.after(100) == before_ms + 100


def test_after_a_short_pause_it_is_less(clock: Clock) -> None:
    before_ms = clock.after(PAUSE_MS + 100)
    quiet_ms = 2 * (PAUSE_MS + 100)
    assert quiet_ms < QUIET_MS
    assert clock.after(400) == clock.after(400) == before_ms
    assert clock.after(450) == before_ms + 400 + 400 + 450 - quiet_ms


def test_time_never_goes_back_and_always_goes_on(clock: Clock) -> None:
    last_ms = BEGIN_MS
    for passed_ms in (10, 600, 10, 501, 0, 499, 3, 7000, 400, 400, 900, 20, *[100] * 200):
        now_ms = clock.after(passed_ms)
        assert last_ms <= now_ms <= last_ms + passed_ms
        last_ms = now_ms
    assert last_ms > BEGIN_MS + 10_000


def test_time_stands_still_while_the_system_clock_is_behind(clock: Clock) -> None:
    last_ms = clock.after(100)
    assert clock.after(-50) == last_ms
    assert clock.after(60) == last_ms + 10


TIMEOUT_MS = 200


class Served:
    """A queue on an io_uring, its port, and the backend's end; an overdue backend is cut off."""

    def __init__(self) -> None:
        self.desk = Desk(
            need_get_data=False, place_in_backend=False, timeout_ms=TIMEOUT_MS, fail_on_timeout=True
        )
        self.ring = IoUring(self.desk.queue, -1)
        self.port = Port(4)
        self.ring.use_port(self.port, -1, -1)
        self.peer = RingMemory(self.port.memory_fd, self.port.entries)

    def give(self) -> None:
        """Send a read to the backend."""
        self.desk.read(0, 0)
        self.port.turn(self.desk.queue)
        assert self.desk.backend is not None
        self.desk.backend.receive(0, self.peer.take())

    def answer(self) -> None:
        """Let the backend answer."""
        assert self.desk.backend is not None
        assert self.desk.backend.execute((0, 0))
        self.peer.put(self.desk.backend.answer((0, 0)))

    def is_answered(self) -> bool:
        """Whether the read was committed without an error and was never overdue."""
        counted = self.desk.side.statistics
        return (counted.requests[Op.READ], counted.errors, counted.timeouts) == (1, 0, 0)

    def close(self) -> None:
        self.ring.use_port(None)
        self.ring.close()
        self.peer.memory.close()
        self.port.close()


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


def test_a_backend_is_not_late_because_its_worker_was_stopped(served: Served) -> None:
    served.ring.run(0)
    served.give()
    # As after a SIGSTOP of the worker: its next turn comes late.
    time.sleep((PAUSE_MS + TIMEOUT_MS + 100) / 1000)
    served.ring.run(0)
    assert served.desk.queue.link is LinkState.UP and not served.desk.queue.attention() & Attention.SILENT
    served.answer()
    served.ring.run(0)
    assert served.is_answered()


def test_an_answer_that_has_arrived_is_in_time_however_late_the_worker_reads_it(served: Served) -> None:
    served.ring.run(0)
    served.give()
    served.answer()
    time.sleep((TIMEOUT_MS + 50) / 1000)
    served.ring.run(0)
    assert served.desk.queue.link is LinkState.UP and served.is_answered()


def test_a_backend_that_stays_silent_is_cut_off(served: Served) -> None:
    served.ring.run(0)
    served.give()
    while served.desk.queue.link is LinkState.UP:
        served.ring.run(20)
    assert served.desk.queue.attention() & Attention.SILENT
