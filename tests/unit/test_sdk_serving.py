"""The SDK's loop on the real wire: attaching, batches, errors, fences, endings."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.fakes.plain_backend import SIZE_BYTES, Held, Plain
from support.fakes.request_engine import RequestEngine
from support.fakes.worker import (
    DEADLINE_S,
    DEVICE,
    DEVICE_NUMBER,
    BackendThread,
    FakeWorker,
    finish,
    serving,
    spawn,
)
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused, BackendError
from ublkpool.bufpool.sdk.backend import Device, Outbox, Properties
from ublkpool.bufpool.sdk.client import DeviceConnection, OwnSegment
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op

pytestmark = pytest.mark.usefixtures("transport")


def test_every_operation_reaches_its_method(tmp_path: Path) -> None:
    backend = Plain()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.write(4096, b"a" * 4096, flags=Flag.FUA) == 4096
        assert worker.read(4096, 4096) == b"a" * 4096
        assert worker.do(Op.FLUSH) == 0
        assert worker.do(Op.DISCARD, 0, 8192) == 0
        assert worker.do(Op.WRITE_ZEROES, 4096, 4096) == 0
        assert worker.read(4096, 4096) == bytes(4096)
    assert backend.calls == [
        ("open", DEVICE),
        ("pwrite", 4096, True),
        "flush",
        ("trim", 0, 8192),
        ("pwrite", 4096, False),
        "detached",
        "close",
    ]


def test_every_queue_is_served(tmp_path: Path) -> None:
    with FakeWorker(tmp_path, queues=3) as worker, serving(worker, Plain()):
        for queue in range(3):
            assert worker.write(queue * 4096, bytes([queue]) * 4096, queue=queue) == 4096
        assert worker.read(8192, 4096, queue=0) == b"\x02" * 4096


def test_answers_that_are_ready_together_go_in_one_frame(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, Plain()):
        worker.send(0, [worker.describe(Kind.REQUEST, Op.FLUSH, tag=tag) for tag in range(8)])
        assert len(worker.links[0].receive_frame(DEADLINE_S)) == 8 * wire.DESCRIPTOR_BYTES


class Failing(Plain):
    def pread(self, buf: memoryview, offset: int) -> None:
        if offset == 0:
            raise OSError(errno.ENOSPC, "full")
        raise ZeroDivisionError("a bug")


def test_exceptions_become_errnos_and_the_loop_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, Failing()):
        results = []
        for offset in (0, 4096, 4096):
            request = worker.describe(Kind.REQUEST, Op.READ, offset, 4096)
            worker.send(0, [request])
            results.append(worker.answer_of(request).result)
        assert results == [-errno.ENOSPC, -errno.EIO, -errno.EIO]
        assert worker.write(0, b"w" * 4096) == 4096
    bugs = [each for each in caplog.records if each.exc_info]
    assert len(bugs) == 1, "a bug is logged once, with its traceback"


def test_requests_are_completed_from_other_threads_in_any_order(tmp_path: Path) -> None:
    backend = Held()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        sent = [worker.describe(Kind.REQUEST, Op.WRITE, tag * 4096, 4096, tag=tag) for tag in range(4)]
        worker.send(0, sent)
        requests = list(backend.wait_for(4))
        for request in reversed(requests):
            request.complete()
        answers = {worker.receive().tag for _ in sent}
        assert answers == {0, 1, 2, 3}
        with pytest.raises(RuntimeError, match="answered twice"):
            requests[0].complete()


@pytest.mark.parametrize("result", [8192, 1 << 40])
def test_a_result_larger_than_the_request_is_not_passed_on(tmp_path: Path, result: int) -> None:
    backend = Held()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        request = worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096)
        worker.send(0, [request])
        backend.wait_for(1)[0].complete(result)
        assert worker.answer_of(request).result == -errno.EIO


def test_a_replayed_request_says_so(tmp_path: Path) -> None:
    backend = Held()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        request = worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096, flags=Flag.REPLAY)
        worker.send(0, [request])
        held = backend.wait_for(1)[0]
        assert held.flags & Flag.REPLAY
        held.complete()
        assert worker.answer_of(request).result == 4096


def test_fenced_is_sent_only_when_no_old_request_is_executing(tmp_path: Path) -> None:
    backend = Held()
    with FakeWorker(tmp_path, queues=2) as worker, serving(worker, backend):
        worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096, tag=tag) for tag in range(2)])
        old = list(backend.wait_for(2))
        worker.fence_executing(0)
        assert worker.is_silent()
        old[0].complete()
        assert worker.is_silent(), "one of the two still runs"
        # On another tag: the backend may not have collected the answer on the first one yet.
        worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096, tag=2)])
        new = backend.wait_for(1)[2]
        old[1].complete()
        fenced = worker.receive()
        assert (fenced.kind, fenced.epoch) == (Kind.FENCED, 2)
        new.complete()
        done = worker.receive()
        assert (done.kind, done.epoch) == (Kind.DONE, 2), "the old ones' results were dropped"


def test_a_fence_concerns_its_own_queue(tmp_path: Path) -> None:
    backend = Held()
    with FakeWorker(tmp_path, queues=2) as worker, serving(worker, backend):
        request = worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096, queue=1)
        worker.send(1, [request])
        held = backend.wait_for(1)[0]
        worker.fence(0)
        assert worker.receive(0).kind == Kind.FENCED
        held.complete()
        assert worker.receive(1).kind == Kind.DONE


def test_a_request_overtaken_by_a_fence_in_its_own_frame_never_runs(tmp_path: Path) -> None:
    backend = Plain()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        old = worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096)
        fence = Descriptor(Kind.FENCE, device=old.device, epoch=worker.epoch + 1)
        worker.send(0, [old, fence])
        assert worker.receive().kind == Kind.FENCED
        assert worker.is_silent()
    assert not [each for each in backend.calls if each[0] == "pwrite"]


class Placing(Plain):
    """Names one region, and lets the test say when it is free and what is wrong with it."""

    properties = Properties(size_bytes=SIZE_BYTES, placement="backend", segment_bytes=65536)

    def __init__(self) -> None:
        super().__init__()
        self.room: int | None = 0
        self.asked = threading.Event()
        self.device: Device | None = None

    def started(self, device: Device) -> None:
        self.device = device

    def place(self, offset: int, length: int, flags: int) -> int | None:
        if offset == 0:
            raise OSError(errno.EDQUOT, "not for you")
        room = self.room
        self.asked.set()
        return room

    def released(self, region: int) -> None:
        self.calls.append(("released", region))


def test_a_place_may_be_refused_with_an_errno(tmp_path: Path) -> None:
    with FakeWorker(tmp_path, placement="backend") as worker, serving(worker, Placing()):
        answer, _ = worker.place(0, 4096)
        assert (answer.kind, answer.result) == (Kind.REJECT, -errno.EDQUOT)


@pytest.mark.parametrize("room", [-512, 100, 65536, 61952])
def test_a_region_outside_the_segment_never_reaches_the_worker(tmp_path: Path, room: int) -> None:
    backend = Placing()
    backend.room = room
    with FakeWorker(tmp_path, placement="backend") as worker, serving(worker, backend):
        answer, _ = worker.place(4096, 4096)
        assert answer.kind == Kind.REJECT and answer.result < 0


def test_a_place_that_waits_is_asked_again_after_a_wake(tmp_path: Path) -> None:
    backend = Placing()
    backend.room = None
    with FakeWorker(tmp_path, placement="backend") as worker, serving(worker, backend):
        place = worker.describe(Kind.PLACE, Op.WRITE, 4096, 4096)
        worker.send(0, [place])
        assert backend.asked.wait(DEADLINE_S) and backend.device is not None
        assert worker.is_silent()
        backend.room = 8192
        backend.device.wake()
        assert worker.answer_of(place).buffer == 8192


def _released(backend: Placing) -> list[object]:
    return [each[1] for each in backend.calls if each[0] == "released"]


def test_every_region_comes_back_exactly_once(tmp_path: Path) -> None:
    backend = Placing()
    with FakeWorker(tmp_path, placement="backend") as worker, serving(worker, backend):
        placed, request = worker.place(4096, 4096)
        assert worker.fill(placed, request, b"1" * 4096, release=False) == 4096
        worker.send(0, [request._replace(kind=Kind.DATA)])
        assert worker.is_silent() and not _released(backend), "lent until RELEASE, and stored once"
        worker.release(request)
        worker.release(request)
        backend.room = 4096
        _, aborted = worker.place(8192, 4096)
        worker.release(aborted)
        worker.release(aborted)
        backend.room = 8192
        worker.place(12288, 4096, tag=1)
        backend.room = 12288
        answered = worker.place(16384, 4096, tag=2)
        assert worker.fill(*answered, b"2" * 4096, release=False) == 4096
        worker.fence()
        assert worker.receive().kind == Kind.FENCED
        worker.release(answered[1])
    assert _released(backend) == [0, 4096, 8192, 12288]
    assert [each[1] for each in backend.calls if each[0] == "pwrite"] == [4096, 16384]
    assert backend.disk[4096:8192] == b"1" * 4096


class Watching(Plain):
    """A backend that counts the events of a descriptor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.event = os.eventfd(0, os.EFD_CLOEXEC)
        self.heard = threading.Event()

    def started(self, device: Device) -> None:
        device.watch(self.event, self.hear)

    def hear(self) -> None:
        os.eventfd_read(self.event)
        self.heard.set()


