"""The cache of chunks: versions, damage, the bound, several processes, `kill -9` at any moment."""

import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from ublkpool.backends._objects.chunk_cache import ChunkCache, entry_directory
from ublkpool.backends._objects.memory_cache import MemoryCache
from ublkpool.bufpool.errors import BackendError

DATA = bytes(range(256)) * 16
MIB = 1 << 20


def entry(directory: Path) -> Path:
    (found,) = directory.glob("*/*")
    return found


def test_an_entry_is_found_by_store_chunk_and_version(tmp_path: Path) -> None:
    ChunkCache(tmp_path, "a", MIB).put(3, "v1", DATA)
    again = ChunkCache(tmp_path, "a", MIB)
    assert again.version(3) == "v1"
    assert again.get(3, "v1") == DATA
    assert again.get(3, "v2") is None
    assert again.get(4, "v1") is None and again.version(4) is None
    assert ChunkCache(tmp_path, "b", MIB).get(3, "v1") is None
    assert (again.hits, again.misses) == (1, 2)


@pytest.mark.parametrize("at", [0, 9, 13, 20, 48, 49, 60, -1])
def test_a_changed_byte_is_a_miss(tmp_path: Path, at: int) -> None:
    cache = ChunkCache(tmp_path, "a", MIB)
    cache.put(0, "v1", DATA)
    content = bytearray(entry(tmp_path).read_bytes())
    content[at] ^= 0x40
    entry(tmp_path).write_bytes(content)
    assert cache.get(0, "v1") is None
    cache.put(0, "v1", DATA)
    assert cache.get(0, "v1") == DATA


def test_the_chunk_of_another_place_is_a_miss(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, "a", MIB)
    cache.put(0, "v1", DATA)
    path = entry(tmp_path)
    path.rename(path.with_name(f"{1:016x}"))
    assert cache.get(1, "v1") is None


def test_a_damaged_length_of_a_version_is_not_allocated(tmp_path: Path) -> None:
    """The process locks its memory, so that 4 GiB that no file has would be taken from the machine."""
    ChunkCache(tmp_path, "a", MIB).put(0, "v1", DATA)
    content = bytearray(entry(tmp_path).read_bytes())
    content[8:12] = b"\xff" * 4
    entry(tmp_path).write_bytes(content)
    tracemalloc.start()
    try:
        assert ChunkCache(tmp_path, "a", MIB).version(0) is None
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [0, 1, 47, 48, 49, 50, 4000])
def test_an_entry_that_was_cut_is_a_miss(tmp_path: Path, length: int) -> None:
    cache = ChunkCache(tmp_path, "a", MIB)
    cache.put(0, "v1", DATA)
    os.truncate(entry(tmp_path), length)
    assert cache.get(0, "v1") is None
    assert cache.version(0) in (None, "v1")


def test_the_entries_used_least_recently_are_deleted_also_those_of_other_stores(tmp_path: Path) -> None:
    first, second = ChunkCache(tmp_path, "a", 64 << 10), ChunkCache(tmp_path, "b", 64 << 10)
    for index in range(8):
        first.put(index, "v", DATA)
    for index, path in enumerate(sorted(tmp_path.glob("*/*"))):
        os.utime(path, (1000 + index, 1000 + index))
    assert first.get(0, "v") == DATA, "used again"
    for index in range(12):
        second.put(index, "v", DATA)
    assert first.get(0, "v") == DATA
    assert first.get(1, "v") is None
    assert sum(each.stat().st_size for each in tmp_path.glob("*/*")) <= (64 << 10) * 5 // 4


def test_files_of_dead_processes_are_deleted(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, "a", MIB)
    cache.put(0, "v", DATA)
    left = entry(tmp_path).parent / ".partial-1-2-3"
    fresh = entry(tmp_path).parent / ".partial-1-2-4"
    left.write_bytes(b"half")
    fresh.write_bytes(b"half")
    os.utime(left, (time.time() - 3600,) * 2)
    cache = ChunkCache(tmp_path, "a", 4096)
    cache.put(1, "v", DATA)
    assert not left.exists() and fresh.exists()


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=f"cache={tmp_path}/file"):
        ChunkCache(tmp_path / "file", "a", MIB)
    entry_directory(None, Path("/dev/ublkb0"))
    entry_directory(tmp_path / "absent" / "below", Path("/dev/ublkb0"))


def test_a_cache_that_vanishes_costs_only_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ChunkCache(tmp_path / "cache", "a", MIB)
    next((tmp_path / "cache").iterdir()).rmdir()
    cache.put(0, "v", DATA)
    cache.put(1, "v", DATA)
    assert cache.get(0, "v") is None
    assert caplog.text.count("going on without") == 1


WRITER = """
import sys, random
from pathlib import Path
from ublkpool.backends._objects.chunk_cache import ChunkCache
cache, choice = ChunkCache(Path(sys.argv[1]), "a", 100 << 10), random.Random(int(sys.argv[2]))
for turn in range(10**9):
    if turn == 100:
        print("in the middle of it", flush=True)
    index = choice.randrange(40)
    version = str(choice.randrange(3))
    found = cache.get(index, version)
    assert found is None or found == (f"{index} {version} ".encode() * 1000)[:5000], (index, version)
    cache.put(index, version, (f"{index} {version} ".encode() * 1000)[:5000])
"""


def test_several_processes_killed_at_any_moment_leave_whole_entries(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(each)], stdout=subprocess.PIPE)
        for each in range(3)
    ]
    for each in processes:
        assert each.stdout is not None and each.stdout.readline(), "it found data of another entry, or failed"
    for each in processes:
        assert each.poll() is None
        each.kill()
        each.wait()
        assert each.stdout is not None
        each.stdout.close()
    cache, whole = ChunkCache(tmp_path, "a", 100 << 10), 0
    for index in range(40):
        version = cache.version(index)
        if version is not None:
            assert cache.get(index, version) == (f"{index} {version} ".encode() * 1000)[:5000]
            whole += 1
    assert whole
    assert sum(each.stat().st_size for each in tmp_path.glob("*/*")) <= 2 * (100 << 10)


def test_memory_keeps_the_chunks_that_were_used_last() -> None:
    memory = MemoryCache(3 * 4096)
    for index in range(3):
        memory.put(index, DATA)
    assert memory.get(0) == DATA
    memory.put(3, DATA)
    assert memory.get(1) is None and memory.get(0) == DATA
    memory.put(0, DATA[::-1])
    assert memory.get(0) == DATA[::-1]
    tiny = MemoryCache(1)
    tiny.put(0, DATA)
    assert tiny.get(0) == DATA
