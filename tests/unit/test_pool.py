"""A device's pool over several backends: when the next backend gets new memory."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import posix_ipc
import pytest

from support.fakes.descriptors import open_descriptors
from support.fakes.device_parts import FakeTeam
from ublkpool.bufpool.errors import AttachRefused, PoolError
from ublkpool.bufpool.pool.arena import Arena, arena_prefix, list_orphans, unlink_arena
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.pool.memory import DataPlan
from ublkpool.daemon.device import pool as module
from ublkpool.daemon.device.pool import Pool
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.processes.held_names import pool_name
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.open_files import reopened

INSTANCE = f"test-pool-{os.getpid()}"
PREFIX = arena_prefix(INSTANCE, 7)
GEOMETRY = Geometry.build([(4096, 4)])
USER = 1000


class InodeHolder(Holder):
    """Notes the inodes of the descriptors that it is given."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    def hold(self, name: str, fd: int) -> None:
        self.held[name] = os.fstat(fd).st_ino

    def drop(self, name: str) -> None:
        self.held.pop(name, None)


class Workers(FakeTeam):
    """Workers that count the changes of the pool, and refuse them when the test says so."""

    changes = 0
    refuses = False
    knows_change = True

    @property
    def can_change_pool(self) -> bool:
        return self.knows_change

    async def change_pool(self) -> None:
        self.changes += 1
        if self.refuses:
            raise AttachRefused("a worker has no room")


class Scene:
    """A device's pool, its workers and the holder's descriptors."""

    def __init__(self) -> None:
        self.holder = InodeHolder()
        self.workers = Workers()
        self.pool = Pool("vol", self.holder, ControlRunner())
        self.arena = Arena.create(PREFIX, GEOMETRY, 1, 7, (1,))

    def prepare(self, user: int = USER) -> int:
        """The memory, by its inode, that a backend of this user gets."""
        asyncio.run(self.pool.prepare(self.workers, user))
        return self.inode

    @property
    def inode(self) -> int:
        arena = self.pool.arena
        assert arena is not None
        found = os.fstat(arena.data_fd).st_ino
        assert self.holder.held == {pool_name("vol"): found}
        return found


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.pool.remove()
    assert list_orphans(INSTANCE) == [] and made.holder.held == {}


def test_memory_that_no_other_process_has_goes_to_the_next_backend(scene: Scene) -> None:
    scene.pool.begin(scene.arena)
    first = scene.inode
    for _ in range(3):
        assert scene.prepare() == first
    assert scene.workers.changes == 0


