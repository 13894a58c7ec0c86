"""`parallel`: plain methods on several threads, on the real wire."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakes.plain_backend import SIZE_BYTES, Held, Plain
from support.fakes.worker import BackendThread, FakeWorker, finish, serving, spawn
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, FrameEngine, Outbox, Properties, Request
from ublkpool.bufpool.sdk.loader import load
from ublkpool.bufpool.sdk.serving import serve
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op

pytestmark = pytest.mark.usefixtures("transport")

BLOCK = 4096
WAIT_S = 60.0


class Meeting(Plain):
    """Each read waits until `parallel` reads run at the same time."""

    parallel = 4

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(self.parallel)
        self.threads: set[int] = set()

    def pread(self, buf: memoryview, offset: int) -> None:
        self.threads.add(threading.get_ident())
        self.barrier.wait(WAIT_S)
        super().pread(buf, offset)


def _send(worker: FakeWorker, op: Op, count: int, *, queue: int = 0, flags: int = 0) -> list[Descriptor]:
    asked = [
        worker.describe(Kind.REQUEST, op, tag * BLOCK, BLOCK, tag=tag, queue=queue, flags=flags)
        for tag in range(count)
    ]
    worker.send(queue, asked)
    return asked


def _answers(worker: FakeWorker, count: int, queue: int = 0) -> dict[int, int]:
    found = [worker.receive(queue) for _ in range(count)]
    assert {each.kind for each in found} == {Kind.DONE}
    return {each.tag: each.result for each in found}


def test_as_many_methods_run_at_once_as_there_are_threads(tmp_path: Path) -> None:
    backend = Meeting()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        _send(worker, Op.READ, 8)
        assert _answers(worker, 8) == dict.fromkeys(range(8), BLOCK)
    assert len(backend.threads) == 4


class Gated(Plain):
    """Writes that say which have begun, and end when the test lets them."""

    parallel = 2

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        self.calls.append(("pwrite", offset))
        self.begun.release()
        assert self.may_end.acquire(timeout=WAIT_S)

    def begins(self) -> bool:
        """Whether another write begins."""
        return self.begun.acquire(timeout=WAIT_S)

    @property
    def offsets(self) -> list[int]:
        return sorted(each[1] // BLOCK for each in self.calls if each[0] == "pwrite")


def test_a_request_waits_for_a_thread_and_begins_in_its_turn(tmp_path: Path) -> None:
    backend = Gated()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        _send(worker, Op.WRITE, 4)
        assert backend.begins() and backend.begins()
        assert backend.offsets == [0, 1] and worker.is_silent()
        backend.may_end.release()
        assert backend.begins() and backend.offsets == [0, 1, 2]
        backend.may_end.release(3)
        assert _answers(worker, 4) == dict.fromkeys(range(4), BLOCK)


def test_a_fence_waits_for_running_methods_and_those_that_wait_never_begin(tmp_path: Path) -> None:
    backend = Gated()
    with FakeWorker(tmp_path, queues=2) as worker, serving(worker, backend):
        _send(worker, Op.WRITE, 4)
        assert backend.begins() and backend.begins()
        worker.fence_executing(0)
        assert worker.is_silent(), "FENCED although two writes of the old epoch are executing"
        backend.may_end.release(2)
        fenced = worker.receive()
        assert (fenced.kind, fenced.epoch) == (Kind.FENCED, 2)
        assert backend.offsets == [0, 1] and worker.is_silent()
        backend.may_end.release()
        assert worker.write(5 * BLOCK, b"n" * BLOCK) == BLOCK


def test_a_fence_of_one_queue_leaves_the_waiting_requests_of_another(tmp_path: Path) -> None:
    backend = Gated()
    with FakeWorker(tmp_path, queues=2) as worker, serving(worker, backend):
        _send(worker, Op.WRITE, 2)
        assert backend.begins() and backend.begins()
        _send(worker, Op.WRITE, 1, queue=1)
        worker.fence(0)
        backend.may_end.release(3)
        # The two that were executing may end before the backend reads the fence: then their answers come first.
        while (answer := worker.receive(0)).kind == Kind.DONE:
            pass
        assert answer.kind == Kind.FENCED
        assert _answers(worker, 1, queue=1) == {0: BLOCK}


@pytest.mark.parametrize("keep", [False, True])
def test_an_end_finishes_the_executing_requests(tmp_path: Path, keep: bool) -> None:
    backend, before = Gated(), set(threading.enumerate())
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend, tmp_path)
        worker.accept()
        _send(worker, Op.WRITE, 2)
        assert backend.begins() and backend.begins()
        worker.tell(wire.Detach(reason="test", keep=keep))
        assert worker.is_silent() and "close" not in backend.calls
        backend.may_end.release(2)
        assert _answers(worker, 2) == {0: BLOCK, 1: BLOCK}
        assert thread.join() == 0
    assert backend.calls[-1] == "close"
    for each in set(threading.enumerate()) - before:
        # The backend waits a second for its threads; a starved machine may need longer.
        each.join(WAIT_S)
        assert not each.is_alive()


class Failing(Plain):
    parallel = 3

    def pread(self, buf: memoryview, offset: int) -> int:  # type: ignore[override]
        if offset == 0:
            raise OSError(errno.ENOSPC, "full")
        if offset == BLOCK:
            raise ZeroDivisionError
        if offset == 2 * BLOCK:
            raise SystemExit(3)
        return 512 if offset == 3 * BLOCK else BLOCK + 1


def test_errors_and_short_results_are_answered_as_without_threads(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, Failing()):
        _send(worker, Op.READ, 5)
        eio = -errno.EIO
        assert _answers(worker, 5) == {0: -errno.ENOSPC, 1: eio, 2: eio, 3: 512, 4: eio}
        assert worker.write(0, b"w" * BLOCK) == BLOCK, "every thread still serves"


def test_every_operation_reaches_its_method(tmp_path: Path) -> None:
    class Parallel(Plain):
        parallel = 2

    backend = Parallel()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.write(BLOCK, b"a" * BLOCK, flags=Flag.FUA) == BLOCK
        assert worker.read(BLOCK, BLOCK) == b"a" * BLOCK
        assert worker.do(Op.FLUSH) == 0
        assert worker.do(Op.DISCARD, 0, 2 * BLOCK) == 0
        assert worker.do(Op.WRITE_ZEROES, BLOCK, BLOCK, flags=Flag.FUA) == 0
        assert worker.read(BLOCK, BLOCK) == bytes(BLOCK)
    assert backend.calls[1:-2] == [
        ("pwrite", BLOCK, True),
        "flush",
        ("trim", 0, 2 * BLOCK),
        ("pwrite", BLOCK, False),
        "flush",
    ]


class Placed(Gated):
    properties = Properties(
        size_bytes=SIZE_BYTES, placement="backend", segment_bytes=64 << 10, volatile_cache=True
    )

    def place(self, offset: int, length: int, flags: int) -> int | None:
        return offset

    def store_placed(self, region: int, buf: memoryview, offset: int, fua: bool) -> int | None:
        self.calls.append(("stored", region, bytes(buf[:1]), offset, fua))
        self.pwrite(buf, offset, fua)
        return None


def test_a_placed_write_is_stored_on_a_thread(tmp_path: Path) -> None:
    backend = Placed()
    backend.may_end.release(2)
    with FakeWorker(tmp_path, placement="backend") as worker, serving(worker, backend):
        assert worker.write(0, b"p" * BLOCK) == BLOCK
        assert worker.write(BLOCK, b"q" * BLOCK, flags=Flag.FUA) == BLOCK
    stored = [each for each in backend.calls if each[0] == "stored"]
    assert stored == [("stored", 0, b"p", 0, False), ("stored", BLOCK, b"q", BLOCK, True)]


FUNCTIONS = """
import os, threading
parallel = 2
disk, calls = bytearray(65536), []
together = threading.Barrier(2)
def get_size(): return len(disk)
def pread(buf, offset):
    together.wait(60)
    buf[:] = disk[offset : offset + len(buf)]
