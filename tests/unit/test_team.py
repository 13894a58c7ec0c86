"""A team of workers: the one that died, and whether the team is whole."""

import asyncio
import ctypes
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from ublkpool.daemon.device.team import Plan, Team
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.ublk import _native
from ublkpool.ublk.errors import UblkError

QUEUES = 16
KILLED = 137


def _worker(queue: int, status: int) -> WorkerProcess:
    async def wait() -> int:
        return status

    return cast(WorkerProcess, SimpleNamespace(queue=queue, child=SimpleNamespace(wait=wait)))


async def _first_ended(killed: int) -> int:
    """The queue whose end is reported, when all workers end at once and one of them was killed."""
    team = Team(cast(Plan, None), 1, lambda *_: None)
    team.workers = [_worker(queue, KILLED if queue == killed else 0) for queue in range(QUEUES)]
    return (await team.ended()).queue


def test_the_worker_that_was_killed_is_named_and_not_its_siblings() -> None:
    for killed in range(QUEUES):
        assert asyncio.run(_first_ended(killed)) == killed


def _whole_team(ended: int | None, gone: int | None) -> Team:
    """Two workers, of which one may have ended, and one may have lost a tag."""

    def block(queue: int) -> bytes:
        statistics = _native.ffi.new("struct uq_stats *", {"tags_gone": int(queue == gone)})
        return bytes(_native.ffi.buffer(statistics))

    arena = SimpleNamespace(control=SimpleNamespace(statistics_block=block))
    team = Team(cast(Plan, SimpleNamespace(arena=arena)), 1, lambda *_: None)
    for queue in range(2):
        child = SimpleNamespace(has_ended=lambda queue=queue: queue == ended)
        team.workers.append(cast(WorkerProcess, SimpleNamespace(queue=queue, child=child)))
    return team


def test_a_team_is_whole_only_while_every_worker_lives_and_has_all_of_its_tags() -> None:
    _whole_team(None, None).check_whole()
    for queue in range(2):
        with pytest.raises(UblkError, match=f"queue {queue}"):
            _whole_team(queue, None).check_whole()
        with pytest.raises(UblkError, match=f"queue {queue}"):
            _whole_team(None, queue).check_whole()


@pytest.fixture
def zombie() -> Iterator[int]:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield pid
    os.waitpid(pid, 0)


def test_a_zombie_counts_as_dead(zombie: int) -> None:
    assert Child.has_ended(cast(Child, SimpleNamespace(pid=zombie)))
    assert not Child.has_ended(cast(Child, SimpleNamespace(pid=os.getpid())))


PTRACE_CONT, PTRACE_SEIZE = 7, 0x4206
PTRACE_O_TRACEEXIT, PTRACE_EVENT_EXIT = 0x40, 6


@pytest.fixture
def dying() -> Iterator[int]:
    """A process that was sent SIGKILL, stopped in the middle of its exit."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long] * 4
    pid = os.fork()
    if not pid:
        while True:
            signal.pause()
    assert ptrace(PTRACE_SEIZE, pid, 0, PTRACE_O_TRACEEXIT) == 0, os.strerror(ctypes.get_errno())
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert status >> 8 == signal.SIGTRAP | PTRACE_EVENT_EXIT << 8
    yield pid
    ptrace(PTRACE_CONT, pid, 0, 0)
    os.waitpid(pid, 0)


def test_a_process_that_was_sent_sigkill_counts_as_dead_before_its_end(dying: int) -> None:
    assert Child.has_ended(cast(Child, SimpleNamespace(pid=dying)))