@pytest.mark.parametrize("how", ["stranger", "user"])
def test_memory_that_another_process_may_have_is_replaced(
    scene: Scene, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    scene.pool.begin(scene.arena)
    first = scene.prepare()
    kept = reopened(scene.arena.data_fd) if how == "stranger" else None
    second = scene.prepare(USER + (how == "user"))
    assert second != first and scene.workers.changes == 1 and "gets other memory" in caplog.text
    # A process with the old memory has no access to the new.
    assert scene.prepare(USER + (how == "user")) == second
    if kept is not None:
        os.close(kept)


def test_an_earlier_daemons_memory_is_kept_only_if_an_attached_backend_has_it(scene: Scene) -> None:
    scene.pool.resume(scene.arena)
    scene.pool.had_by(USER)
    first = scene.inode
    assert scene.prepare() == first


def test_an_earlier_daemons_memory_without_a_backend_is_replaced(scene: Scene) -> None:
    """The earlier daemon may have died when only some of its workers had been told of other memory."""
    scene.pool.resume(scene.arena)
    first = scene.inode
    assert scene.prepare() != first and scene.workers.changes == 1


def test_memory_that_an_earlier_version_made_is_replaced_at_the_next_backend() -> None:
    scene = Scene()
    scene.arena.close()
    data = posix_ipc.SharedMemory(f"{PREFIX}-data", posix_ipc.O_CREX, mode=0o600).fd
    os.posix_fallocate(data, 0, GEOMETRY.total_bytes)
    os.close(data)
    scene.pool.resume(Arena.open(PREFIX))
    scene.pool.had_by(USER)
    first = scene.inode
    assert scene.prepare() != first and scene.pool.arena is not None and scene.pool.arena.is_sealed
    # No process has the old memory now, so its name must not keep it.
    with pytest.raises(posix_ipc.ExistentialError):
        posix_ipc.SharedMemory(f"{PREFIX}-data")
    scene.pool.remove()
    assert list_orphans(INSTANCE) == []


def test_until_every_worker_has_changed_no_backend_is_handed_memory(scene: Scene) -> None:
    scene.pool.begin(scene.arena)
    first = scene.prepare()
    scene.workers.refuses = True
    with pytest.raises(AttachRefused):
        scene.prepare(USER + 1)
    # Nor the user of the old memory, since some workers have the new one.
    for user in (USER, USER + 1):
        with pytest.raises(AttachRefused):
            scene.prepare(user)
    scene.workers.refuses = False
    assert scene.prepare() != first and scene.workers.changes == 4


def test_workers_of_an_earlier_version_are_not_asked_to_change_the_pool(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.pool.resume(scene.arena)
    scene.workers.knows_change = False
    first = scene.inode
    assert scene.prepare() == first and scene.workers.changes == 0 and "of an earlier version" in caplog.text


def test_without_memory_for_a_new_pool_the_next_backend_is_refused_and_the_pool_stays(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.pool.begin(scene.arena)
    first = scene.prepare()

    def no_room(*_: Any) -> int:
        raise PoolError("the pool of device 7 needs 1.0 MiB of memory and 0.0 MiB are available")

    with monkeypatch.context() as full:
        full.setattr(module, "make_data", no_room)
        with pytest.raises(PoolError, match="are available"):
            scene.prepare(USER + 1)
    assert scene.inode == first and scene.workers.changes == 0
    assert scene.prepare(USER + 1) != first


def test_a_pool_that_was_never_handed_out_is_not_checked(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_open_elsewhere", lambda _: pytest.fail("the pool was never handed out"))
    scene.pool.begin(scene.arena)
    scene.prepare()


@pytest.mark.parametrize("at_once_bytes_max", [0, 1 << 30])
def test_a_large_pool_is_allocated_by_another_process_than_the_supervisor(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at_once_bytes_max: int
) -> None:
    """Allocating a gigabyte takes seconds, in which the supervisor would serve no other device."""

    def fill(fd: int, plan: DataPlan) -> str:
        (tmp_path / "pid").write_text(str(os.getpid()))
        return fill_here(fd, plan)

    fill_here = module._fill
    monkeypatch.setattr(module, "_fill", fill)
    monkeypatch.setattr(module, "AT_ONCE_BYTES_MAX", at_once_bytes_max)
    scene.pool.begin(scene.arena)
    first = scene.prepare()
    assert scene.prepare(USER + 1) != first
    arena = scene.pool.arena
    assert arena is not None and arena.is_sealed
    found = os.fstat(arena.data_fd)
    assert found.st_blocks * 512 >= found.st_size == arena.geometry.total_bytes
    by_another = (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != str(os.getpid())
    assert by_another is (at_once_bytes_max == 0)


def test_a_pool_that_another_process_cannot_allocate_is_refused_with_its_reason(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE_BYTES_MAX", 0)
    monkeypatch.setattr(
        module, "_fill", lambda *_: "the pool of device 7 cannot be allocated: it is too large"
    )
    scene.pool.begin(scene.arena)
    first = scene.prepare()
    before = open_descriptors()
    with pytest.raises(PoolError, match=r"^the pool of device 7 cannot be allocated: it is too large$"):
        scene.prepare(USER + 1)
    assert scene.inode == first and open_descriptors() == before


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    for each in list_orphans(INSTANCE):
        unlink_arena(each)