def test_the_loop_watches_a_backends_own_descriptors(tmp_path: Path) -> None:
    backend = Watching()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        os.eventfd_write(backend.event, 1)
        assert backend.heard.wait(DEADLINE_S)
    os.close(backend.event)


def test_a_new_worker_on_a_queue_is_greeted_again(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, Plain()):
        worker.fence()
        assert worker.receive().kind == Kind.FENCED
        worker.restart_worker(0)
        hello = worker.receive()
        assert (hello.kind, hello.epoch) == (Kind.HELLO, worker.epoch)
        assert worker.write(0, b"r" * 4096) == 4096


def test_a_fence_behind_other_words_of_its_frame_raises_the_epoch_of_the_next_hello(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, Plain()):
        worker.epoch += 1
        release = Descriptor(Kind.RELEASE, device=DEVICE_NUMBER, epoch=worker.epoch)
        worker.send(0, [release, release._replace(kind=Kind.FENCE)])
        assert worker.receive().kind == Kind.FENCED
        worker.restart_worker(0)
        assert worker.receive().epoch == worker.epoch


def test_a_backend_outlives_the_daemon_but_not_its_workers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Plain()
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend, tmp_path)
        worker.accept()
        worker.hang_up()
        assert worker.write(0, b"o" * 4096) == 4096
        worker.end_workers()
        assert thread.join() == 1
    assert backend.calls[-1] == "close" and "detached" not in backend.calls
    assert "the daemon is gone; serving on" in caplog.text


