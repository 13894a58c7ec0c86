"""A store that grows while it is served, over the real wire: asked by the daemon, or announced by the backend."""

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from support.fakes.plain_backend import SIZE_BYTES, Plain
from support.fakes.worker import DEADLINE_S, DEVICE, FakeWorker, serving
from ublkpool.backends.file import FileBackend, FileOptions
from ublkpool.backends.memory import MemoryBackend, MemoryOptions
from ublkpool.backends.null import NullBackend, NullOptions
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, Hint
from ublkpool.bufpool.sdk.growth import can_resize
from ublkpool.bufpool.sdk.layers.stack import layered
from ublkpool.bufpool.sdk.loader import load
from ublkpool.bufpool.wire import Kind, Op

pytestmark = pytest.mark.usefixtures("transport")
KNOWS: dict[str, object] = {"knows_resize": True}
MIB = 1 << 20


class Growing(Plain):
    """A disk in a bytearray that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.device: Device | None = None
        self.asked: list[int] = []

    def started(self, device: Device) -> None:
        self.device = device

    def resize(self, size_bytes: int) -> None:
        self.asked.append(size_bytes)
        self.disk.extend(bytes(size_bytes - len(self.disk)))


class Refusing(Growing):
    """A disk whose growth fails as the test says."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def resize(self, size_bytes: int) -> None:
        raise self.error


class Slow(Growing):
    """A disk that grows when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_end = threading.Event(), threading.Event()

    def resize(self, size_bytes: int) -> None:
        self.begun.set()
        assert self.may_end.wait(DEADLINE_S)
        super().resize(size_bytes)


class Async(Growing):
    """A disk that an `async def` grows."""

    async def resize(self, size_bytes: int) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().resize(size_bytes)


def knowing(run_dir: Path, **more: Any) -> FakeWorker:
    """A daemon that knows resizes."""
    worker = FakeWorker(run_dir, **more)
    worker.described = dict(KNOWS)
    return worker


def heard(worker: FakeWorker) -> wire.SessionMessage:
    """The backend's next message on the attach connection."""
    assert worker.connection is not None
    return wire.decode_session_message(worker.connection.recv(wire.ATTACH_MESSAGE_BYTES_MAX))


def resize(worker: FakeWorker, size_bytes: int) -> str:
    """Ask for a size; the reason for a refusal."""
    worker.tell(wire.Resize(size_bytes=size_bytes))
    answer = heard(worker)
    assert isinstance(answer, wire.Resized) and answer.size_bytes == size_bytes
    return answer.reason


def result_at(worker: FakeWorker, offset: int) -> int:
    """The result of a read of 4096 bytes."""
    request = worker.describe(Kind.REQUEST, Op.READ, offset, 4096)
    worker.send(0, [request])
    return worker.answer_of(request).result