def pwrite(buf, offset):
    calls.append("pwrite")
    disk[offset : offset + len(buf)] = buf
def flush(): calls.append("flush")
def zero(offset, length): calls.append("zero"); disk[offset : offset + length] = bytes(length)
"""


def test_a_module_of_functions_names_its_threads_and_keeps_fua(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    backend = load(str(tmp_path / "mine.py"), {})
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.write(0, b"f" * BLOCK, flags=Flag.FUA) == BLOCK
        assert worker.write(BLOCK, b"g" * BLOCK) == BLOCK
        assert worker.do(Op.WRITE_ZEROES, 2 * BLOCK, BLOCK, flags=Flag.FUA) == 0
        _send(worker, Op.READ, 2)
        assert _answers(worker, 2) == {0: BLOCK, 1: BLOCK}
    assert backend.module.calls == ["pwrite", "flush", "pwrite", "zero", "flush"]  # type: ignore[attr-defined]


class Submitting(Held):
    parallel = 2


class Batching(Plain):
    exclusive_bytes = BLOCK

    def serve_batch(self, batch: object) -> None: ...


class Native(Plain):
    parallel = 2

    def engine(self, device: Device) -> FrameEngine | None: ...


class InPlace(Plain):
    exclusive_bytes = BLOCK

    def read_in_place(self, offset: int, length: int) -> int | None: ...


class AsyncPlace(Plain):
    async def place(self, offset: int, length: int, flags: int) -> int | None: ...  # type: ignore[override]


class Yielding(Plain):
    async def pread(self, buf: memoryview, offset: int) -> Iterator[int]:  # type: ignore[override,misc]
        yield 1


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (Submitting, "submit takes the requests itself"),
        (Batching, "serve_batch takes the requests itself"),
        (Native, "engine takes the requests itself"),
        (InPlace, "exclusive_bytes cannot hold for read_in_place"),
        (AsyncPlace, "place cannot be async def"),
        (Yielding, "pread is async def with yield"),
    ],
)
def test_what_does_not_go_together_is_one_line_before_anything_is_opened(
    tmp_path: Path, kind: type[Plain], line: str
) -> None:
    backend = kind()
    with pytest.raises(BackendError, match=f"^vol: .*{line}") as caught:
        serve(backend, device="x", run_dir=tmp_path, kind="vol", handle_signals=False)
    assert "\n" not in str(caught.value) and not backend.calls


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4", 1025, None])
def test_a_number_of_threads_that_is_none_is_one_line(tmp_path: Path, value: object) -> None:
    backend: Backend = Plain()
    backend.parallel = value  # type: ignore[assignment]
    with pytest.raises(BackendError, match=r"^Plain: parallel must be a whole number from 1 to 1024, not "):
        serve(backend, device="x", run_dir=tmp_path, handle_signals=False)


def test_a_method_that_never_returns_does_not_keep_a_failed_process_alive(tmp_path: Path) -> None:
    """The worker sends what no worker may send, which ends the process with an error while a method executes."""
    (tmp_path / "stuck.py").write_text(
        "import threading\nparallel = 2\ndef get_size(): return 65536\n"
        "def pread(buf, offset): threading.Event().wait()\n"
    )
    with FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, tmp_path / "stuck.py")
        worker.accept()
        _send(worker, Op.READ, 1)
        worker.send(0, [worker.describe(Kind.REQUEST, Op.READ, 0, BLOCK, lend=False)._replace(kind=99)])
        status, log = finish(process)
    assert status == 1 and "WireError" in log, log


def test_a_result_that_comes_after_the_loops_end_writes_to_no_descriptor() -> None:
    outbox = Outbox()
    request = Request(Op.WRITE, 0, 0, BLOCK, memoryview(b""), -1, outbox, None)
    number = outbox.descriptor
    reader, writer = os.pipe2(os.O_NONBLOCK)
    outbox.close()
    os.dup2(writer, number)
    thread = threading.Thread(target=request.complete)
    thread.start()
    thread.join()
    with pytest.raises(BlockingIOError):
        os.read(reader, 8)
    for each in {reader, writer, number}:
        os.close(each)


def test_a_wake_that_is_written_late_is_read_by_the_turn_that_it_causes() -> None:
    """A thread may be stopped between its flag and its write, and the loop may acknowledge in between."""
    outbox = Outbox()
    outbox.wake()
    outbox.acknowledge()
    os.eventfd_write(outbox.descriptor, 1)
    outbox.acknowledge()
    outbox.drain()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(outbox.descriptor)
    outbox.close()
