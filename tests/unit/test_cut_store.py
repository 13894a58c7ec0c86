"""A store that becomes shorter while it is served: lost data never reads as zeros, and no write hides the loss.

The backend ends and answers nothing more; the daemon refuses its successor, and requests wait by the device's policy.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakes.native_rig import DEVICE_NUMBER, EPOCH, NativeRig
from support.fakes.worker import BackendThread, FakeWorker
from support.loop_devices import loop_device
from ublkpool.backends.file import FileBackend, FileOptions
from ublkpool.bufpool.engine._engine import lib
from ublkpool.bufpool.engine.native import FileStorage
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.wire import SEGMENT_POOL, Descriptor, Flag, Kind, Op, pack_frame

pytestmark = pytest.mark.usefixtures("transport")

KIB = 1 << 10
SIZE_BYTES = 1 << 20


@pytest.fixture(params=["disk", "memory"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A full file on a disk, and one in memory, where short requests do not go through io_uring."""
    if request.param == "disk":
        path = tmp_path / "disk.img"
        path.write_bytes(b"t" * SIZE_BYTES)
        yield path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / "disk.img"
        path.write_bytes(b"t" * SIZE_BYTES)
        yield path


def _ends(backend: BackendThread) -> None:
    with pytest.raises(BackendError, match="became shorter than its device"):
        backend.join()


@pytest.mark.parametrize(
    ("op", "length", "flags", "left_bytes", "direct"),
    [
        (Op.READ, 64 * KIB, 0, 0, "auto"),
        (Op.READ, 64 * KIB, 0, SIZE_BYTES - 30000, "auto"),
        (Op.READ, 64 * KIB, 0, SIZE_BYTES - 30000, "off"),
        (Op.READ, 512 * KIB, 0, SIZE_BYTES - 4 * KIB, "auto"),
        (Op.WRITE, 4 * KIB, 0, 0, "auto"),
        (Op.WRITE, 64 * KIB, Flag.FUA, SIZE_BYTES - 4 * KIB, "off"),
        (Op.WRITE, 512 * KIB, 0, 0, "auto"),
        (Op.WRITE_ZEROES, 64 * KIB, Flag.NOUNMAP, 0, "auto"),
        (Op.WRITE_ZEROES, 64 * KIB, 0, 0, "auto"),
        (Op.DISCARD, 64 * KIB, 0, 0, "auto"),
    ],
)
def test_a_request_on_a_file_that_was_cut_ends_the_backend_and_leaves_the_file_short(
    tmp_path: Path, disk: Path, op: Op, length: int, flags: int, left_bytes: int, direct: str
) -> None:
    options = FileOptions(path=disk, direct="off" if direct == "off" else "auto")
    with FakeWorker(tmp_path, max_io_bytes=512 * KIB) as worker:
        backend = BackendThread(FileBackend(options), tmp_path)
        worker.accept()
        assert worker.read(0, 4 * KIB) == b"t" * 4 * KIB
        os.truncate(disk, left_bytes)
        worker.send(0, [worker.describe(Kind.REQUEST, op, SIZE_BYTES - length, length, flags=flags)])
        _ends(backend)
        assert worker.is_silent(for_s=0.01)
    assert disk.stat().st_size == left_bytes


def test_writes_that_arrive_after_a_file_was_cut_change_nothing_and_are_not_answered(
    tmp_path: Path, disk: Path
) -> None:
    """The successor executes these writes; an answered one would be lost with the file's end."""
    with FakeWorker(tmp_path) as worker:
        backend = BackendThread(FileBackend(FileOptions(path=disk)), tmp_path)
        worker.accept()
        os.truncate(disk, 8 * KIB)
        writes = [
            worker.describe(Kind.REQUEST, Op.WRITE, tag * 8 * KIB, 4 * KIB, tag=tag) for tag in range(4)
        ]
        worker.send(0, writes)
        _ends(backend)
        assert worker.is_silent(for_s=0.01)
    assert disk.read_bytes() == b"t" * 8 * KIB


@pytest.mark.parametrize("op", [Op.WRITE, Op.WRITE_ZEROES, Op.DISCARD])
def test_a_change_of_a_file_that_was_cut_meanwhile_is_not_answered(disk: Path, op: Op) -> None:
    """A write that came after the cut has grown the file again, with a hole for the lost data."""
    with disk.open("r+b", buffering=0) as file:
        rig = NativeRig(FileStorage(file.fileno(), False), size_bytes=SIZE_BYTES, own_bytes=0)
        change = Descriptor(
            kind=Kind.REQUEST,
            op=op,
            flags=0,
            device=DEVICE_NUMBER,
            queue=0,
            tag=0,
            epoch=EPOCH,
            sequence=1,
            offset=64 * KIB,
            length=4 * KIB,
            segment=SEGMENT_POOL,
            buffer=0,
        )
        rig.engine.take(0, pack_frame([change]))
        while rig.engine.statistics().running:
            assert not lib.engine_turn(rig.engine.raw)
        os.truncate(disk, 128 * KIB)
        with pytest.raises(BackendError, match="became shorter than its device"):
            list(rig.engine.answers())
        rig.close()


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE, Op.DISCARD])
def test_a_request_beyond_the_end_of_a_block_device_that_shrank_ends_the_backend(
    tmp_path: Path, op: Op
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"t" * 2 * SIZE_BYTES)
    with loop_device(image) as loop, FakeWorker(tmp_path) as worker:
        backend = BackendThread(FileBackend(FileOptions(path=loop)), tmp_path)
        worker.accept()
        assert worker.read(SIZE_BYTES, 4 * KIB) == b"t" * 4 * KIB
        os.truncate(image, SIZE_BYTES)
        subprocess.run(["losetup", "--set-capacity", loop], check=True)
        worker.send(0, [worker.describe(Kind.REQUEST, op, SIZE_BYTES, 4 * KIB)])
        _ends(backend)
