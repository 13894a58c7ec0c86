"""The examples run unchanged, as processes, and do what they say."""

import fcntl
import os
from pathlib import Path

import pytest

from support.fakes.worker import FakeWorker, finish, spawn
from ublkpool.bufpool.wire import Flag, Kind, Op

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("placement", ["pool", "backend"])
def test_demo_null_reads_zeros(tmp_path: Path, placement: str) -> None:
    with FakeWorker(tmp_path, placement=placement) as worker:
        process = spawn(tmp_path, EXAMPLES / "demo_null.py", {"placement": placement, "size": "1M"})
        assert worker.accept().placement == placement
        for _ in range(3):
            assert worker.write(0, b"n" * 4096) == 4096
        assert worker.read(0, 4096) == bytes(4096)
        worker.detach()
        assert finish(process)[0] == 0


@pytest.mark.parametrize("placement", ["pool", "backend"])
def test_demo_event_answers_from_its_event_loop(tmp_path: Path, placement: str) -> None:
    with FakeWorker(tmp_path, placement=placement) as worker:
        process = spawn(tmp_path, EXAMPLES / "demo_event.py", {"placement": placement, "size": "1M"})
        worker.accept()
        assert worker.write(4096, b"e" * 4096) == 4096
        assert worker.read(4096, 4096) == b"e" * 4096
        worker.send(0, [worker.describe(Kind.REQUEST, Op.READ, 0, 4096, tag=tag) for tag in range(8)])
        assert {worker.receive().tag for _ in range(8)} == set(range(8))
        worker.detach()
        assert finish(process)[0] == 0


@pytest.mark.parametrize("placement", ["pool", "backend"])
def test_demo_batch_stores_in_a_file(tmp_path: Path, placement: str) -> None:
    disk = tmp_path / "disk.img"
    options = {"path": str(disk), "size": "1M", "placement": placement}
    with FakeWorker(tmp_path, placement=placement) as worker:
        process = spawn(tmp_path, EXAMPLES / "demo_batch.py", options)
        worker.accept()
        assert worker.write(4096, b"b" * 4096, flags=Flag.FUA) == 4096
        assert disk.read_bytes()[:8192] == bytes(4096) + b"b" * 4096
        assert worker.read(4096, 4096) == b"b" * 4096
        assert worker.do(Op.FLUSH) == 0
        process.kill()
        process.communicate()
    assert disk.read_bytes()[4096:8192] == b"b" * 4096


def test_functions_serve_a_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"d" * 8192)
    with FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, EXAMPLES / "file_functions.py", {"path": str(disk)})
        attach = worker.accept()
        assert (attach.kind, attach.size_bytes, attach.volatile_cache) == ("file_functions", 8192, True)
        assert worker.write(4096, b"f" * 4096) == 4096
        assert disk.read_bytes() == b"d" * 4096 + b"f" * 4096
        assert worker.read(0, 8192) == b"d" * 4096 + b"f" * 4096
        assert worker.do(Op.FLUSH) == 0
        worker.detach()
        assert finish(process)[0] == 0


def test_functions_end_before_they_write_to_a_file_that_was_cut(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"d" * 8192)
    with FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, EXAMPLES / "file_functions.py", {"path": str(disk)})
        worker.accept()
        os.truncate(disk, 512)
        worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 4096, 4096)])
        status, said = finish(process)
        assert status == 1 and "became shorter than its device" in said
        assert worker.is_silent(for_s=0.01)
    assert disk.read_bytes() == b"d" * 512


def test_functions_serve_a_file_that_grew_by_less_than_a_block(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"d" * 8192 + b"e" * 100)
    with FakeWorker(tmp_path, size_bytes=8192) as worker:
        process = spawn(tmp_path, EXAMPLES / "file_functions.py", {"path": str(disk)})
        assert worker.accept().size_bytes == 8192
        assert worker.read(0, 8192) == b"d" * 8192
        worker.detach()
        status, said = finish(process)
    assert (status, "the last 100 bytes are not a block" in said) == (0, True)


@pytest.mark.parametrize("example", ["file_functions.py", "demo_batch.py"])
def test_an_example_holds_its_file_exclusively(tmp_path: Path, example: str) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    with FakeWorker(tmp_path) as worker:
        options = {"path": str(disk)} | ({"size": "1M"} if example == "demo_batch.py" else {})
        process = spawn(tmp_path, EXAMPLES / example, options)
        worker.accept()
        with disk.open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        worker.detach()
        assert finish(process)[0] == 0
