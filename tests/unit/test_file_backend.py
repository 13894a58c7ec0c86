"""The file backend on real files: writes reach the file, discards make holes, errors become errnos."""

import errno
import fcntl
import os
import random
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakes.worker import OWN_SEGMENT, FakeWorker, finish, serving, spawn
from ublkpool.backends.file import FileBackend, FileOptions, open_file
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op

pytestmark = pytest.mark.usefixtures("transport")

SIZE_BYTES = 64 << 20
KIB = 1 << 10


@pytest.fixture(params=["disk", "memory"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk and one in memory, which the native storage treats differently."""
    if request.param == "disk":
        yield tmp_path / "disk.img"
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory) / "disk.img"


@pytest.fixture(params=["auto", "off"])
def worker(request: pytest.FixtureRequest, tmp_path: Path, disk: Path) -> Iterator[FakeWorker]:
    """A file backend attached, direct where the file system can, and buffered."""
    options = FileOptions(path=disk, size=SIZE_BYTES, direct=request.param)
    with FakeWorker(tmp_path) as worker, serving(worker, FileBackend(options)):
        yield worker


def test_a_missing_file_is_made_sparse(worker: FakeWorker, disk: Path) -> None:
    status = disk.stat()
    assert (status.st_size, status.st_blocks) == (SIZE_BYTES, 0)
    assert worker.read(SIZE_BYTES - 4096, 4096) == bytes(4096)


def test_writes_are_in_the_file_when_answered(worker: FakeWorker, disk: Path) -> None:
    data = random.Random(1).randbytes(16 * KIB)
    assert worker.write(1 << 20, data) == len(data)
    with disk.open("rb") as file:
        assert os.pread(file.fileno(), len(data), 1 << 20) == data
    assert worker.read(1 << 20, len(data)) == data


def test_many_tags_in_one_frame_keep_their_data_apart(worker: FakeWorker, disk: Path) -> None:
    requests = [
        worker.describe(Kind.REQUEST, Op.WRITE, tag * 32 * KIB, 32 * KIB, tag=tag)
        for tag in range(worker.depth)
    ]
    for request in requests:
        worker.pool[request.buffer : request.buffer + 32 * KIB] = bytes([request.tag + 1]) * 32 * KIB
    worker.send(0, requests)
    assert {worker.receive().tag for _ in requests} == set(range(worker.depth))
    content = disk.read_bytes()
    assert all(
        content[tag * 32 * KIB :][: 32 * KIB] == bytes([tag + 1]) * 32 * KIB for tag in range(worker.depth)
    )


def test_a_discard_gives_the_blocks_back(worker: FakeWorker, disk: Path) -> None:
    for at in range(0, 1 << 20, 64 * KIB):
        assert worker.write(at, b"d" * 64 * KIB) == 64 * KIB
    assert worker.do(Op.FLUSH) == 0
    before = disk.stat().st_blocks
    assert worker.do(Op.DISCARD, 0, 512 * KIB) == 0
    assert disk.stat().st_blocks <= before - 512 * 2
    assert worker.read(0, 4096) == bytes(4096)
    assert worker.read(512 * KIB, 4096) == b"d" * 4096


@pytest.mark.parametrize(("flags", "allocated"), [(0, False), (Flag.NOUNMAP, True), (Flag.FUA, False)])
def test_write_zeroes_reads_as_zeros(worker: FakeWorker, disk: Path, flags: int, allocated: bool) -> None:
    assert worker.write(0, b"z" * 64 * KIB) == 64 * KIB
    assert worker.do(Op.FLUSH) == 0
    assert worker.do(Op.WRITE_ZEROES, 4096, 32 * KIB, flags=flags) == 0
    assert worker.read(0, 64 * KIB) == b"z" * 4096 + bytes(32 * KIB) + b"z" * (28 * KIB)
    assert (disk.stat().st_blocks >= 128) is allocated


def test_fua_and_flush_succeed(worker: FakeWorker) -> None:
    assert worker.write(0, b"f" * 4096, flags=Flag.FUA) == 4096
    assert worker.do(Op.FLUSH) == 0


def test_a_request_past_the_end_fails_and_the_next_succeeds(worker: FakeWorker) -> None:
    assert worker.do(Op.WRITE_ZEROES, SIZE_BYTES - 4096, 8192) == -errno.EINVAL
    assert worker.write(SIZE_BYTES - 4096, b"e" * 4096) == 4096


def test_a_write_that_the_file_system_refuses_answers_its_errno(tmp_path: Path, disk: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk."""
    with FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, "file", {"path": str(disk), "size": "1M"})
        worker.accept()
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (65536, 65536))
        assert worker.write(0, b"a" * 4096) == 4096
        assert worker.write(65536, b"b" * 4096) == -errno.EFBIG
        assert worker.write(4096, b"c" * 4096) == 4096
        worker.detach()
        assert finish(process)[0] == 0


