"""The copy-on-write backend on real files: what lies where, what is given back, and what it refuses to serve."""

import errno
import fcntl
import os
import random
import resource
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from support.fakes.worker import FakeWorker, finish, serving, spawn
from ublkpool.backends import _cow_overlay
from ublkpool.backends._cow_format import HEAD_BYTES, read_head, write_head
from ublkpool.backends._cow_overlay import NewOverlay, Overlay, make_overlay, open_overlay
from ublkpool.backends.cow import CowBackend, CowOptions
from ublkpool.bufpool.engine.cow import BASE, DATA, ZERO
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk import claim
from ublkpool.bufpool.sdk.backend import Hint
from ublkpool.bufpool.wire import Flag, Kind, Op

KIB, MIB = 1 << 10, 1 << 20
BASE_BYTES = 3 * MIB + 700
SIZE_BYTES = 128 * MIB
HINT = Hint(device="vol0", run_dir=Path("/nonexistent"))
CONTENT = random.Random(1).randbytes(BASE_BYTES)


@pytest.fixture(params=["disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk and one in memory, where short requests do not go through io_uring."""
    if request.param == "disk":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def files(place: Path) -> Iterator[CowOptions]:
    """A base, and the options of a disk on it that does not exist yet."""
    base = place / "base"
    base.write_bytes(CONTENT)
    yield CowOptions(base=base, overlay=place / "overlay", size=SIZE_BYTES)
    assert base.read_bytes() == CONTENT


@pytest.fixture
def worker(tmp_path: Path, files: CowOptions, transport: object) -> Iterator[FakeWorker]:
    """A cow backend attached."""
    with FakeWorker(tmp_path) as worker, serving(worker, CowBackend(files)):
        yield worker


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that does not wait for the end of who has the file."""
    monkeypatch.setattr(claim, "LIVE_PATIENCE_S", 0.0)


def _refused(options: CowOptions) -> str:
    backend = CowBackend(options)
    try:
        with pytest.raises(BackendError) as caught:
            backend.open(HINT)
    finally:
        backend.close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _made(options: CowOptions) -> CowOptions:
    assert options.base is not None
    make_overlay(NewOverlay(options.overlay, options.base, options.size))
    return options


def _runs(options: CowOptions) -> list[tuple[int, int, int]]:
    file = open_overlay(options.overlay)
    overlay = Overlay(file, options.overlay, None, serves=False)
    try:
        return [(each.offset, each.length, each.state) for each in overlay.map.runs()]
    finally:
        overlay.close()
        os.close(file)


def test_a_new_disk_reads_as_its_base_and_then_as_zeros_and_takes_no_room(
    worker: FakeWorker, files: CowOptions
) -> None:
    assert worker.read(0, 32 * KIB) == CONTENT[: 32 * KIB]
    end = BASE_BYTES // 512 * 512
    assert worker.read(end - 512, 4096) == CONTENT[end - 512 :].ljust(4096, b"\0")
    assert worker.read(SIZE_BYTES - 4096, 4096) == bytes(4096)
    assert files.overlay.stat().st_blocks * 512 <= 8 * KIB


def test_writes_lie_in_the_overlay_and_parts_of_blocks_keep_what_is_beside_them(
    worker: FakeWorker, files: CowOptions
) -> None:
    model = bytearray(CONTENT.ljust(4 * MIB, b"\0"))
    rng = random.Random(2)
    for _ in range(40):
        at, length = rng.randrange(6000) * 512, rng.randint(1, 40) * 512
        model[at : at + length] = data = rng.randbytes(length)
        assert worker.write(at, data, flags=rng.choice((0, Flag.FUA))) == length
    for at in range(0, 4 * MIB, 32 * KIB):
        assert worker.read(at, 32 * KIB) == model[at : at + 32 * KIB]
    assert worker.do(Op.FLUSH) == 0


def test_a_discard_gives_overlay_space_back_and_hides_the_base(worker: FakeWorker, files: CowOptions) -> None:
    for at in range(0, MIB, 32 * KIB):
        assert worker.write(at, b"d" * 32 * KIB) == 32 * KIB
    assert worker.do(Op.FLUSH) == 0
    before = files.overlay.stat().st_blocks
    assert worker.do(Op.DISCARD, 0, 512 * KIB) == 0
    assert files.overlay.stat().st_blocks <= before - 900
    assert worker.read(0, 4096) == bytes(4096)
    assert worker.read(512 * KIB, 4096) == b"d" * 4096
    # Blocks that only the base has.
    assert worker.do(Op.DISCARD, 2 * MIB, 64 * KIB) == 0
    assert worker.read(2 * MIB - 512, 64 * KIB // 2) == CONTENT[2 * MIB - 512 : 2 * MIB] + bytes(
        32 * KIB - 512
    )


@pytest.mark.parametrize("flags", [0, Flag.NOUNMAP, Flag.FUA])
def test_write_zeroes_reads_as_zeros(worker: FakeWorker, flags: int) -> None:
    assert worker.write(0, b"z" * 32 * KIB) == 32 * KIB
    assert worker.do(Op.WRITE_ZEROES, 512, 30 * KIB, flags=flags) == 0
    assert worker.read(0, 32 * KIB) == b"z" * 512 + bytes(30 * KIB) + b"z" * 1536
    assert worker.do(Op.WRITE_ZEROES, 2 * MIB + 512, 8 * KIB, flags=flags) == 0
    expected = bytearray(CONTENT[2 * MIB :][: 16 * KIB])
    expected[512 : 512 + 8 * KIB] = bytes(8 * KIB)
    assert worker.read(2 * MIB, 16 * KIB) == expected


def test_what_was_written_is_there_for_the_successor(
    tmp_path: Path, files: CowOptions, transport: object
) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, CowBackend(files)):
        assert worker.write(64 * MIB - 4096, b"s" * 8192) == 8192
        assert worker.do(Op.DISCARD, 0, 8192) == 0
    assert _runs(files) == [
        (0, 8192, ZERO),
        (8192, 64 * MIB - 12288, BASE),
        (64 * MIB - 4096, 8192, DATA),
        (64 * MIB + 4096, 64 * MIB - 4096, BASE),
    ]
    with FakeWorker(tmp_path) as worker, serving(worker, CowBackend(CowOptions(overlay=files.overlay))):
        assert worker.read(64 * MIB - 4096, 8192) == b"s" * 8192
        assert worker.read(0, 8192) == bytes(8192)


def test_two_disks_share_a_base(tmp_path: Path, files: CowOptions, transport: object) -> None:
    other = msgspec.structs.replace(files, overlay=files.overlay.with_name("other"))
    for each in "ab":
        (tmp_path / each).mkdir()
    with (
        FakeWorker(tmp_path / "a") as first,
        serving(first, CowBackend(files)),
        FakeWorker(tmp_path / "b") as second,
        serving(second, CowBackend(other)),
    ):
        assert first.write(0, b"1" * 4096) == 4096
        assert second.write(0, b"2" * 4096) == 4096
        assert (first.read(0, 4096), second.read(0, 4096)) == (b"1" * 4096, b"2" * 4096)
        assert first.read(4096, 4096) == second.read(4096, 4096) == CONTENT[4096:8192]


def test_a_write_that_the_file_system_refuses_answers_its_errno_and_changes_nothing(
    tmp_path: Path, files: CowOptions, transport: object
) -> None:
    """RLIMIT_FSIZE stands in for a full disk."""
    _made(files)
    file = open_overlay(files.overlay)
    data_at = read_head(file, files.overlay).layout.data_at
    os.close(file)
    with FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, "cow", {"overlay": str(files.overlay)})
        worker.accept()
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (data_at + 65536, data_at + 65536))
        assert worker.write(0, b"a" * 4096) == 4096
        assert worker.write(65536 + 512, b"b" * 1024) == -errno.EFBIG
        assert worker.read(65536, 4096) == CONTENT[65536 : 65536 + 4096]
        assert worker.write(4096, b"c" * 4096) == 4096
        worker.detach()
        assert finish(process)[0] == 0


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE, Op.DISCARD, Op.WRITE_ZEROES])
def test_an_overlay_that_is_cut_while_it_is_served_ends_the_backend(
    tmp_path: Path, files: CowOptions, op: Op, transport: object
) -> None:
    with FakeWorker(tmp_path) as worker:
        process = spawn(
            tmp_path, "cow", {"overlay": str(files.overlay), "base": str(files.base), "size": "128M"}
        )
        worker.accept()
        assert worker.write(2 * MIB, b"a" * 8192) == 8192
        os.truncate(files.overlay, 9 * MIB)
        worker.send(0, [worker.describe(Kind.REQUEST, op, 2 * MIB, 4096)])
        status, said = finish(process)
        assert status != 0
        assert "became shorter than its device" in said
        assert worker.is_silent(for_s=0.01)
    assert files.overlay.stat().st_size == 9 * MIB


def test_a_disk_grows_and_its_new_end_reads_as_zeros(tmp_path: Path, files: CowOptions) -> None:
    _made(files)
    file = open_overlay(files.overlay)
    overlay = Overlay(file, files.overlay, None, serves=True)
    overlay.grow(SIZE_BYTES * 2)
    with pytest.raises(BackendError, match=r"its map has room for 64G: commit it into a new base"):
        overlay.grow(65 << 30)
    overlay.close()
    os.close(file)
    assert _runs(files) == [(0, SIZE_BYTES * 2, BASE)]


def test_an_overlay_is_served_by_one(files: CowOptions, impatient: None) -> None:
    _made(files)
    with files.overlay.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert f"locked by process {os.getpid()}" in _refused(files)


def test_a_base_that_another_may_write_is_refused(files: CowOptions, impatient: None) -> None:
    assert files.base is not None
    with files.base.open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert f"path={files.base}: locked by process {os.getpid()}" in _refused(files)


def test_a_base_in_use_refuses_a_writer(files: CowOptions) -> None:
    backend = CowBackend(files)
    backend.open(HINT)
    assert files.base is not None
    with files.base.open("r+b") as writer, pytest.raises(BlockingIOError):
        fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
    backend.close()


def test_another_base_is_refused(files: CowOptions) -> None:
    _made(files)
    base = files.base
    assert base is not None
    before = base.stat()
    os.utime(base, ns=(1, before.st_mtime_ns + 1))
    said = _refused(files)
    assert f"base={base}: has changed since the overlay was made" in said
    # What it says helps.
    assert f"touch -d @{before.st_mtime_ns // 10**9}.{before.st_mtime_ns % 10**9:09d} {base}" in said
    os.utime(base, ns=(1, before.st_mtime_ns))
    backend = CowBackend(files)
    backend.open(HINT)
    backend.close()
    base.write_bytes(CONTENT + b"more")
    assert "touch" not in _refused(files)
    base.write_bytes(CONTENT)


def test_a_missing_base_and_a_missing_overlay_are_named(files: CowOptions) -> None:
    without = CowOptions(overlay=files.overlay)
    assert f"overlay={files.overlay}: no such file; with base=FILE it is made" in _refused(without)
    _made(files)
    base = files.base
    assert base is not None
    base.rename(base.with_name("elsewhere"))
    assert f"base={base}: No such file or directory" in _refused(without)
    base.with_name("elsewhere").rename(base)


def test_no_overlay_is_made_for_a_device_that_was_served(files: CowOptions) -> None:
    backend = CowBackend(files)
    with pytest.raises(BackendError, match="has been served before: no empty one is made"):
        backend.open(HINT._replace(may_create=False))
    assert not files.overlay.exists()


def test_what_is_no_overlay_is_refused(files: CowOptions) -> None:
    files.overlay.write_bytes(bytes(MIB))
    assert "not an overlay of ublkpool's" in _refused(files)
    files.overlay.unlink()
    files.overlay.mkdir()
    assert "not a regular file" in _refused(files)
    files.overlay.rmdir()


def test_an_overlay_is_no_base(files: CowOptions) -> None:
    _made(files)
    said = _refused(CowOptions(base=files.overlay, overlay=files.overlay.with_name("second")))
    assert "is an overlay itself: commit it into a new base first" in said


@pytest.mark.parametrize("whole", [0, 1])
def test_one_whole_head_is_enough(files: CowOptions, whole: int) -> None:
    _made(files)
    file = open_overlay(files.overlay)
    head = read_head(file, files.overlay)
    write_head(file, msgspec.structs.replace(head, sequence=head.sequence + 1))
    os.pwrite(file, b"torn", (1 - whole) * HEAD_BYTES + 100)
    assert read_head(file, files.overlay).sequence == head.sequence + (whole == 0)
    os.pwrite(file, b"torn", whole * HEAD_BYTES + 100)
    os.close(file)
    assert "damaged: neither copy of its head has the right checksum" in _refused(files)


def test_another_version_is_refused(files: CowOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr("ublkpool.backends._cow_format.VERSION", 2)
        _made(files)
    assert "has version 2 (features 0x0), and this ublkpool knows 1" in _refused(files)


def test_a_damaged_map_is_refused(files: CowOptions) -> None:
    _made(files)
    file = open_overlay(files.overlay)
    os.pwrite(file, struct.pack("<Q", 3), read_head(file, files.overlay).layout.durable_at + 8)
    os.close(file)
    assert _refused(files) == (
        f"overlay={files.overlay}: the overlay's map is damaged: it has a state that does not exist"
    )


def test_a_short_overlay_is_refused(files: CowOptions) -> None:
    _made(files)
    os.truncate(files.overlay, SIZE_BYTES)
    assert "is shorter than its disk" in _refused(files)
    assert files.overlay.stat().st_size == SIZE_BYTES


def test_sizes_that_do_not_fit_are_refused(files: CowOptions) -> None:
    small = msgspec.structs.replace(files, size=MIB)
    assert "has 3146428 bytes, more than size=1M" in _refused(small)
    assert not files.overlay.exists()
    _made(files)
    assert "fewer than size=256M" in _refused(msgspec.structs.replace(files, size=256 * MIB))


def test_after_another_boot_the_durable_map_counts(
    files: CowOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    _made(files)
    file = open_overlay(files.overlay)
    layout = read_head(file, files.overlay).layout
    # The live copy names two blocks, the durable one, synced with its data, only the first.
    os.pwrite(file, struct.pack("<Q", 0b0101), layout.live_at)
    os.pwrite(file, struct.pack("<Q", 0b0001), layout.durable_at)
    os.close(file)
    assert _runs(files)[0] == (0, 8192, DATA)
    monkeypatch.setattr(_cow_overlay, "this_boot", lambda: bytes(16))
    assert _runs(files)[0] == (0, 4096, DATA)
    backend = CowBackend(files)
    backend.open(HINT)
    backend.close()
    monkeypatch.undo()
    # Now the live copy is that of the boot that served it.
    monkeypatch.setattr(_cow_overlay, "this_boot", lambda: bytes(16))
    assert _runs(files)[0] == (0, 4096, DATA)
