"""The pulse: what is heard of the cluster, and the end of a client that has heard nothing for too long."""

import errno
import signal
import subprocess
import sys
import threading
import time

import pytest

from ublkpool.backends.rbd.pulse import BootAlarm, Pulse, boot_clock

EXPIRE_S = 8.0
DEADLINE_S = 60


class FakeCluster:
    """Answers questions as the test says; None: not at all."""

    def __init__(self) -> None:
        self.result: int | None = 0
        self.asked = 0
        self.closed = 0
        self.changed = threading.Condition()

    def ask(self) -> "FakeCluster":
        with self.changed:
            self.asked += 1
            self.changed.notify_all()
        return self

    def answer(self) -> int | None:
        return self.result

    def close(self) -> None:
        self.closed += 1


class FakeAlarm:
    """Remembers when it would end the process."""

    def __init__(self) -> None:
        self.at_s: list[float] = []
        self.is_closed = False

    def set(self, at_s: float) -> None:
        self.at_s.append(at_s)

    def close(self) -> None:
        self.is_closed = True


class Felt:
    """A pulse with its cluster, alarm and clock."""

    def __init__(self) -> None:
        self.cluster, self.alarm, self.now_s = FakeCluster(), FakeAlarm(), 1000.0
        self.excluded, self.turned = threading.Event(), threading.Event()
        self.pulse = Pulse(self.cluster.ask, EXPIRE_S, "pool/img", self.alarm, lambda: self.now_s)

    def start(self) -> None:
        self.pulse.start(self.excluded.set, self.turned.set)

    def turn(self) -> None:
        """Ask once more and hear the answer."""
        self.turned.clear()
        self.pulse.wake()
        assert self.turned.wait(DEADLINE_S)


@pytest.fixture
def felt() -> Felt:
    return Felt()


def test_the_end_is_due_before_the_cluster_may_forget_from_the_first_moment_on(felt: Felt) -> None:
    assert felt.alarm.at_s == [1000 + felt.pulse.limit_s]
    assert felt.pulse.limit_s < EXPIRE_S


def test_each_answer_moves_the_end_to_after_the_question(felt: Felt) -> None:
    felt.start()
    assert felt.turned.wait(DEADLINE_S)
    felt.now_s = 1003.0
    felt.turn()
    felt.pulse.close()
    assert felt.alarm.at_s[-1] == 1003 + felt.pulse.limit_s
    assert felt.pulse.silent_s == 0


def test_a_late_answer_counts_from_its_question(felt: Felt) -> None:
    felt.cluster.result = None
    felt.start()
    with felt.cluster.changed:
        felt.cluster.changed.wait_for(lambda: felt.cluster.asked, DEADLINE_S)
    felt.now_s += 4
    felt.cluster.result = 0
    assert felt.turned.wait(DEADLINE_S)
    felt.pulse.close()
    assert felt.alarm.at_s[-1] == 1000 + felt.pulse.limit_s
    assert felt.pulse.silent_s == 4


def test_silence_moves_nothing_and_is_said(felt: Felt, caplog: pytest.LogCaptureFixture) -> None:
    felt.cluster.result = None
    felt.start()
    for later_s, words in ((felt.pulse.limit_s / 2, "requests wait"), (felt.pulse.limit_s, "ending")):
        felt.now_s = 1000 + later_s
        until = time.monotonic() + DEADLINE_S
        while words not in caplog.text:
            assert time.monotonic() < until
            felt.pulse.wake()
            time.sleep(0.01)
    felt.pulse.close()
    assert felt.alarm.at_s == [1000 + felt.pulse.limit_s]


def test_an_excluded_client_says_so_and_asks_no_more(felt: Felt) -> None:
    felt.cluster.result = -errno.ESHUTDOWN
    felt.start()
    assert felt.excluded.wait(DEADLINE_S)
    assert felt.alarm.at_s == [1000 + felt.pulse.limit_s], "the end stays due"
    assert not felt.turned.is_set()


def test_any_other_answer_is_one_of_a_cluster_that_hears_this_client(felt: Felt) -> None:
    felt.cluster.result = -errno.ENOENT
    felt.start()
    assert felt.turned.wait(DEADLINE_S)
    felt.pulse.close()
    assert not felt.excluded.is_set() and len(felt.alarm.at_s) == 2


def test_a_pulse_that_is_closed_leaves_the_alarm_until_the_client_has_left(felt: Felt) -> None:
    felt.cluster.result = None
    felt.start()
    felt.pulse.close()
    felt.pulse.join()
    assert felt.cluster.closed == felt.cluster.asked, "no question is left"
    assert not felt.alarm.is_closed
    felt.pulse.forget_alarm()
    assert felt.alarm.is_closed


def test_a_pulse_ends_at_once_whenever_it_is_closed() -> None:
    for _ in range(50):
        felt = Felt()
        felt.pulse._interval_s = 3600
        felt.start()
        felt.pulse.wake()
        felt.pulse.close()
        felt.pulse._thread.join(DEADLINE_S)
        assert not felt.pulse._thread.is_alive(), "it waits for its next question"


def test_the_kernel_kills_a_process_at_its_time_and_not_before_it_is_moved() -> None:
    code = (
        "import sys, time; from ublkpool.backends.rbd.pulse import BootAlarm, boot_clock\n"
        "alarm = BootAlarm(); alarm.set(boot_clock() + 0.2); alarm.set(boot_clock() + 3600)\n"
        "time.sleep(0.5); print('moved', flush=True); alarm.set(boot_clock() + 0.05)\n"
        "while True: pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert (done.stdout, done.returncode) == ("moved\n", -signal.SIGKILL), done.stderr


def test_an_alarm_that_is_closed_ends_nothing() -> None:
    alarm = BootAlarm()
    alarm.set(boot_clock() + 0.05)
    alarm.close()
    alarm.close()
    time.sleep(0.1)