def test_placed_writes_land_in_the_file(tmp_path: Path, disk: Path) -> None:
    options = FileOptions(path=disk, size=SIZE_BYTES, placement="backend", segment=128 * KIB)
    data = random.Random(2).randbytes(64 * KIB)
    with FakeWorker(tmp_path, placement="backend") as worker, serving(worker, FileBackend(options)):
        for round_number in range(4):
            assert worker.write(round_number * 64 * KIB, data) == len(data)
        short, request = worker.place(1 << 20, 64 * KIB)
        assert worker.fill(short, request, data[: 8 * KIB]) == 8 * KIB
    assert disk.read_bytes()[: 256 * KIB] == data * 4
    assert disk.read_bytes()[1 << 20 :][: 64 * KIB] == data[: 8 * KIB] + bytes(56 * KIB)


def test_data_that_lands_in_posted_regions_is_in_the_file(tmp_path: Path, disk: Path) -> None:
    options = FileOptions(path=disk, size=SIZE_BYTES, placement="backend", segment=1 << 20)
    sizes = (4 * KIB, 64 * KIB)
    contents = {size: random.Random(size).randbytes(size) for size in sizes}
    with (
        FakeWorker(tmp_path, placement="backend", post_bytes=sizes) as worker,
        serving(worker, FileBackend(options)),
    ):
        posted: dict[int, Descriptor] = {}
        while posted.keys() != set(sizes):
            post = worker.receive()
            assert post.kind == Kind.POST
            posted[post.length] = post
        for tag, size in enumerate(sizes):
            write = worker.describe(Kind.DATA, Op.WRITE, tag << 20, size, tag=tag)
            assert worker.fill(posted[size], write._replace(buffer=posted[size].buffer, segment=OWN_SEGMENT),
                               contents[size]) == size  # fmt: skip
    assert disk.read_bytes()[: 4 * KIB] == contents[4 * KIB]
    assert disk.read_bytes()[1 << 20 :][: 64 * KIB] == contents[64 * KIB]


def test_a_read_only_file_refuses_writes_and_says_so(tmp_path: Path, disk: Path) -> None:
    disk.write_bytes(b"r" * 8192)
    with FakeWorker(tmp_path) as worker, serving(worker, FileBackend(FileOptions(path=disk, readonly=True))):
        assert worker.attach is not None and worker.attach.read_only
        assert worker.read(0, 8192) == b"r" * 8192
        assert worker.write(0, b"w" * 4096) == -errno.EPERM
    assert disk.read_bytes() == b"r" * 8192


def test_offsets_near_7_eib_do_not_overflow(tmp_path: Path) -> None:
    size_bytes = 7 << 60
    sparse = Path("/dev/shm") / f"ublkpool-test-{os.getpid()}"
    try:
        with FakeWorker(tmp_path) as worker:
            options = FileOptions(path=sparse, size=size_bytes)
            with serving(worker, FileBackend(options)):
                assert worker.write(size_bytes - 4096, b"7" * 4096) == 4096
                assert worker.read(size_bytes - 8192, 8192) == bytes(4096) + b"7" * 4096
                assert worker.do(Op.DISCARD, size_bytes - (5 << 30), 5 << 30) == 0
                assert worker.read(size_bytes - 4096, 4096) == bytes(4096)
    finally:
        sparse.unlink(missing_ok=True)


