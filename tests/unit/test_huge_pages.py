"""Huge pages: mapped at their alignment, made if the kernel can, and an error if required but not available."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakes.descriptors import open_descriptors
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.huge_pages import HUGE_PAGE_BYTES, SharedMap
from ublkpool.bufpool.pool.arena import Arena, arena_prefix, list_orphans
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.pool.memory import huge_bytes, make_data
from ublkpool.ublk import _native, mappings

MIB = 1 << 20
MAPS = Path("/proc/self/maps")
INSTANCE = f"test-huge-{os.getpid()}"
GEOMETRY = Geometry.build([(4096, 3), (MIB, 5)])
HUGE_BYTES = 4 * MIB


@pytest.fixture
def prefix() -> Iterator[str]:
    yield arena_prefix(INSTANCE, 7)
    assert list_orphans(INSTANCE) == []


def make(prefix: str, huge: str, geometry: Geometry = GEOMETRY) -> Arena:
    arena = Arena.create(prefix, geometry, 1, 7, [1] * len(geometry.classes), huge)  # type: ignore[arg-type]
    arena.unlink()
    return arena


@pytest.fixture(scope="module")
def collapses() -> None:
    """Skips where this kernel makes no huge pages."""
    fd = mappings.sealed_memory(HUGE_PAGE_BYTES, "test")
    with SharedMap(fd, HUGE_PAGE_BYTES) as mapping:
        mapping.collapse()
        found = mapping.huge_bytes()
    os.close(fd)
    if not found:
        pytest.skip("this kernel makes no huge pages of shared memory")


@pytest.mark.parametrize("size_bytes", [4096, HUGE_PAGE_BYTES, 5 * MIB + 4096])
def test_a_map_shows_the_file_and_begins_where_huge_pages_fit(size_bytes: int) -> None:
    fd = mappings.sealed_memory(size_bytes + 4096, "test")
    os.pwrite(fd, b"first", 0)
    with SharedMap(fd, size_bytes) as mapping:
        assert len(mapping.view) == size_bytes and bytes(mapping.view[:5]) == b"first"
        mapping.view[-4:] = b"last"
        assert os.pread(fd, 5, size_bytes - 4) == b"last\0"
        assert size_bytes < HUGE_PAGE_BYTES or not mapping.address % HUGE_PAGE_BYTES
    os.close(fd)


def test_a_view_in_use_keeps_the_memory_and_the_last_one_lets_go() -> None:
    fd = mappings.sealed_memory(HUGE_PAGE_BYTES, "ublkpool-test-view")
    os.pwrite(fd, b"kept", 4096)
    mapping = SharedMap(fd, HUGE_PAGE_BYTES)
    held = mapping.view[4096:8192]
    mapping.close()
    assert bytes(held[:4]) == b"kept"
    del mapping
    held.release()
    del held
    assert "ublkpool-test-view" not in MAPS.read_text()
    os.close(fd)


@pytest.mark.parametrize("size_bytes", [8192, HUGE_PAGE_BYTES + 4096])
def test_a_file_that_is_too_short_is_not_mapped(size_bytes: int) -> None:
    fd = mappings.sealed_memory(4096, "test")
    with pytest.raises(ValueError, match="greater than file size"):
        SharedMap(fd, size_bytes)
    os.close(fd)


def test_a_worker_maps_where_huge_pages_fit_and_unmaps_all_of_it() -> None:
    fd = mappings.sealed_memory(3 * MIB + 4096, "ublkpool-test-worker")
    at = mappings.map_segment(fd, 3 * MIB + 4096)
    assert not int(_native.ffi.cast("uintptr_t", at)) % HUGE_PAGE_BYTES
    mappings.unmap_segment(at, 3 * MIB + 4096)
    assert "ublkpool-test-worker" not in MAPS.read_text()
    os.close(fd)
    with pytest.raises(OSError, match="map a segment"):
        mappings.map_segment(fd, 3 * MIB)


LOCKED = """
import mmap, os, sys
from ublkpool.bufpool.huge_pages import SharedMap
from ublkpool.ublk import _native, mappings, process_calls
try:
    process_calls.lock_memory()
except OSError:
    sys.exit(77)
