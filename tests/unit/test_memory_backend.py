"""The memory backend: the disk outlives the process, and no byte is lent twice."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from support.fakes.worker import FakeWorker, finish, serving, spawn
from ublkpool.backends.memory import MemoryBackend, MemoryOptions
from ublkpool.bufpool.errors import BackendError, PoolError
from ublkpool.bufpool.sdk import keeper
from ublkpool.bufpool.sdk.backend import Hint
from ublkpool.bufpool.sdk.client import OwnSegment
from ublkpool.bufpool.sdk.keeper import Keeper
from ublkpool.bufpool.wire import Kind, Op

pytestmark = pytest.mark.usefixtures("transport")

SIZE_BYTES = 1 << 20
OPTIONS = {"size": "1M", "reads": "own"}


@pytest.fixture(params=["pool", "backend"])
def worker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeWorker]:
    placement: Literal["pool", "backend"] = request.param
    backend = MemoryBackend(MemoryOptions(size=SIZE_BYTES, placement=placement, keep=False))
    with FakeWorker(tmp_path, placement=placement) as worker, serving(worker, backend):
        yield worker


def test_a_read_returns_the_data_that_was_written(worker: FakeWorker) -> None:
    assert worker.write(8192, b"m" * 4096) == 4096
    assert worker.read(4096, 12288) == bytes(4096) + b"m" * 4096 + bytes(4096)


@pytest.mark.parametrize("op", [Op.DISCARD, Op.WRITE_ZEROES])
def test_discarded_and_zeroed_blocks_read_as_zeros(worker: FakeWorker, op: Op) -> None:
    assert worker.write(0, b"m" * 12288) == 12288
    assert worker.do(op, 4096, 4096) == 0
    assert worker.read(0, 12288) == b"m" * 4096 + bytes(4096) + b"m" * 4096


@pytest.fixture
def in_place(tmp_path: Path) -> Iterator[FakeWorker]:
    backend = MemoryBackend(MemoryOptions(size=SIZE_BYTES, placement="backend", reads="own", keep=False))
    with FakeWorker(tmp_path, placement="backend") as worker, serving(worker, backend):
        yield worker


def test_a_blocks_place_is_the_block(in_place: FakeWorker) -> None:
    placed, request = in_place.place(65536, 4096)
    assert placed.buffer == 65536
    assert in_place.fill(placed, request, b"p" * 4096) == 4096
    content, read = in_place.read_in_place(65536, 4096)
    assert content == b"p" * 4096
    in_place.release(read)


def test_an_overlapping_write_waits_until_the_first_is_released(in_place: FakeWorker) -> None:
    first, request = in_place.place(4096, 8192, tag=0)
    second = in_place.describe(Kind.PLACE, Op.WRITE, 8192, 8192, tag=1)
    in_place.send(0, [second])
    beside, _ = in_place.place(16384, 4096, tag=2)
    assert beside.kind == Kind.PLACED
    assert in_place.is_silent()
    assert in_place.fill(first, request, b"1" * 8192, release=False) == 8192
    assert in_place.is_silent()
    in_place.release(request)
    placed = in_place.answer_of(second)
    assert (placed.kind, placed.buffer) == (Kind.PLACED, 8192)


def test_two_reads_of_one_block_wait_for_each_other(in_place: FakeWorker) -> None:
    _, first = in_place.read_in_place(0, 4096)
    second = in_place.describe(Kind.REQUEST, Op.READ, 0, 4096, tag=1, lend=False)
    in_place.send(0, [second])
    assert in_place.is_silent()
    in_place.release(first)
    assert in_place.answer_of(second).result == 4096


def test_a_fence_returns_lent_regions(in_place: FakeWorker) -> None:
    in_place.place(0, 4096, tag=2)
    in_place.read_in_place(8192, 4096)
    in_place.send(0, [in_place.describe(Kind.PLACE, Op.WRITE, 0, 4096, tag=1)])
    in_place.fence()
    assert in_place.receive().kind == Kind.FENCED
    assert in_place.write(0, b"n" * 16384) == 16384
    assert in_place.is_silent()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("placement", ["pool", "backend"])
def test_an_answered_write_survives_the_process(tmp_path: Path, placement: str, end: signal.Signals) -> None:
    with FakeWorker(tmp_path, placement=placement) as worker:
        first = spawn(tmp_path, "memory", {"size": "1M", "placement": placement})
        worker.accept()
        assert worker.write(4096, b"s" * 4096) == 4096
        first.send_signal(end)
        finish(first)
        second = spawn(tmp_path, "memory", {"size": "1M", "placement": placement})
        worker.accept()
        assert worker.read(0, 12288) == bytes(4096) + b"s" * 4096 + bytes(4096)
        worker.detach()
        assert finish(second)[0] == 0
    assert not list(tmp_path.glob("*.keep")), "the daemon's detach ends the content and its keeper"


def test_a_kept_disk_that_is_smaller_than_asked_is_refused(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker:
        first = spawn(tmp_path, "memory", {"size": "1M"})
        worker.accept()
        first.kill()
        finish(first)
        second = spawn(tmp_path, "memory", {"size": "2M"})
        worker.answer_question()
        status, log = finish(second)
        Keeper(tmp_path / "memory-testdisk.keep").drop()
    assert status != 0
    assert "keeps a disk of 1M, fewer than size=2M" in log


def test_of_a_larger_kept_disk_only_the_size_of_the_device_is_served(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker:
        first = spawn(tmp_path, "memory", {"size": "2M"})
        worker.accept()
        assert worker.write(4096, b"k" * 4096) == 4096
        first.kill()
        finish(first)
        worker.size_bytes = 1 << 20
        second = spawn(tmp_path, "memory", {"size": "1M"})
        assert worker.accept().size_bytes == 1 << 20
        assert worker.read(4096, 4096) == b"k" * 4096
        worker.detach()
        assert finish(second)[0] == 0


def test_a_keeper_that_died_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "memory-testdisk.keep").touch()
    with FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, "memory", {"size": "1M"})
        worker.accept()
        assert worker.write(0, b"k" * 4096) == 4096
        worker.detach()
        assert finish(process)[0] == 0


def test_a_size_that_is_no_page_is_refused(tmp_path: Path) -> None:
    from ublkpool.bufpool.sdk.backend import Hint

    with pytest.raises(BackendError, match="size=1000 is not a multiple of 4096"):
        MemoryBackend(MemoryOptions(size=1000, keep=False)).open(Hint("x", tmp_path))


def test_a_keeper_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_ANSWER_TIMEOUT_S", 0.1)
    path = keeper.keeper_path(tmp_path, "vol0")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(BackendError, match=f"the keeper at {path} has not answered for 0.1 s"):
            MemoryBackend(MemoryOptions(size=4096)).open(Hint("vol0", tmp_path, 4096, 4096))


def test_a_memory_disk_larger_than_the_memory_is_refused_before_a_page_of_it_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allocating the disk would wake the OOM killer, which may kill any process."""

    def allocate(_file: int, _at: int, size_bytes: int) -> None:
        raise AssertionError(f"{size_bytes} bytes were allocated")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    with pytest.raises(
        PoolError, match=r"needs 4194304\.0 MiB of memory and .* are available .*: lower .* size="
    ):
        MemoryBackend(MemoryOptions(size=1 << 42)).open(Hint("vol0", tmp_path))
    with pytest.raises(PoolError, match=r"are available .* segment="):
        OwnSegment.create(1 << 42)
