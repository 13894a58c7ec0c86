"""What the layers `fault` and `cache` do to requests, without a device."""

import errno
import os
import random
import threading
import time
from pathlib import Path

import msgspec
import pytest

from ublkpool.bufpool.sdk.backend import Hint, Properties
from ublkpool.bufpool.sdk.layers import cache, fault
from ublkpool.bufpool.sdk.layers import layer as layer_module


class Store(layer_module.Plain):
    """A disk in a bytearray that notes its writes."""

    def __init__(self, size_bytes: int = 1 << 16) -> None:
        super().__init__()
        self.disk, self.writes = bytearray(size_bytes), list[tuple[int, int]]()

    def open(self, hint: Hint) -> Properties:
        return Properties(size_bytes=len(self.disk))

    def pread(self, buf: memoryview, offset: int) -> int:
        buf[:] = self.disk[offset : offset + len(buf)]
        return len(buf)

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> int:
        self.writes.append((offset, len(buf)))
        self.disk[offset : offset + len(buf)] = buf
        return len(buf)

    def trim(self, offset: int, length: int) -> None:
        self.disk[offset : offset + length] = bytes(length)

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        self.disk[offset : offset + length] = bytes(length)


class Died(Exception):
    """Instead of SIGKILL."""


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise Died

    monkeypatch.setattr(fault, "kill_this_process", die)


def faulty(**options: object) -> tuple[fault.Fault, Store]:
    store = Store()
    made = fault.Fault(msgspec.convert(options, fault.FaultOptions), inner=store)
    made.open(Hint("x", Path("/")))
    return made, store


def outcomes(made: fault.Fault, rounds: int = 300) -> list[int]:
    """The errno of each request, 0 for none, -1 for a death."""
    found = []
    for number in range(rounds):
        try:
            made.pwrite(memoryview(bytes([number % 256]) * 1024), number % 32 * 1024, False)
            found.append(0)
        except OSError as error:
            found.append(error.errno or -2)
        except Died:
            found.append(-1)
    return found


@pytest.mark.usefixtures("dies")
def test_a_seed_repeats_its_faults_and_another_has_others() -> None:
    options = {"eio": 0.2, "die_rate": 0.02, "torn": True, "hold": 8192, "reorder": True}
    runs = [faulty(seed=seed, **options) for seed in (5, 5, 6)]
    first, again, other = (outcomes(made) for made, _ in runs)
    assert first == again != other
    assert runs[0][1].disk == runs[1][1].disk != runs[2][1].disk
    assert runs[0][1].writes == runs[1][1].writes != runs[2][1].writes
    assert 30 < first.count(errno.EIO) < 90 and 1 <= first.count(-1) < 20
    assert set(first) == {0, errno.EIO, -1}


def test_no_option_is_no_fault() -> None:
    made, store = faulty()
    assert set(outcomes(made)) == {0}
    assert len(store.writes) == 300


@pytest.mark.usefixtures("dies")
def test_it_dies_at_the_request_that_is_named() -> None:
    made, _ = faulty(die=7)
    assert outcomes(made, 10) == [0] * 6 + [-1] + [0] * 3


@pytest.mark.usefixtures("dies")
def test_a_torn_write_is_some_of_its_sectors_from_the_beginning() -> None:
    found = set()
    for seed in range(60):
        made, store = faulty(seed=seed, die=1, torn=True)
        with pytest.raises(Died):
            made.pwrite(memoryview(b"n" * 4096), 0, False)
        stored = store.disk.count(b"n")
        assert store.disk[:stored] == b"n" * stored and stored % 512 == 0
        found.add(stored)
    assert {0, 4096} < found and len(found) >= 6


@pytest.mark.usefixtures("dies")
def test_held_writes_are_seen_stored_by_a_flush_and_lost_by_a_death() -> None:
    made, store = faulty(hold=1 << 20)
    made.pwrite(memoryview(b"a" * 4096), 0, False)
    made.pwrite(memoryview(b"b" * 1024), 1024, False)
    buffer = bytearray(4096)
    made.pread(memoryview(buffer), 0)
    assert buffer == b"a" * 1024 + b"b" * 1024 + b"a" * 2048 and not store.writes
    made.flush()
    assert store.disk[:4096] == buffer
    made.pwrite(memoryview(b"c" * 4096), 0, False)
    made.pwrite(memoryview(b"f" * 512), 8192, True)
    assert store.disk[:4096] == b"c" * 4096, "a write with FUA stores what came before it"
    made.pwrite(memoryview(b"d" * 4096), 0, False)
    made.pwrite(memoryview(b"e" * 4096), 4096, False)
    made._faults = msgspec.structs.replace(made._faults, die_rate=1.0)
    with pytest.raises(Died):
        made.flush()
    assert store.disk[:8192] == b"c" * 4096 + bytes(4096)


def test_what_is_held_is_bounded() -> None:
    made, store = faulty(hold=8192)
    for number in range(10):
        made.pwrite(memoryview(bytes([number]) * 4096), number * 4096, False)
    assert len(store.writes) == 8