def test_where_no_hole_can_be_zeroed_zeros_are_written(tmp_path: Path) -> None:
    """tmpfs punches but knows no ZERO_RANGE, so NOUNMAP falls back to writing."""
    path = Path("/dev/shm") / f"ublkpool-test-{os.getpid()}"
    try:
        with (
            FakeWorker(tmp_path) as worker,
            serving(worker, FileBackend(FileOptions(path=path, size=4 << 20))),
        ):
            assert worker.write((3 << 20) - 4096, b"n" * 8192) == 8192
            assert worker.do(Op.WRITE_ZEROES, 4096, 3 << 20, flags=Flag.NOUNMAP) == 0
            assert worker.read((3 << 20) - 4096, 8192) == bytes(8192)
            assert path.stat().st_blocks * 512 >= 3 << 20
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (FileOptions(path=Path("/nonexistent/x")), "no such file; with size=SIZE it is created"),
        (FileOptions(path=Path("/nonexistent/x"), size=4096), "No such file or directory"),
        (FileOptions(path=Path("/dev/null")), "neither a regular file nor a block device"),
        (FileOptions(path=Path("/tmp"), readonly=True), "neither a regular file nor a block device"),
    ],
)
def test_the_error_for_an_unusable_file_is_one_line(options: FileOptions, line: str) -> None:
    with pytest.raises(BackendError, match=line) as caught:
        open_file(options)
    assert str(options.path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("readonly", [True, False])
def test_a_fifo_is_refused_without_waiting_for_its_other_end(tmp_path: Path, readonly: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BackendError, match="neither a regular file nor a block device"):
        open_file(FileOptions(path=tmp_path / "fifo", readonly=readonly))


@pytest.mark.parametrize("is_there", [False, True])
def test_no_file_is_made_where_the_node_of_a_block_device_is_missing(tmp_path: Path, is_there: bool) -> None:
    """Neither under the name, nor through a link, nor in place of an empty file that another program made."""
    node = Path(f"/dev/ublkpool-test-{os.getpid()}")
    link = tmp_path / "link"
    link.symlink_to(node)
    try:
        if is_there:
            node.touch()
        for path in (node, link):
            with pytest.raises(BackendError, match="no file is made below /dev"):
                open_file(FileOptions(path=path, size=1 << 20))
        assert not is_there or node.stat().st_size == 0
        assert is_there or not node.exists()
    finally:
        node.unlink(missing_ok=True)


def test_a_file_that_is_smaller_than_asked_is_refused(disk: Path) -> None:
    disk.write_bytes(bytes(8192))
    with pytest.raises(BackendError, match=r"has 8192 bytes, fewer than size=16K \(16384\)") as caught:
        open_file(FileOptions(path=disk, size=16384))
    assert str(disk) in str(caught.value)


@pytest.mark.parametrize("found_bytes", [16384, 16384 + 100])
def test_of_a_larger_file_only_the_size_of_the_device_is_served(disk: Path, found_bytes: int) -> None:
    disk.write_bytes(bytes(found_bytes))
    opened = open_file(FileOptions(path=disk, size=8192))
    os.close(opened.file)
    assert (opened.size_bytes, disk.stat().st_size) == (8192, found_bytes)


@pytest.mark.parametrize("options", [{"size": "64M"}, {}])
@pytest.mark.parametrize("grown_bytes", [128 << 20, (128 << 20) + 100])
def test_a_successor_serves_a_file_that_was_grown_meanwhile(
    tmp_path: Path, disk: Path, options: dict[str, str], grown_bytes: int
) -> None:
    with disk.open("wb") as file:
        file.truncate(SIZE_BYTES)
    with FakeWorker(tmp_path, size_bytes=SIZE_BYTES) as worker:
        first = spawn(tmp_path, "file", {"path": str(disk), **options})
        worker.accept()
        assert worker.write(SIZE_BYTES - 4096, b"g" * 4096) == 4096
        os.truncate(disk, grown_bytes)
        first.kill()
        finish(first)
        second = spawn(tmp_path, "file", {"path": str(disk), **options})
        assert worker.accept().size_bytes == SIZE_BYTES
        assert worker.read(SIZE_BYTES - 4096, 4096) == b"g" * 4096
        assert worker.write(0, b"h" * 4096) == 4096
        worker.detach()
        assert finish(second)[0] == 0


def test_a_successor_refuses_a_file_that_was_cut_short_in_one_line(tmp_path: Path, disk: Path) -> None:
    disk.write_bytes(bytes(1 << 20))
    with FakeWorker(tmp_path, size_bytes=SIZE_BYTES) as worker:
        process = spawn(tmp_path, "file", {"path": str(disk)})
        worker.answer_question()
        status, said = finish(process)
    assert status != 0
    assert f"path={disk}: has 1048576 bytes, fewer than size=64M" in said


def test_a_tail_smaller_than_a_block_is_not_served(disk: Path) -> None:
    disk.write_bytes(bytes(8192 + 100))
    opened = open_file(FileOptions(path=disk, direct="off"))
    os.close(opened.file)
    assert opened.size_bytes == 8192


def test_two_readers_share_a_file(disk: Path) -> None:
    disk.write_bytes(bytes(8192))
    both = [open_file(FileOptions(path=disk, readonly=True)) for _ in range(2)]
    for each in both:
        os.close(each.file)
    assert both[0].file != both[1].file


def test_direct_io_is_direct_where_the_file_system_can(disk: Path) -> None:
    opened = open_file(FileOptions(path=disk, size=8192))
    flags = fcntl.fcntl(opened.file, fcntl.F_GETFL)
    os.close(opened.file)
    assert bool(flags & os.O_DIRECT) is opened.direct