@pytest.mark.parametrize("kind", [Growing, Async])
def test_a_backend_serves_beyond_its_old_end_once_it_has_answered(
    tmp_path: Path, kind: type[Growing]
) -> None:
    backend = kind()
    with knowing(tmp_path) as worker, serving(worker, backend):
        assert worker.attach is not None and worker.attach.resizes
        assert result_at(worker, SIZE_BYTES) == -errno.EINVAL
        assert resize(worker, 2 * SIZE_BYTES) == ""
        assert worker.write(SIZE_BYTES, b"n" * 4096) == 4096
        assert worker.read(SIZE_BYTES, 4096) == b"n" * 4096
        assert result_at(worker, 2 * SIZE_BYTES) == -errno.EINVAL
        assert resize(worker, 2 * SIZE_BYTES) == "", "the daemon may ask again"
        assert backend.device is not None and backend.device.size_bytes == 2 * SIZE_BYTES


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BackendError("the cluster\nis full"), "the cluster is full"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "No space left on device: its file system is full",
        ),
        (ZeroDivisionError("division by zero"), "division by zero"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_store_that_cannot_grow_says_why_and_is_served_as_before(
    tmp_path: Path, error: Exception, reason: str
) -> None:
    with knowing(tmp_path) as worker, serving(worker, Refusing(error)):
        said = resize(worker, 2 * SIZE_BYTES)
        assert said.startswith(reason) and "\n" not in said
        assert result_at(worker, SIZE_BYTES) == -errno.EINVAL
        assert worker.write(0, b"o" * 4096) == 4096


def test_requests_are_served_while_the_store_grows_and_a_second_question_is_answered_at_once(
    tmp_path: Path,
) -> None:
    backend = Slow()
    with knowing(tmp_path) as worker, serving(worker, backend):
        worker.tell(wire.Resize(size_bytes=2 * SIZE_BYTES))
        assert backend.begun.wait(DEADLINE_S)
        assert worker.write(0, b"m" * 4096) == 4096
        assert "still growing to 2097152 bytes" in resize(worker, 3 * SIZE_BYTES)
        assert result_at(worker, SIZE_BYTES) == -errno.EINVAL
        backend.may_end.set()
        assert heard(worker) == wire.Resized(size_bytes=2 * SIZE_BYTES)
        assert result_at(worker, SIZE_BYTES) == 4096


def test_a_backend_ends_although_its_store_still_grows(tmp_path: Path) -> None:
    backend = Slow()
    with knowing(tmp_path) as worker, serving(worker, backend):
        worker.tell(wire.Resize(size_bytes=2 * SIZE_BYTES))
        assert backend.begun.wait(DEADLINE_S)
    backend.may_end.set()


def test_a_backend_announces_that_its_store_has_grown(tmp_path: Path) -> None:
    backend = Growing()
    with knowing(tmp_path) as worker, serving(worker, backend):
        # Its first answer says that it has been told of the device.
        assert result_at(worker, 0) == 4096 and backend.device is not None
        backend.disk.extend(bytes(SIZE_BYTES))
        backend.device.resized(2 * SIZE_BYTES)
        assert heard(worker) == wire.Grown(size_bytes=2 * SIZE_BYTES)
        assert result_at(worker, SIZE_BYTES) == 4096, "it serves what it announces"


def test_below_layers_a_store_that_has_grown_keeps_the_size_that_the_layers_know(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The cache would fill the rest of its last block with zeros, and read those beyond the old end."""
    backend = Growing()
    with knowing(tmp_path) as worker, serving(worker, layered(backend, ["cache"])):
        assert result_at(worker, 0) == 4096 and backend.device is not None
        backend.device.resized(2 * SIZE_BYTES)
        assert "has its old size until its backend is started again" in caplog.text
        assert result_at(worker, SIZE_BYTES) == -errno.EINVAL
        assert worker.connection is not None
        worker.connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            worker.connection.recv(1)
        worker.connection.settimeout(DEADLINE_S)


def test_an_older_daemon_hears_nothing_of_it(tmp_path: Path) -> None:
    backend = Growing()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.attach is not None and b"resizes" not in wire.encode_message(worker.attach)
        assert result_at(worker, 0) == 4096 and backend.device is not None
        backend.device.resized(2 * SIZE_BYTES)
        assert result_at(worker, 0) == 4096
        assert worker.connection is not None
        worker.connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            worker.connection.recv(1)
        worker.connection.settimeout(DEADLINE_S)


def test_only_a_backend_with_a_resize_of_its_own_can(tmp_path: Path) -> None:
    module = tmp_path / "mine.py"
    module.write_text("def get_size(): return 4096\ndef pread(buf, offset): pass\n")
    assert not can_resize(Plain()) and not can_resize(Backend()) and can_resize(Growing())
    assert not can_resize(load(str(module), {}))
    assert not can_resize(load("null", {}, ["readonly"])), "layers do not know of it"
    module.write_text(module.read_text() + "def resize(size_bytes): pass\n")
    assert can_resize(load(str(module), {}))
    module.write_text(module.read_text().replace("resize(size_bytes)", "resize()"))
    with pytest.raises(BackendError, match=r"resize\(\) must be resize\(size_bytes\)"):
        load(str(module), {})


def test_the_functions_of_the_example_grow_their_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    example = Path(__file__).parents[2] / "examples" / "file_functions.py"
    with knowing(tmp_path) as worker, serving(worker, load(str(example), {"path": str(path)})):
        assert resize(worker, 2 * MIB) == ""
        assert worker.write(MIB, b"f" * 4096) == 4096
    assert path.stat().st_size == 2 * MIB and path.read_bytes()[MIB : MIB + 4096] == b"f" * 4096


# The built-in backends


@pytest.mark.parametrize("is_allocated", [True, False])
def test_a_file_grows_allocated_or_sparse_as_it_is(tmp_path: Path, is_allocated: bool) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        if is_allocated:
            os.posix_fallocate(file.fileno(), 0, MIB)
        else:
            file.truncate(MIB)
    with knowing(tmp_path) as worker, serving(worker, FileBackend(FileOptions(path=path))):
        assert resize(worker, 4 * MIB) == ""
        status = path.stat()
        assert status.st_size == 4 * MIB
        assert (status.st_blocks * 512 >= 4 * MIB) is is_allocated
        assert worker.write(4 * MIB - 4096, b"e" * 4096) == 4096
        assert result_at(worker, 4 * MIB) == -errno.EINVAL


def test_a_file_that_finds_no_room_to_grow_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that is far too large nor one that fails half way costs others on that file system their room."""
    path = tmp_path / "store"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, MIB)
    allocate = os.posix_fallocate

    def no_room(fd: int, offset: int, nbytes: int) -> None:
        allocate(fd, offset, nbytes // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with knowing(tmp_path) as worker, serving(worker, FileBackend(FileOptions(path=path))):
        assert "No space left on device" in resize(worker, 2 * MIB)
        assert path.stat().st_size == MIB and path.stat().st_blocks * 512 == MIB
        assert result_at(worker, 0) == 4096
    with knowing(tmp_path) as worker, serving(worker, FileBackend(FileOptions(path=path))):
        assert "make room first" in resize(worker, 1 << 50)
        assert path.stat().st_size == MIB and result_at(worker, 0) == 4096


def test_a_file_that_lost_data_is_not_grown_over_the_loss(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    with knowing(tmp_path) as worker, serving(worker, FileBackend(FileOptions(path=path))):
        os.truncate(path, 4096)
        assert "4096 bytes, fewer than the device: growing it would hide the loss" in resize(worker, 2 * MIB)
        assert path.stat().st_size == 4096


def test_a_read_only_file_is_served_only_as_far_as_it_reaches(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(2 * MIB))
    backend = FileBackend(FileOptions(path=path, size=MIB, readonly=True))
    with knowing(tmp_path) as worker, serving(worker, backend):
        assert resize(worker, 2 * MIB) == ""
        assert result_at(worker, MIB) == 4096
        assert "readonly keeps it so" in resize(worker, 3 * MIB)


def test_a_memory_disk_and_null_do_what_they_can(tmp_path: Path) -> None:
    with knowing(tmp_path) as worker, serving(worker, NullBackend(NullOptions(size=MIB))):
        assert resize(worker, 1 << 50) == ""
        assert result_at(worker, 1 << 49) == 4096
    backend = MemoryBackend(MemoryOptions(size=MIB, keep=False))
    with knowing(tmp_path) as worker, serving(worker, backend):
        assert "the disk is sealed memory of 1M and cannot grow: add another" in resize(worker, 2 * MIB)


@pytest.mark.parametrize(
    ("option_bytes", "resized_bytes", "size_bytes", "asked_bytes"),
    [(0, 0, 0, 0), (MIB, 0, 0, MIB), (MIB, 2 * MIB, 2 * MIB, 2 * MIB), (4 * MIB, 2 * MIB, 2 * MIB, 4 * MIB)],
)
def test_the_size_that_a_resize_gave_wins_over_a_smaller_option(
    tmp_path: Path, option_bytes: int, resized_bytes: int, size_bytes: int, asked_bytes: int
) -> None:
    hint = Hint(DEVICE, tmp_path, size_bytes=size_bytes, resized_bytes=resized_bytes)
    assert hint.asked_bytes(option_bytes) == asked_bytes


def test_the_successor_of_a_grown_file_serves_all_of_it_whatever_its_option_says(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(2 * MIB))
    hint = Hint(DEVICE, tmp_path, size_bytes=2 * MIB, resized_bytes=2 * MIB, may_create=False)
    backends: list[Backend] = [
        FileBackend(FileOptions(path=path, size=MIB)),
        NullBackend(NullOptions(size=MIB)),
        MemoryBackend(MemoryOptions(size=MIB, keep=False)),
    ]
    for backend in backends:
        opened: Any = backend.open(hint)
        assert opened.size_bytes == 2 * MIB
        if opened.segment is not None:
            opened.segment.close()
        backend.close()