def test_a_detach_finishes_the_executing_requests(tmp_path: Path) -> None:
    backend = Held()
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend, tmp_path)
        worker.accept()
        request = worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096)
        worker.send(0, [request])
        held = backend.wait_for(1)[0]
        worker.detach()
        assert worker.is_silent()
        held.complete()
        assert worker.answer_of(request).result == 4096
        assert thread.join() == 0


@pytest.mark.parametrize("keep", [False, True])
def test_only_the_end_of_a_device_that_was_deleted_is_for_good(tmp_path: Path, keep: bool) -> None:
    backend = Plain()
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend, tmp_path)
        worker.accept()
        worker.tell(wire.Detach(reason="test", keep=keep))
        assert thread.join() == 0
    assert ("detached" in backend.calls) != keep


def test_a_refusal_is_the_daemons_reason(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(Plain(), tmp_path)
        worker.receive_attach()
        worker.tell(wire.Refused(reason="no such device"))
        with pytest.raises(AttachRefused, match="no such device"):
            thread.join()


def test_a_daemon_that_hangs_up_is_said_in_one_line(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(Plain(), tmp_path)
        worker.receive_attach()
        worker.hang_up()
        with pytest.raises(BackendError, match="the daemon closed the connection"):
            thread.join()


def test_no_daemon_is_one_line_that_names_the_run_directory(tmp_path: Path) -> None:
    attach = wire.Attach(v=1, device=DEVICE, kind="x")
    with pytest.raises(BackendError, match=f"no daemon listens at {tmp_path}/attach.sock") as caught:
        DeviceConnection.open(tmp_path, DEVICE, attach)
    assert "\n" not in str(caught.value)


def test_properties_that_no_device_can_have_are_refused(tmp_path: Path) -> None:
    for properties, line in (
        (Properties(size_bytes=4096, logical_block_bytes=520), "power of two"),
        (Properties(size_bytes=500), "not one block of 512"),
        (Properties(size_bytes=4096, placement="backend"), "need a segment"),
        (Properties(size_bytes=4096, read_buffers="own"), "need a segment"),
    ):
        backend = Plain()
        backend.properties = properties
        with FakeWorker(tmp_path) as worker:
            thread = BackendThread(backend, tmp_path)
            worker.answer_question()
            with pytest.raises(BackendError, match=line):
                thread.join()


def test_properties_arrive_at_the_daemon(tmp_path: Path) -> None:
    backend = Plain()
    backend.properties = Properties(
        size_bytes=SIZE_BYTES, logical_block_bytes=4096, rotational=True, discard_max_bytes=5 << 30
    )
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        attach = worker.attach
    assert attach is not None
    assert (attach.device, attach.kind, attach.size_bytes) == (DEVICE, "plain", SIZE_BYTES)
    assert (attach.logical_block_bytes, attach.rotational, attach.discard_max_bytes) == (4096, True, 5 << 30)


def test_an_own_segment_is_sealed_and_allocated() -> None:
    segment = OwnSegment.create(5000)
    status = os.fstat(segment.descriptor)
    assert (segment.size_bytes, status.st_size, status.st_blocks * 512) == (8192, 8192, 8192)
    seals = fcntl.fcntl(segment.descriptor, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert not os.get_inheritable(segment.descriptor)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.descriptor, 4096)
    segment.close()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_cleanly(tmp_path: Path, end: signal.Signals) -> None:
    with FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, "null", {"size": "1G"})
        worker.accept()
        assert worker.write(0, b"s" * 4096) == 4096
        process.send_signal(end)
        status, log = finish(process)
    assert (status, "Traceback" in log) == (0, False)
    assert f"ending after {end.name}" in log


def test_it_waits_for_a_daemon_that_is_not_up_yet(tmp_path: Path) -> None:
    thread = BackendThread(Plain(), tmp_path)
    with FakeWorker(tmp_path) as worker:
        worker.accept()
        worker.detach()
        assert thread.join() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_SYS_RESOURCE to set the flag and to ask for it")
def test_a_backend_is_an_io_flusher(tmp_path: Path) -> None:
    code = (
        "import ctypes; from ublkpool.bufpool.sdk import process; reason = process.set_io_flusher(); "
        "print(reason, bool(ctypes.CDLL(None).prctl(58, 0, 0, 0, 0) == 1))  # PR_GET_IO_FLUSHER"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, _, is_set = run.stdout.strip().rpartition(" ")
    if "Operation not permitted" in reason:
        pytest.skip("root without CAP_SYS_RESOURCE")
    assert (reason, is_set) == ("None", "True")


def test_statistics_are_frozen_and_count() -> None:
    outbox = Outbox()
    device = Device(
        name=DEVICE,
        number=7,
        epoch=1,
        size_bytes=SIZE_BYTES,
        logical_block_bytes=512,
        queues=1,
        depth=8,
        max_io_bytes=65536,
        need_get_data=False,
        placement="pool",
        read_only=False,
        pool=memoryview(bytearray(8 * 65536)),
        own=memoryview(b""),
        own_segment=0,
        watch=lambda descriptor, callback: None,
        unwatch=lambda descriptor: None,
        wake=outbox.wake,
    )
    backend = Held()
    engine = RequestEngine(backend, device, outbox)
    request = Descriptor(Kind.REQUEST, Op.WRITE, Flag.REPLAY, 7, 0, 0, 1, 1, 0, 4096, 0, wire.SEGMENT_POOL)
    engine.take(0, request.pack())
    assert engine.statistics().running == 1
    backend.held[0].complete()
    assert [queue for queue, _ in engine.answers()] == [0]
    counted = engine.statistics()
    outbox.close()
    assert (counted.requests, counted.answered, counted.replayed, counted.running) == (1, 1, 1, 0)
    with pytest.raises(AttributeError):
        counted.requests = 5  # type: ignore[misc]
