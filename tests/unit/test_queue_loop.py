"""A worker's loop with everything real but the kernel's ring: backends that come, hang up, or cut the pool short."""

import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from support.queue_rig import Plan
from ublkpool.bufpool.arena import Arena, arena_prefix, stats_offset
from ublkpool.bufpool.limits import Geometry
from ublkpool.bufpool.wire import Descriptor, Kind
from ublkpool.ublk import _native
from ublkpool.ublk.queue import WATCH_SHIFT, Attention, Queue, QueueConfig, read_statistics
from ublkpool.workers import messages, queue_loop
from ublkpool.workers.backend_link import FRAME_BYTES_MAX
from ublkpool.workers.queue_loop import QueueLoop, WorkerSpec, buffer_classes

DEVICE = 7
TOKEN = b"T" * 16
WAIT_S = 20
HELLO = Descriptor(Kind.HELLO, device=DEVICE, epoch=1).pack()


class Over(Exception):
    """The test is over."""


class NoRing:
    """Polls what is watched, as the ring does, and has no commands."""

    over = False

    def __init__(self, queue: Queue, _char_fd: int) -> None:
        self._queue = queue
        self._watched: dict[int, int] = {}

    def watch(self, index: int, fd: int) -> None:
        self._watched[index] = fd

    def run(self, timeout_ms: int) -> int:
        if NoRing.over:
            raise Over
        poller = select.poll()
        for fd in self._watched.values():
            poller.register(fd, select.POLLIN)
        asks = self._queue.attention() & (Attention.CUT | Attention.LINK)
        ready = {fd for fd, _ in poller.poll(0 if asks else timeout_ms)}
        return sum(1 << WATCH_SHIFT + index for index, fd in self._watched.items() if fd in ready)


class Bench:
    """A loop in a thread, the supervisor's end of its socket, and backends."""

    def __init__(self, directory: Path, arena: Arena) -> None:
        self.arena = arena
        self.supervisor, worker = messages.pair()
        self.supervisor.setblocking(True)
        self.supervisor.settimeout(WAIT_S)
        self._path = directory / "q0"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._descriptors = _native.ffi.new("struct uq_iod[]", 4)
        self._loop = QueueLoop(self._spec(directory), -1, self._descriptors, arena, worker)
        self._worker = worker
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _spec(self, directory: Path) -> WorkerSpec:
        config = QueueConfig(
            device_number=DEVICE,
            queue=0,
            depth=4,
            epoch=1,
            max_io_bytes=Plan().max_io_bytes,
            block_bytes=512,
            need_get_data=True,
            place_in_backend=False,
            timeout_ms=0,
            fail_on_timeout=False,
            classes=buffer_classes(self.arena),
        )
        return WorkerSpec(
            name="bench",
            queue=config,
            queue_socket=self._path,
            pool_endpoint=f"ipc://{directory}/pool",
            socket_mode=0o600,
            socket_group=None,
            cpu=None,
        )

    def _run(self) -> None:
        with pytest.raises(Over):
            self._loop.run()

    def news(self) -> messages.FromWorker:
        """The worker's next message."""
        said = messages.receive_in_supervisor(self.supervisor)
        assert said is not None
        return said

    def expect(self, user: int | None = None) -> None:
        """Tell the worker of a backend, and hear that it may come."""
        uid = os.getuid() if user is None else user
        messages.send(self.supervisor, messages.Expect(TOKEN.hex(), 0, 0, False, uid))
        assert self.news() == messages.Expecting()

    def connect(self) -> "zmq.Socket[bytes]":
        """A backend that says HELLO."""
        backend = self._context.socket(zmq.DEALER)
        backend.setsockopt(zmq.ROUTING_ID, TOKEN)
        backend.setsockopt(zmq.LINGER, 0)
        backend.connect(f"ipc://{self._path}")
        backend.send(HELLO)
        self._sockets.append(backend)
        return backend

    def serve(self) -> "zmq.Socket[bytes]":
        """A backend that serves."""
        self.expect()
        backend = self.connect()
        assert self.news() == messages.Linked()
        assert backend.poll(1000 * WAIT_S) and backend.recv()[0] == Kind.WELCOME
        return backend

    def lose(self) -> None:
        """The backend is dead."""
        messages.send(self.supervisor, messages.Lost())
        assert self.news() == messages.LetGo()

    def count(self, name: str) -> int:
        block = os.pread(self.arena.control_fd, 4096, stats_offset(0))
        return read_statistics(block).counters[name]

    def close(self) -> None:
        NoRing.over = True
        # A word wakes it.
        messages.send(self.supervisor, messages.GiveUp())
        self._thread.join(WAIT_S)
        NoRing.over = False
        for each in self._sockets:
            each.close()
        self._context.term()
        theirs = self._loop._backend.socket.context
        self._loop._backend.close()
        self._loop._pool.close()
        theirs.term()
        self.supervisor.close()
        self._worker.close()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(queue_loop, "Ring", NoRing)
    monkeypatch.setattr("ublkpool.ublk.queue.lock_memory", lambda: None)
    geometry = Geometry.build([(4096, 4), (Plan().max_io_bytes, 4)])
    prefix = arena_prefix(f"test-loop-{os.getpid()}", DEVICE)
    with Arena.create(prefix, geometry, queues=1, device_number=DEVICE, reserve=(1, 1)) as arena:
        made = Bench(tmp_path, arena)
        try:
            yield made
        finally:
            made.close()
            arena.unlink()


def test_a_hang_up_is_told_and_the_next_backend_is_served(bench: Bench) -> None:
    bench.serve().send(b"x" * (FRAME_BYTES_MAX + 1))
    assert bench.news() == messages.HungUp()
    bench.lose()
    bench.serve()
    assert bench.count("hangups") == 1 and bench.count("violations") == 0


def test_nonsense_is_told_as_such(bench: Bench) -> None:
    bench.serve().send(b"nonsense")
    said = bench.news()
    assert isinstance(said, messages.Cut) and "whole descriptors" in said.reason


def test_a_pool_cut_short_is_noticed_while_nothing_happens_and_mended_when_its_backend_is_dead(
    bench: Bench,
) -> None:
    bench.serve()
    os.ftruncate(bench.arena.data_fd, 0)
    said = bench.news()
    assert isinstance(said, messages.Cut) and "another size" in said.reason
    assert not bench.arena.is_whole()
    bench.lose()
    assert bench.arena.is_whole()
    bench.serve()


def test_another_user_does_not_get_in(bench: Bench) -> None:
    bench.expect(os.getuid() + 1)
    backend = bench.connect()
    monitor = backend.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    assert monitor.poll(1000 * WAIT_S) or bench.count("strangers")
    backend.disable_monitor()
    monitor.close()
    bench.lose()
    bench.serve()