def resident(address):
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(address // 4096 * 8)
        words = memoryview(pages.read(8 * 64)).cast("Q")
    return sum(word >> 63 for word in words)
fd = mappings.sealed_memory(64 * 4096, "test")
shared, private = mappings.map_segment(fd, 64 * 4096), mappings.map_sink(64 * 4096)
sdk = SharedMap(fd, 64 * 4096)
print(*(resident(int(_native.ffi.cast("uintptr_t", each))) for each in (shared, private)), resident(sdk.address))
"""


def test_a_process_that_locks_its_memory_has_every_page_before_the_first_use() -> None:
    ended = subprocess.run([sys.executable, "-c", LOCKED], capture_output=True, text=True, check=False)
    if ended.returncode == 77:
        pytest.skip("this user may not lock memory")
    assert ended.stdout.split() == ["64", "64", "64"], ended.stderr


@pytest.mark.usefixtures("collapses")
@pytest.mark.parametrize("huge", ["auto", "require"])
def test_a_pool_and_its_replacement_are_in_huge_pages(prefix: str, huge: str) -> None:
    with make(prefix, huge) as arena:
        assert arena.huge_bytes == HUGE_BYTES
        old = os.fstat(arena.data_fd).st_ino
        arena.replace_data(make_data(*arena.next_data))
        assert arena.huge_bytes == HUGE_BYTES and os.fstat(arena.data_fd).st_ino != old
        data = os.fstat(arena.data_fd)
        assert 512 * data.st_blocks == data.st_size


@pytest.mark.usefixtures("collapses")
def test_huge_pages_are_made_before_small_ones_would_have_to_be_copied(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate, found = os.posix_fallocate, []

    def looked_at(fd: int, offset: int, size_bytes: int) -> None:
        found.append(512 * os.fstat(fd).st_blocks)
        allocate(fd, offset, size_bytes)

    monkeypatch.setattr(os, "posix_fallocate", looked_at)
    with make(prefix, "auto") as arena:
        assert found[0] == HUGE_BYTES < arena.geometry.total_bytes
        assert arena.huge_bytes == huge_bytes(arena.data_fd, arena.geometry.total_bytes) == HUGE_BYTES
        with SharedMap(arena.data_fd, arena.geometry.total_bytes) as mapping:
            assert not any(mapping.view)


def test_no_page_is_looked_at_where_no_huge_pages_are_asked_for(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon would map the whole pool once more, and read all of its own mappings, at every add."""
    monkeypatch.setattr(SharedMap, "huge_bytes", lambda _: pytest.fail("the config has huge pages off"))
    made = Arena.create(prefix, GEOMETRY, 1, 7, (1, 1))
    with made, Arena.open(prefix, made.data_fd) as opened:
        made.unlink()
        assert made.huge_bytes == opened.huge_bytes == 0


def test_off_makes_no_huge_pages(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedMap, "collapse", lambda _: pytest.fail("the config has huge pages off"))
    with make(prefix, "off") as arena:
        arena.replace_data(make_data(*arena.next_data))


def test_memory_that_replaces_a_pools_need_not_be_in_huge_pages(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device exists already and works with small pages."""
    with make(prefix, "auto") as arena:
        arena.huge = "require"
        monkeypatch.setattr(SharedMap, "collapse", lambda _: 0)
        arena.replace_data(make_data(*arena.next_data))


@pytest.mark.usefixtures("collapses")
def test_the_next_daemon_sees_how_much_of_the_pool_is_in_huge_pages(prefix: str) -> None:
    made = Arena.create(prefix, GEOMETRY, 1, 7, (1, 1), "auto")
    with made, Arena.open(prefix, made.data_fd, "auto") as opened:
        assert opened.huge_bytes == made.huge_bytes == HUGE_BYTES
        made.unlink()


def test_without_huge_pages_auto_goes_on_and_require_says_what_to_do(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharedMap, "collapse", lambda _: HUGE_PAGE_BYTES)
    with make(prefix, "auto") as arena:
        data = os.fstat(arena.data_fd)
        assert 512 * data.st_blocks == data.st_size
    before = open_descriptors()
    with pytest.raises(
        PoolError, match=r"has 2.0 MiB of 4.0 MiB in huge pages.*compact_memory.*shmem_enabled"
    ):
        make(prefix, "require")
    assert open_descriptors() == before


def test_a_pool_smaller_than_a_huge_page_cannot_be_required_to_be_one(prefix: str) -> None:
    small = Geometry.build([(4096, 16)])
    with pytest.raises(PoolError, match="smaller than a huge page: use huge_pages auto or off"):
        make(prefix, "require", small)
    with make(prefix, "auto", small) as arena:
        assert arena.huge_bytes == 0
