"""The C loop that runs a native engine over rings."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.fakes.descriptors import is_readable
from support.fakes.links import HEAD, SLEEPING, TO_BACKEND, TO_WORKER
from support.fakes.plain_backend import Plain
from support.fakes.worker import DEADLINE_S, DEVICE_NUMBER, BackendThread, FakeWorker, finish, serving, spawn
from ublkpool.backends.file import FileBackend, FileOptions
from ublkpool.backends.memory import MemoryBackend, MemoryOptions
from ublkpool.backends.null import NullBackend, NullOptions
from ublkpool.bufpool.engine import ring_driver
from ublkpool.bufpool.engine.ring_driver import DriverStatistics, RingDriver
from ublkpool.bufpool.errors import BackendError, WireError
from ublkpool.bufpool.sdk import ending, ring_links
from ublkpool.bufpool.sdk.backend import Device
from ublkpool.bufpool.wire import Descriptor, Kind, Op

DEPTH = 8
REQUESTS = 100
MORE_CALLS_MAX = 12
"""For attaching, opening rings, greeting and ending."""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWorker]:
    monkeypatch.setattr(FakeWorker, "transport", "ring")
    with FakeWorker(tmp_path, queues=2, depth=DEPTH) as worker:
        yield worker


def null() -> NullBackend:
    return NullBackend(NullOptions(size=1 << 30))


def when_asleep(worker: FakeWorker) -> None:
    """Wait until the backend has announced on every queue that it sleeps, so that the next request rings a doorbell."""
    while not all(worker.rings(queue).get(TO_BACKEND + SLEEPING) for queue in range(worker.queues)):
        os.sched_yield()


def in_memory(directory: str) -> FileBackend:
    return FileBackend(FileOptions(path=Path(directory) / "disk", size=1 << 20))


@pytest.mark.parametrize("stores", [False, True])
def test_one_request_at_a_time_is_one_wait_each(
    worker: FakeWorker, counted: list[DriverStatistics], stores: bool
) -> None:
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as directory,
        serving(worker, in_memory(directory) if stores else null()),
    ):
        for _ in range(REQUESTS):
            when_asleep(worker)
            # The worker counts as asleep, so that each answer rings a doorbell.
            worker.rings().put(TO_WORKER + SLEEPING, 1)
            assert worker.write(4096, b"1" * 4096) == 4096
    assert REQUESTS <= counted[0].calls <= REQUESTS + MORE_CALLS_MAX
    assert counted[0].turns <= REQUESTS + 2 * MORE_CALLS_MAX
    assert counted[0].bells <= REQUESTS + MORE_CALLS_MAX


def test_a_release_alone_wakes_a_backend_only_if_it_waits_for_a_region(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory backend lends no byte twice at once: another request for it, on any queue, waits for its RELEASE."""
    monkeypatch.setattr(FakeWorker, "transport", "ring")
    backend = MemoryBackend(MemoryOptions(size=1 << 20, placement="backend", keep=False))
    with FakeWorker(tmp_path, placement="backend", queues=2, depth=DEPTH) as worker, serving(worker, backend):
        when_asleep(worker)
        assert [worker.rings(queue).get(TO_BACKEND + SLEEPING) for queue in (0, 1)] == [2, 2]
        placed, first = worker.place(0, 4096)
        assert placed.kind == Kind.PLACED
        second = worker.describe(Kind.PLACE, Op.WRITE, 0, 4096, queue=1)
        worker.send(1, [second])
        while worker.rings(0).get(TO_BACKEND + SLEEPING) != 1:
            os.sched_yield()
        worker.release(first)
        assert worker.answer_of(second).kind == Kind.PLACED


