"""A worker's loop in a thread; the test plays the supervisor and the backends."""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from support.fakes.queue_rig import Plan
from support.fakes.ring_peer import RingPeer
from support.fakes.worker_spec import queue_config, worker_spec
from ublkpool.bufpool.pool.arena import Arena, arena_prefix
from ublkpool.bufpool.pool.control import stats_offset
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.wire import Descriptor, Kind
from ublkpool.ublk import _native
from ublkpool.ublk.queue import WATCH_SHIFT, Attention, Queue
from ublkpool.ublk.statistics import read_statistics
from ublkpool.workers import messages
from ublkpool.workers.queue_loop import QueueLoop, WorkerSpec, buffer_classes

DEVICE = 7
TOKEN = b"T" * 16
WAIT_S = 60
HELLO = Descriptor(Kind.HELLO, device=DEVICE, epoch=1).pack()
REPORTED = (
    Attention.CUT | Attention.LINK | Attention.SILENT | Attention.ABSENT | Attention.QUIET | Attention.FLUSHED
)


def eventually(check: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds."""
    deadline_s = time.monotonic() + WAIT_S
    while not check():
        assert time.monotonic() < deadline_s, f"not in time: {what}"
        time.sleep(0.001)


class NoRing:
    """A ring without commands: polls the watched descriptors."""

    def __init__(self, queue: Queue, _char_fd: int, spin_us: int = 0, engine_requests: int = 0) -> None:
        self._queue = queue
        self._watched: dict[int, int] = {}

    def watch(self, index: int, fd: int) -> None:
        self._watched[index] = fd
        if fd < 0:
            del self._watched[index]

    def use_port(self, port: object, bell_in: int = -1, bell_out: int = -1) -> None:
        """Not used without io_uring."""

    def close(self) -> None:
        """Nothing to close."""

    def run(self, timeout_ms: int) -> int:
        poller = select.poll()
        for fd in self._watched.values():
            poller.register(fd, select.POLLIN)
        asks = self._queue.attention() & REPORTED
        ready = {fd for fd, _ in poller.poll(0 if asks else timeout_ms)}
        return sum(1 << WATCH_SHIFT + index for index, fd in self._watched.items() if fd in ready)


class LoopRig:
    """A `QueueLoop` in a thread, the supervisor's end of its socket, and backends."""

    def __init__(self, directory: Path, arena: Arena, cpu: int | None = None) -> None:
        self.arena = arena
        self._cpu = cpu
        self.supervisor, worker = messages.pair()
        self.supervisor.setblocking(True)
        self.supervisor.settimeout(WAIT_S)
        self._path = directory / "q0"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._descriptors = _native.ffi.new("struct uq_iod[]", 4)
        self._worker = worker
        # The loop is made in its thread, because an io_uring belongs to the thread that made it.
        self._thread = threading.Thread(target=self._run, args=(directory,))
        self._thread.start()

    def _spec(self, directory: Path) -> WorkerSpec:
        return worker_spec(
            queue_config(buffer_classes(self.arena)),
            self._path,
            ring_socket=self._path.with_suffix(".ring"),
            pool_endpoint=f"ipc://{directory}/pool",
            cpu=self._cpu,
        )

    def _run(self, directory: Path) -> None:
        loop = QueueLoop(self._spec(directory), -1, self._descriptors, self.arena, self._worker)
        loop.run()
        loop.close()

    def news(self) -> messages.FromWorker:
        """The worker's next message."""
        packet = self.supervisor.recv(messages.MESSAGE_BYTES_MAX)
        return messages.decode_from_worker(packet)

    def expect(self, user: int | None = None) -> None:
        """Tell the worker to expect a backend, and wait for its confirmation."""
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

    def ask(self, token: bytes = TOKEN) -> RingPeer:
        """A backend that asks for rings."""
        return RingPeer(self._path.with_suffix(".ring"), token)

    def serve_on_rings(self) -> RingPeer:
        """A backend that serves over rings."""
        self.expect()
        peer = self.ask()
        peer.open()
        peer.send(HELLO)
        assert self.news() == messages.Linked()
        assert peer.receive()[0] == Kind.WELCOME
        return peer

    def lose(self) -> None:
        """Tell the worker that the backend is dead, and wait for its confirmation."""
        messages.send(self.supervisor, messages.Lost())
        assert self.news() == messages.LetGo()
        # Not before, or the worker reports a hang-up.  Left open, ZeroMQ would connect again when the next backend
        # takes over the token, and take it back.
        self._end_backends()

    def count(self, name: str) -> int:
        block = os.pread(self.arena.control_fd, 4096, stats_offset(0))
        return read_statistics(block).counters[name]

    def close(self) -> None:
        # A loop without fetched tags ends when the supervisor's socket closes.
        self.supervisor.close()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._end_backends()
        self._context.term()
        self._worker.close()

    def _end_backends(self) -> None:
        while self._sockets:
            self._sockets.pop().close()


@contextmanager
def loop_rig_in(directory: Path, cpu: int | None = None) -> Iterator[LoopRig]:
    """A rig with a pool of its own, its worker on this CPU."""
    geometry = Geometry.build([(4096, 4), (Plan().max_io_bytes, 4)])
    prefix = arena_prefix(f"test-loop-{os.getpid()}", DEVICE)
    with Arena.create(prefix, geometry, queues=1, device_number=DEVICE, reserve=(1, 1)) as arena:
        made = LoopRig(directory, arena, cpu)
        try:
            yield made
        finally:
            made.close()
            arena.unlink()