def test_a_change_of_order_keeps_the_order_of_writes_to_the_same_block() -> None:
    orders = set()
    for seed in range(10):
        made, store = faulty(seed=seed, hold=1 << 20, reorder=True)
        shadow, rng = bytearray(len(store.disk)), random.Random(seed)
        for number in range(40):
            offset, length = 512 * rng.randrange(100), 512 * rng.randint(1, 12)
            made.pwrite(memoryview(bytes([number]) * length), offset, False)
            shadow[offset : offset + length] = bytes([number]) * length
        made.flush()
        assert store.disk == shadow
        orders.add(tuple(store.writes))
    assert len(orders) == 10


def test_a_delay_waits_no_longer_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    made, _ = faulty(delay=0.5)
    outcomes(made, 50)
    assert len(waited) == 50 and min(waited) > 0 and 0.3 < max(waited) <= 0.5


def cached(store: Store, tmp_path: Path | None, *, slots: int = 4, block: int = 4096) -> cache.Cache:
    made = cache.Cache(cache.CacheOptions(size=slots * block, block=block, dir=tmp_path), inner=store)
    made.open(Hint("x", Path("/")))
    made._size_bytes = len(store.disk)
    return made


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_cache_is_coherent_under_random_operations_and_bounded(tmp_path: Path, on_disk: bool) -> None:
    store = Store(40_000)
    made, rng = cached(store, tmp_path if on_disk else None), random.Random(1)
    for _ in range(3000):
        length = rng.randint(1, 9000)
        offset = rng.randrange(len(store.disk) - length)
        match rng.randrange(6):
            case 0:
                made.pwrite(memoryview(rng.randbytes(length)), offset, False)
            case 1:
                made.zero(offset, length, True)
            case 2:
                made.trim(offset, length)
            case _:
                buffer = bytearray(length)
                assert made.pread(memoryview(buffer), offset) == length
                assert buffer == store.disk[offset : offset + length]
        assert len(made._kept) <= 4
    counted = made.statistics()
    assert counted["cache_hits"] > 100 and counted["cache_misses"] > 100
    assert not list(tmp_path.iterdir()), "the file has no name"
    made.close()


def test_a_second_read_reaches_no_store_and_a_failed_write_forgets() -> None:
    store = Store()
    made, reads = cached(store, None), list[int]()
    read = store.pread

    def counted(buf: memoryview, offset: int) -> int:
        reads.append(offset)
        return read(buf, offset)

    store.pread = counted  # type: ignore[method-assign]
    for _ in range(3):
        made.pread(memoryview(bytearray(512)), 1024)
    assert reads == [0]

    def fails(buf: memoryview, offset: int, fua: bool) -> int:
        store.disk[offset : offset + len(buf)] = buf
        raise OSError(errno.EIO, "half done")

    store.pwrite = fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match="half done"):
        made.pwrite(memoryview(b"h" * 512), 1024, False)
    buffer = bytearray(512)
    made.pread(memoryview(buffer), 1024)
    assert buffer == b"h" * 512


@pytest.mark.parametrize("write_first", [False, True])
def test_a_block_that_is_read_while_a_write_touches_it_is_not_kept(write_first: bool) -> None:
    """Two threads, stopped in the midst of a read and of a write, in both orders."""
    store = Store()
    made = cached(store, None)
    in_read, in_write, go_read, go_write = (threading.Event() for _ in range(4))
    read, write = store.pread, store.pwrite

    def slow_read(buf: memoryview, offset: int) -> int:
        count = read(buf, offset)
        in_read.set()
        assert go_read.wait(60)
        return count

    def slow_write(buf: memoryview, offset: int, fua: bool) -> int:
        in_write.set()
        assert go_write.wait(60)
        return write(buf, offset, fua)

    store.pread, store.pwrite = slow_read, slow_write  # type: ignore[method-assign]
    reader = threading.Thread(target=lambda: made.pread(memoryview(bytearray(4096)), 0))
    writer = threading.Thread(target=lambda: made.pwrite(memoryview(b"n" * 4096), 0, False))
    first, second = ((writer, in_write), (reader, in_read))[:: 1 if write_first else -1]
    for thread, begun in (first, second):
        thread.start()
        assert begun.wait(60)
    # The write is answered while the reader still has the content that the write replaced.
    for thread, go_on in ((writer, go_write), (reader, go_read)):
        go_on.set()
        thread.join(60)
    buffer = bytearray(4096)
    made.pread(memoryview(buffer), 0)
    assert buffer == b"n" * 4096


def test_a_cache_whose_disk_fails_reads_from_below(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    made = cached(store, tmp_path)
    made.pread(memoryview(bytearray(4096)), 0)
    os.ftruncate(made._fd, 0)
    store.disk[:4096] = b"s" * 4096
    buffer = bytearray(4096)
    assert made.pread(memoryview(buffer), 0) == 4096
    assert buffer == b"s" * 4096 and "cannot read what it kept" in caplog.text