def test_a_batch_is_one_turn(worker: FakeWorker, counted: list[DriverStatistics]) -> None:
    with serving(worker, null()):
        for _ in range(REQUESTS // 4):
            when_asleep(worker)
            worker.send(0, [worker.describe(Kind.REQUEST, Op.FLUSH, tag=tag) for tag in range(DEPTH)])
            for _ in range(DEPTH):
                assert worker.receive().result == 0
    assert counted[0].calls <= REQUESTS // 4 + MORE_CALLS_MAX


def send_more_than_a_ring_holds(worker: FakeWorker) -> None:
    """Send twice as many requests as the ring has room for answers, the second half once the first has been read."""
    requests = [worker.describe(Kind.REQUEST, Op.FLUSH, tag=tag) for tag in range(DEPTH)]
    for half in (requests[: DEPTH // 2], requests[DEPTH // 2 :]):
        worker.send(0, half)
        worker.rings().wait_until_read()


def test_answers_that_find_no_room_come_later_and_in_order(worker: FakeWorker) -> None:
    worker.rings().entries = DEPTH // 2
    with serving(worker, null()):
        send_more_than_a_ring_holds(worker)
        tags = [worker.receive().tag for _ in range(DEPTH)]
    assert tags == list(range(DEPTH))


def test_the_loop_ends_once_the_last_answer_has_found_room(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A starved worker may need longer than the second that the loop waits for it.
    monkeypatch.setattr(ring_links, "_SETTLE_MS", 60_000)
    worker.rings().entries = DEPTH // 2
    thread = BackendThread(null(), worker.run_dir)
    worker.accept()
    send_more_than_a_ring_holds(worker)
    worker.detach()
    assert [worker.receive().tag for _ in range(DEPTH)] == list(range(DEPTH))
    assert thread.join() == 0


def test_a_new_worker_is_greeted_with_the_last_fences_epoch_while_others_are_served(
    worker: FakeWorker,
) -> None:
    with serving(worker, null()):
        worker.fence()
        assert worker.receive().kind == Kind.FENCED
        worker.links[0].end()
        assert worker.do(Op.FLUSH, queue=1) == 0
        worker.links[0].restart()
        hello = worker.receive()
        assert (hello.kind, hello.epoch) == (Kind.HELLO, worker.epoch)
        assert worker.do(Op.FLUSH) == 0
        assert worker.do(Op.FLUSH, queue=1) == 0


def test_a_worker_that_dies_with_requests_under_way_gets_no_answer(
    worker: FakeWorker, tmp_path: Path
) -> None:
    backend = FileBackend(FileOptions(path=tmp_path / "disk", size=1 << 20))
    with serving(worker, backend):
        for _ in range(20):
            worker.send(
                0, [worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096, tag=tag) for tag in range(DEPTH)]
            )
            worker.restart_worker(0)
            assert worker.receive().kind == Kind.HELLO
            worker.fence()
            while (answer := worker.receive()).kind != Kind.FENCED:
                assert answer.epoch < worker.epoch, "an answer of the dead worker's, which a fence would drop"
        assert worker.write(0, b"n" * 4096) == 4096


def more_than_was_written(worker: FakeWorker) -> None:
    worker.rings().publish(1000)


def an_answer_for_a_request(worker: FakeWorker) -> None:
    worker.send(0, [Descriptor(Kind.PLACED, device=DEVICE_NUMBER, epoch=1)])


def more_read_than_answered(worker: FakeWorker) -> None:
    worker.rings().put(TO_WORKER + HEAD, 1000)
    worker.send(0, [worker.describe(Kind.REQUEST, Op.FLUSH, tag=tag) for tag in range(DEPTH // 2)])


@pytest.mark.parametrize(
    "nonsense", [more_than_was_written, an_answer_for_a_request, more_read_than_answered]
)
def test_a_worker_that_breaks_the_protocol_ends_the_backend(
    worker: FakeWorker, nonsense: Callable[[FakeWorker], None]
) -> None:
    worker.rings().entries = DEPTH // 2
    thread = BackendThread(null(), worker.run_dir)
    worker.accept()
    nonsense(worker)
    with pytest.raises(WireError, match=r"queue 0: the worker (stored|sent)"):
        thread.join()


def test_a_signal_interrupts_a_loop_that_does_not_sleep(worker: FakeWorker) -> None:
    """A Python signal handler runs only in Python, and the wakeup descriptor brings the loop back there."""

    class Watching:
        watched = -1
        reason = ""

        def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
            self.watched, self.callback = descriptor, callback

        def unwatch(self, descriptor: int) -> None:
            assert descriptor == self.watched

        def stop(self, reason: str) -> None:
            self.reason = reason

    loop = Watching()
    with ending.signals(loop):
        os.kill(os.getpid(), signal.SIGTERM)
        assert loop.reason == "SIGTERM"
        assert is_readable(loop.watched)
        loop.callback()
        assert not is_readable(loop.watched)


def test_a_signal_ends_the_loop_while_a_queue_has_no_worker(worker: FakeWorker) -> None:
    process = spawn(worker.run_dir, "null", {"size": "1G"})
    worker.accept()
    worker.links[0].end()
    assert worker.do(Op.FLUSH, queue=1) == 0
    process.terminate()
    status, log = finish(process)
    assert status == 0 and "ending after SIGTERM" in log


def test_without_io_uring_python_carries_the_frames_through_the_rings(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_loop(*_: object) -> None:
        raise BackendError("no ring loop: Function not implemented")

    monkeypatch.setattr(ring_links, "RingDriver", no_loop)
    with serving(worker, null()):
        assert worker.write(0, b"p" * 4096) == 4096
    assert "native ring loop unavailable (no ring loop: Function" in caplog.text


class PlayedLoop:
    """A native loop that always has calls; counts how often it was asked for more."""

    RING_LOOP_WATCHED, RING_LOOP_CALLS = 1, 2

    def __init__(self, *results: int) -> None:
        self.results = list(results)
        self.served = 0

    def ring_loop_new(self, *_: object) -> object:
        return self

    def ring_loop_run(self, *_: object) -> int:
        return self.results.pop(0)

    def serve(self) -> None:
        self.served += 1


@pytest.mark.parametrize(
    ("results", "timeout_ms", "served", "hears"),
    [([2, 2, 1], -1, 2, True), ([2, 2], 10, 1, False), ([3, 2], -1, 1, True), ([2, 0], -1, 1, False)],
)
def test_a_queue_that_is_never_idle_does_not_block_other_descriptors(
    monkeypatch: pytest.MonkeyPatch, results: list[int], timeout_ms: int, served: int, hears: bool
) -> None:
    played = PlayedLoop(*results)
    monkeypatch.setattr(ring_driver, "lib", played)
    driver = RingDriver(None, None, 1, 1, -1, played.serve)
    assert driver.run(timeout_ms, True) is hears
    assert played.served == served


class OnePage(Plain):
    """Python, one request after the other."""

    def flush(self) -> None:
        """There is no work."""


def test_a_python_backend_is_one_wait_a_request_and_one_turn_a_batch(
    worker: FakeWorker, counted: list[DriverStatistics]
) -> None:
    with serving(worker, OnePage()):
        for count in (1, DEPTH):
            for _ in range(REQUESTS // 2):
                when_asleep(worker)
                worker.send(0, [worker.describe(Kind.REQUEST, Op.FLUSH, tag=tag) for tag in range(count)])
                for _ in range(count):
                    assert worker.receive().result == 0
    assert counted[0].calls <= REQUESTS + MORE_CALLS_MAX
    assert counted[0].turns <= 2 * REQUESTS + 2 * MORE_CALLS_MAX


class Busy(Plain):
    """A backend that finds the next request whenever it has done one, and watches a descriptor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.event = os.eventfd(0, os.EFD_CLOEXEC)
        self.more = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.done = 0
        self.heard_after: list[int] = []

    def started(self, device: Device) -> None:
        device.watch(self.event, self.hear)

    def hear(self) -> None:
        os.eventfd_read(self.event)
        self.heard_after.append(self.done)

    def flush(self) -> None:
        if not self.done:
            os.eventfd_write(self.event, 1)
        self.done += 1
        self.begun.release()
        assert self.more.acquire(timeout=60)


def test_a_busy_loop_handles_watched_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "transport", "ring")
    backend, count = Busy(), 32
    with FakeWorker(tmp_path, depth=count) as worker, serving(worker, backend):
        for tag in range(count):
            worker.send(0, [worker.describe(Kind.REQUEST, Op.FLUSH, tag=tag)])
            # The backend finishes the request before only now, so that the next one always waits and it never sleeps.
            if tag:
                backend.more.release()
            assert backend.begun.acquire(timeout=DEADLINE_S), "it is taken, and by itself"
        backend.more.release()
        for _ in range(count):
            assert worker.receive().result == 0
    os.close(backend.event)
    assert backend.heard_after and backend.heard_after[0] < count


def test_a_request_that_a_fence_abandons_is_confirmed_in_the_same_turn(worker: FakeWorker) -> None:
    backend = OnePage()
    with serving(worker, backend):
        when_asleep(worker)
        old = worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096)
        worker.send(0, [old, Descriptor(Kind.FENCE, device=old.device, epoch=worker.epoch + 1)])
        assert worker.receive().kind == Kind.FENCED
    assert not [each for each in backend.calls if each[0] == "pwrite"]
