"""A pool whose size somebody changed: it is noticed, and whole again before anybody relies on it."""

import asyncio
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ublkpool.bufpool.arena import Arena, arena_prefix
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.limits import Geometry
from ublkpool.daemon import machinery
from ublkpool.daemon.config import DeviceConfig
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.machinery import Machinery
from ublkpool.ublk.queue import Link
from ublkpool.workers.queue_loop import QueueLoop

GEOMETRY = Geometry.build([(4096, 6), (65536, 3)])


@pytest.fixture
def arena() -> Iterator[Arena]:
    prefix = arena_prefix(f"test-mending-{os.getpid()}", 7)
    with Arena.create(prefix, GEOMETRY, queues=1, device_number=7, reserve=(2, 1)) as arena:
        yield arena
        arena.unlink()


@pytest.mark.parametrize("size", [0, 4096, GEOMETRY.total_bytes + 4096])
def test_a_pool_of_another_size_is_mended_with_every_page_allocated(arena: Arena, size: int) -> None:
    assert arena.is_whole()
    os.pwrite(arena.data_fd, b"kept", 0)
    os.ftruncate(arena.data_fd, size)
    assert not arena.is_whole()
    arena.mend()
    about = arena.statistics()
    assert arena.is_whole() and about.allocated_bytes == about.data_bytes + about.control_bytes
    assert os.pread(arena.data_fd, 4, 0) == (b"kept" if size else bytes(4))


def test_a_recovery_ends_the_backend_that_cut_the_pool_and_mends_it_before_it_forks(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    async def cut_off() -> None:
        steps.append(f"cut off, whole: {arena.is_whole()}")

    async def recover(*_: object) -> Any:
        steps.append(f"recover, whole: {arena.is_whole()}")
        raise DaemonError("far enough")

    async def play() -> None:
        nobody = cast(Any, None)
        made = Machinery(DeviceConfig(name="d"), nobody, nobody, nobody, nobody)
        made.team = cast(Any, SimpleNamespace(plan=SimpleNamespace(arena=arena)))
        made.leases = cast(Any, object())
        with pytest.raises(DaemonError, match="far enough"):
            await made.recover(cast(Any, SimpleNamespace(cut_off=cut_off)))

    monkeypatch.setattr(machinery, "recover", recover)
    os.ftruncate(arena.data_fd, 0)
    asyncio.run(play())
    assert steps == ["cut off, whole: False", "recover, whole: True"]


class Looker:
    """A worker's look at its pool, on a queue that only notes what it is told."""

    def __init__(self, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = QueueLoop.__new__(QueueLoop)
        self.damages: list[Link] = []
        self.queue = SimpleNamespace(
            requeues=0, link=Link.UP, pool_damaged=self._damaged, unmap_idle_segments=lambda: 0
        )
        self.loop._queue, self.loop._arena = cast(Any, self.queue), arena
        self.loop._requeues, self.loop._look_at_s, self.loop._broken = 0, float("inf"), ""
        self.loop._spec = cast(Any, SimpleNamespace(queue=SimpleNamespace(queue=0)))
        monkeypatch.setattr("ublkpool.ublk.queue.lock_memory", lambda: None)

    def _damaged(self) -> None:
        self.damages.append(self.queue.link)

    def look(self) -> None:
        self.loop._look_around()


def test_a_worker_looks_when_a_write_could_not_be_copied_and_mends_when_nobody_is_there(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    looker = Looker(arena, monkeypatch)
    os.ftruncate(arena.data_fd, 0)
    looker.look()
    assert not looker.damages, "neither is it time, nor was there a reason"
    looker.queue.requeues = 1
    looker.look()
    assert looker.damages == [Link.UP] and not arena.is_whole(), "whoever did it lives"
    looker.queue.link = Link.NONE
    looker.queue.requeues = 2
    looker.look()
    assert arena.is_whole() and not looker.loop._broken


def test_a_worker_looks_from_time_to_time(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    looker = Looker(arena, monkeypatch)
    os.ftruncate(arena.data_fd, 0)
    looker.loop._look_at_s = 0.0
    looker.look()
    assert looker.damages == [Link.UP]


def test_a_pool_that_cannot_be_mended_stops_the_worker_with_the_reason(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space() -> None:
        raise PoolError("no space")

    looker = Looker(arena, monkeypatch)
    os.ftruncate(arena.data_fd, 0)
    monkeypatch.setattr(arena, "mend", no_space)
    looker.loop._look_at_pool(backend_lives=False)
    assert looker.loop._broken == "queue 0: its pool was cut short and cannot be mended: no space"
