"""Stopping a process for a test."""

import os
import signal
import time

from support.threads import of_each_thread

_DEADLINE_S = 60.0


def stop(pid: int) -> None:
    """SIGSTOP, and wait until every thread has stopped: kill(2) returns before that."""
    os.kill(pid, signal.SIGSTOP)
    wait_until_stopped(pid)


def wait_until_stopped(pid: int) -> None:
    """Wait until every thread of a process that got SIGSTOP has stopped."""
    deadline_s = time.monotonic() + _DEADLINE_S
    while not all(state in "TtZX" for state in _states(pid)):
        assert time.monotonic() < deadline_s, f"process {pid} does not stop"
        time.sleep(0.001)


def _states(pid: int) -> list[str]:
    """The state of each thread, as in proc_pid_stat(5)."""
    return [stat.rpartition(") ")[2][0] for stat in of_each_thread(pid, "stat").values()]
