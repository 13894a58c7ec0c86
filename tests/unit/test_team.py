"""A team of workers: the one that died, and whether the team is whole."""

import asyncio
import ctypes
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.fakes.device_parts import DISK, FakeChild, FakeKernel, FakeWorkerProcess, ended_child
from ublkpool.bufpool.pool.arena import Arena, arena_prefix
from ublkpool.bufpool.pool.control import stats_offset
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.daemon.device.team import Plan, Team
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk import _native
from ublkpool.ublk.errors import UblkError

QUEUES = 16
KILLED = 137


@pytest.fixture
def arena() -> Iterator[Arena]:
    prefix = arena_prefix(f"test-team-{os.getpid()}", 3)
    with Arena.create(prefix, Geometry.build([(4096, 2)]), queues=2, device_number=3, reserve=(1,)) as arena:
        yield arena
        arena.unlink()


@pytest.fixture
def zombie() -> Iterator[int]:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield pid
    os.waitpid(pid, 0)


def _team(arena: Arena, children: Sequence[Child]) -> Team:
    plan = Plan(DeviceConfig(name="vol"), FakeKernel(), arena, DISK, "", Path("/nonexistent"), None)
    team = Team(plan, 1, lambda *_: None)
    team.workers += [FakeWorkerProcess(queue, child) for queue, child in enumerate(children)]
    return team


async def _first_ended(arena: Arena, killed: int) -> int:
    """The queue whose end is reported, when all workers end at once and one of them was killed."""
    statuses = [KILLED if queue == killed else 0 for queue in range(QUEUES)]
    return (await _team(arena, list(map(ended_child, statuses))).ended()).queue


def test_the_worker_that_was_killed_is_named_and_not_its_siblings(arena: Arena) -> None:
    for killed in range(QUEUES):
        assert asyncio.run(_first_ended(arena, killed)) == killed


def _note_lost_tags(arena: Arena, queue: int, tags: int) -> None:
    statistics = _native.ffi.new("struct uq_stats *", {"tags_gone": tags})
    os.pwrite(arena.control_fd, bytes(_native.ffi.buffer(statistics)), stats_offset(queue))


def test_a_team_is_whole_only_while_every_worker_lives_and_has_all_of_its_tags(
    arena: Arena, zombie: int
) -> None:
    living, dead = FakeChild(os.getpid()), FakeChild(zombie)
    _team(arena, [living, living]).whole_check()()
    for queue in range(2):
        children = [dead if each == queue else living for each in range(2)]
        with pytest.raises(UblkError, match=f"queue {queue}"):
            _team(arena, children).whole_check()()
        _note_lost_tags(arena, queue, 1)
        with pytest.raises(UblkError, match=f"queue {queue}"):
            _team(arena, [living, living]).whole_check()()
        _note_lost_tags(arena, queue, 0)


def test_a_zombie_counts_as_dead(zombie: int) -> None:
    assert FakeChild(zombie).end_check()
    assert not FakeChild(os.getpid()).end_check()


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
    assert FakeChild(dying).end_check()
