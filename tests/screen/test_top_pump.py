"""When readings are due, on a clock of the test; the thread itself in one test."""

import threading
from collections.abc import Sequence

import pytest

from ublkpool.daemon.cli.top.pump import RETRY_S_MAX, Pump, PumpEnded
from ublkpool.daemon.cli.top.reading import Reading
from ublkpool.daemon.errors import DaemonError, DaemonUnreachable, RemoteError

DEADLINE_S = 120
AWAY = DaemonUnreachable("the daemon is away")


class Rig:
    """A pump with a clock, a source and a screen of the test."""

    def __init__(self, reading: Reading, interval_s: float = 2.0) -> None:
        self.now_s = 100.0
        self.reading = reading
        self.late_s = 0.0
        self.failure: Exception | None = None
        self.asked: list[str] = []
        self.shown: list[Reading | Exception] = []
        self.pump = Pump(self.read, self.shown.append, interval_s, lambda: self.now_s)

    def read(self, looked_at: str) -> Reading:
        self.asked.append(looked_at)
        self.now_s += self.late_s
        if self.failure is not None:
            raise self.failure
        return self.reading

    def step(self) -> bool:
        """Wait until a reading is due, and have it taken."""
        due_s = self.pump.due_in_s()
        assert due_s is not None
        self.now_s += due_s
        goes_on = self.pump.step()
        self.pump.taken()
        return goes_on


@pytest.fixture
def rig(minute: Sequence[Reading]) -> Rig:
    return Rig(minute[0])


def test_a_reading_is_due_at_each_intervals_end_and_none_is_made_up_for(rig: Rig) -> None:
    assert rig.step() and rig.now_s == 102.0
    assert rig.step() and rig.now_s == 104.0
    rig.late_s = 5.0
    assert rig.step() and rig.now_s == 111.0
    rig.late_s = 0.0
    assert rig.pump.due_in_s() == 1.0
    assert rig.shown == [rig.reading] * 3


def test_nothing_is_read_until_the_screen_has_taken_the_last_reading(rig: Rig) -> None:
    rig.now_s = 102.0
    assert rig.pump.step() and rig.pump.due_in_s() is None
    rig.now_s = 110.0
    rig.pump.taken()
    assert rig.pump.due_in_s() == 0.0


@pytest.mark.parametrize("failure", [AWAY, RemoteError("the daemon is stopping", 1)])
def test_an_absent_daemon_is_asked_again_soon(rig: Rig, failure: DaemonError) -> None:
    rig.pump.set(600.0, False, "")
    rig.failure = failure
    assert rig.step() and rig.pump.due_in_s() == RETRY_S_MAX
    rig.failure = None
    assert rig.step() and rig.pump.due_in_s() == 600.0
    assert rig.shown == [failure, rig.reading]


@pytest.mark.parametrize("failure", [DaemonError("the answer makes no sense"), ZeroDivisionError()])
def test_another_failure_is_handed_over_and_ends_it(rig: Rig, failure: Exception) -> None:
    rig.failure = failure
    assert not rig.step() and rig.shown == [failure]


def test_a_pause_reads_nothing_and_goes_on_at_once(rig: Rig) -> None:
    rig.pump.set(2.0, True, "")
    assert rig.pump.due_in_s() is None
    rig.now_s = 130.5
    rig.pump.set(2.0, False, "")
    assert rig.pump.due_in_s() == 0.0
    rig.step()
    assert rig.pump.due_in_s() == pytest.approx(1.5)


def test_a_shorter_interval_does_not_wait_for_the_longer_one(rig: Rig) -> None:
    rig.pump.set(600.0, False, "")
    assert rig.pump.due_in_s() == 2.0, "a longer one begins after the reading that is due"
    rig.step()
    assert rig.pump.due_in_s() == 600.0
    rig.pump.set(0.5, False, "")
    assert rig.pump.due_in_s() == 0.5


def test_the_device_that_is_looked_at_is_asked_for(rig: Rig) -> None:
    rig.step()
    rig.pump.set(2.0, False, "vol0")
    rig.step()
    assert rig.asked == ["", "vol0"]


def test_the_wait_for_a_silent_daemon_ends_with_the_screen(rig: Rig) -> None:
    rig.pump.check()
    rig.pump.end()
    with pytest.raises(PumpEnded):
        rig.pump.check()
    rig.failure = PumpEnded()
    assert not rig.pump.step() and rig.shown == []


def test_the_thread_reads_hands_over_and_ends(minute: Sequence[Reading]) -> None:
    shown: list[Reading | Exception] = []
    has_shown, may_read = threading.Event(), threading.Event()
    asked: list[str] = []

    def read(looked_at: str) -> Reading:
        asked.append(looked_at)
        may_read.wait(DEADLINE_S)
        return minute[len(asked)]

    def show(found: Reading | Exception) -> None:
        shown.append(found)
        has_shown.set()

    pump = Pump(read, show, 0.001)
    pump.start()
    thread = next(each for each in threading.enumerate() if each.name == "ublkpool-top")
    pump.set(0.001, False, "vol7")
    may_read.set()
    for _ in range(3):
        assert has_shown.wait(DEADLINE_S)
        has_shown.clear()
        pump.taken()
    pump.end()
    pump.taken()
    thread.join(DEADLINE_S)
    assert not thread.is_alive() and asked[-1] == "vol7"
    assert shown[:3] == [minute[1], minute[2], minute[3]]
