"""A fake daemon with workers, without a kernel: drives a real backend over the real wire.

Owns an attach socket, a pool, and a link per queue, all on the test's thread; the backend runs in another thread or
process.  Checks like a worker that an answer repeats its request's identity and that a region lies in the backend's
segment.  Every wait has a deadline.
"""

import errno
import itertools
import mmap
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Literal, Self

import msgspec
import zmq

from support.fakes.links import FakeFrames, FakeLink, FakeRings, sealed_memory
from ublkpool.bufpool import wire
from ublkpool.bufpool.sdk.backend import Backend
from ublkpool.bufpool.sdk.serving import serve
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op

DEVICE = "testdisk"
DEVICE_NUMBER = 7
OWN_SEGMENT = 9
DEADLINE_S = 60.0
"""Seconds; only a hang takes longer, also on a machine that gives this process little time."""


class FakeWorker:
    """One device's daemon and workers; a context manager."""

    transport: ClassVar[Literal["zeromq", "ring"]] = "zeromq"
    """The transport that it offers; the fixture `transport` sets it."""

    def __init__(
        self,
        run_dir: Path,
        *,
        size_bytes: int = 0,
        queues: int = 1,
        depth: int = 8,
        max_io_bytes: int = 64 << 10,
        placement: str = "pool",
        post_bytes: tuple[int, ...] = (),
        spin_us: int = 0,
    ) -> None:
        self.run_dir = run_dir
        self.size_bytes = size_bytes
        self.queues, self.depth, self.max_io_bytes = queues, depth, max_io_bytes
        self.placement, self.post_bytes = placement, post_bytes
        self.spin_us = spin_us
        self.epoch = 1
        self.may_create: bool | None = True
        self.takes_next = False
        """None: as an older daemon, which has no identities and generations."""
        self.generation = 0
        self.described: dict[str, object] = {}
        """What else it describes."""
        self.attach: wire.Attach | None = None
        self.own: mmap.mmap | None = None
        self._sequence = itertools.count(1)
        self._inbox: list[deque[Descriptor]] = [deque() for _ in range(queues)]
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.settimeout(DEADLINE_S)
        self.connection: socket.socket | None = None
        self.pool_bytes = queues * depth * max_io_bytes
        self._pool_descriptor = sealed_memory(self.pool_bytes)
        self.pool = mmap.mmap(self._pool_descriptor, self.pool_bytes)
        self._context = zmq.Context()
        self._paths = [run_dir / f"q{number}" for number in range(queues)]
        self.links: list[FakeLink] = [self._make_link(path) for path in self._paths]

    def _make_link(self, path: Path) -> FakeLink:
        return FakeRings(path) if self.transport == "ring" else FakeFrames(self._context, path)

    def rings(self, queue: int = 0) -> FakeRings:
        """A queue's link, which must be rings."""
        link = self.links[queue]
        assert isinstance(link, FakeRings)
        return link

    def __enter__(self) -> Self:
        self._listener.bind(str(self.run_dir / "attach.sock"))
        self._listener.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self._listener.close()
        (self.run_dir / "attach.sock").unlink(missing_ok=True)
        self.end_workers()
        self._context.term()
        self.pool.close()
        os.close(self._pool_descriptor)

    def receive_attach(self) -> wire.Attach:
        """Wait for a backend and read its first message."""
        while True:
            message, descriptors = self._first_message()
            if isinstance(message, wire.Attach):
                break
            self._describe(message.device)
        self.attach = message
        for descriptor in descriptors:
            self.own = mmap.mmap(descriptor, self.attach.segment_bytes)
            os.close(descriptor)
        return self.attach

    def answer_question(self) -> None:
        """Wait for a backend that asks for the device's description, and answer."""
        message, _ = self._first_message()
        assert isinstance(message, wire.Describe)
        self._describe(message.device)

    def _first_message(self) -> tuple[wire.BackendMessage, Sequence[int]]:
        self.hang_up()
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(DEADLINE_S)
        packet, descriptors, _, _ = socket.recv_fds(self.connection, 65536, 1)
        return wire.decode_backend_message(packet), descriptors

    def _describe(self, device: str) -> None:
        described = wire.Described(
            v=wire.PROTOCOL_VERSION,
            device=device,
            size_bytes=self.size_bytes,
            max_io_bytes=self.max_io_bytes,
            need_get_data=self.placement == "backend",
            placement="backend" if self.placement == "backend" else "pool",
            read_only=False,
            may_create=self.may_create,
            takes_next=self.takes_next,
        )
        self.tell(msgspec.structs.replace(described, **self.described))
        self.hang_up()

    def accept(self) -> wire.Attach:
        """Attach a backend and exchange HELLO and WELCOME on every queue."""
        attach = self.answer_attach()
        for queue in range(self.queues):
            hello = self.receive(queue)
            assert (hello.kind, hello.queue, hello.device) == (Kind.HELLO, queue, DEVICE_NUMBER)
            self.send(queue, [Descriptor(Kind.WELCOME, device=DEVICE_NUMBER, queue=queue, epoch=self.epoch)])
        return attach

    def answer_attach(self) -> wire.Attach:
        """Attach a backend, and leave the queues to the caller."""
        attach = self.receive_attach()
        assert self.connection is not None
        self.size_bytes = self.size_bytes or attach.size_bytes
        token = b"B" + secrets.token_bytes(wire.TOKEN_BYTES - 1)
        for link, inbox in zip(self.links, self._inbox, strict=True):
            link.expect(token)
            inbox.clear()
        places = tuple(f"ipc://{path}" for path in self._paths)
        rings = tuple(str(path) for path in self._paths) if self.transport == "ring" else ()
        attached = wire.Attached(
            v=wire.PROTOCOL_VERSION,
            device=DEVICE,
            device_number=DEVICE_NUMBER,
            size_bytes=self.size_bytes,
            logical_block_bytes=attach.logical_block_bytes,
            queues=self.queues,
            depth=self.depth,
            max_io_bytes=self.max_io_bytes,
            need_get_data=self.placement == "backend",
            placement="backend" if self.placement == "backend" else "pool",
            read_only=attach.read_only,
            epoch=self.epoch,
            token=token.hex(),
            endpoints=places,
            rings=rings,
            segments=(wire.Segment(number=wire.SEGMENT_POOL, size_bytes=self.pool_bytes),),
            own_segment=OWN_SEGMENT if self.own is not None else 0,
            spin_us=self.spin_us,
            post_bytes=self.post_bytes,
            generation=self.generation,
        )
        socket.send_fds(self.connection, [wire.encode_message(attached)], [self._pool_descriptor])
        return attach

    def tell(self, message: wire.DaemonMessage) -> None:
        """Send a message on the attach connection."""
        if self.connection is not None:
            self.connection.send(wire.encode_message(message))

    def detach(self) -> None:
        """Send Detach to the backend."""
        self.tell(wire.Detach(reason="test"))

    def hang_up(self) -> None:
        """Close the attach connection, as a daemon that dies does."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self.own is not None:
            self.own.close()
            self.own = None

    def end_workers(self) -> None:
        """End all workers' links."""
        for link in self.links:
            link.end()

    def restart_worker(self, queue: int) -> None:
        """Replace a queue's worker: the old socket is removed, a new one listens at the same path."""
        self.links[queue].restart()

    def send(self, queue: int, descriptors: Iterable[Descriptor]) -> None:
        """Send one frame to the backend."""
        self.send_frame(queue, wire.pack_frame(descriptors))

    def send_frame(self, queue: int, frame: bytes) -> None:
        """Send raw bytes as one frame."""
        self.links[queue].send_frame(frame)

    def receive(self, queue: int = 0, deadline_s: float = DEADLINE_S) -> Descriptor:
        """The backend's next descriptor on a queue."""
        inbox = self._inbox[queue]
        while not inbox:
            inbox.extend(wire.iter_frame(self.links[queue].receive_frame(deadline_s)))
        return inbox.popleft()

    def is_silent(self, queue: int = 0, for_s: float = 0.15) -> bool:
        """Whether the backend sends nothing for a while."""
        return not self._inbox[queue] and self.links[queue].is_silent(for_s)

    def buffer_of(self, tag: int, queue: int = 0) -> int:
        """The pool offset of a tag's buffer."""
        return (queue * self.depth + tag) * self.max_io_bytes

    def describe(
        self,
        kind: Kind,
        op: Op,
        offset: int = 0,
        length: int = 0,
        *,
        tag: int = 0,
        queue: int = 0,
        flags: int = 0,
        lend: bool = True,
    ) -> Descriptor:
        """A descriptor of this worker's, with the tag's pool buffer if it moves data."""
        lends = lend and kind == Kind.REQUEST and op in (Op.READ, Op.WRITE)
        return Descriptor(
            kind,
            op,
            int(flags),
            DEVICE_NUMBER,
            queue,
            tag,
            self.epoch,
            next(self._sequence),
            offset,
            length,
            0,
            wire.SEGMENT_POOL if lends else wire.SEGMENT_NONE,
            self.buffer_of(tag, queue) if lends else 0,
        )

    def answer_of(self, request: Descriptor) -> Descriptor:
        """The next descriptor that posts no region, which must answer `request`."""
        answer = self.receive(request.queue)
        while answer.kind == Kind.POST:
            answer = self.receive(request.queue)
        assert identity_of(answer) == identity_of(request), (answer, request)
        return answer

    def read(self, offset: int, length: int, *, tag: int = 0, queue: int = 0) -> bytes:
        """A whole read into a pool buffer."""
        request = self.describe(Kind.REQUEST, Op.READ, offset, length, tag=tag, queue=queue)
        self.pool[request.buffer : request.buffer + length] = b"\xee" * length
        self.send(queue, [request])
        answer = self.answer_of(request)
        assert (answer.kind, answer.result) == (Kind.DONE, length), answer
        return self.pool[request.buffer : request.buffer + length]

    def read_in_place(self, offset: int, length: int) -> tuple[bytes, Descriptor]:
        """A read that the backend answers with a region; release it with `release`."""
        request = self.describe(Kind.REQUEST, Op.READ, offset, length, lend=False)
        self.send(0, [request])
        answer = self.answer_of(request)
        assert answer.flags & Flag.REGION and answer.result == length, answer
        return self.region(answer, length), request

    def region(self, answer: Descriptor, length: int) -> bytes:
        """The data in the region that an answer names."""
        assert self.own is not None and answer.segment == OWN_SEGMENT
        assert answer.buffer + length <= len(self.own)
        return self.own[answer.buffer : answer.buffer + length]

    def release(self, request: Descriptor) -> None:
        """Release the region named for `request`."""
        self.send(request.queue, [request._replace(kind=Kind.RELEASE)])

    def write(self, offset: int, data: bytes, *, tag: int = 0, queue: int = 0, flags: int = 0) -> int:
        """A whole write by the device's placement; returns its result."""
        if self.placement == "backend":
            placed, request = self.place(offset, len(data), tag=tag, queue=queue, flags=flags)
            assert placed.kind == Kind.PLACED, placed
            return self.fill(placed, request, data)
        request = self.describe(Kind.REQUEST, Op.WRITE, offset, len(data), tag=tag, queue=queue, flags=flags)
        self.pool[request.buffer : request.buffer + len(data)] = data
        self.send(queue, [request])
        return self.answer_of(request).result

    def place(
        self, offset: int, length: int, *, tag: int = 0, queue: int = 0, flags: int = 0
    ) -> tuple[Descriptor, Descriptor]:
        """Send PLACE; returns the answer and the request."""
        request = self.describe(Kind.PLACE, Op.WRITE, offset, length, tag=tag, queue=queue, flags=flags)
        self.send(queue, [request])
        return self.answer_of(request), request

    def fill(self, placed: Descriptor, request: Descriptor, data: bytes, release: bool = True) -> int:
        """Do the kernel's and the worker's part after PLACED; returns the write's result."""
        self.region(placed, len(data))
        assert self.own is not None
        self.own[placed.buffer : placed.buffer + len(data)] = data
        self.send(request.queue, [request._replace(kind=Kind.DATA, length=len(data))])
        answer = self.answer_of(request)
        assert answer.kind == Kind.DONE
        if release:
            self.release(request)
        return answer.result

    def do(self, op: Op, offset: int = 0, length: int = 0, *, flags: int = 0, queue: int = 0) -> int:
        """A request without a buffer; returns its result."""
        request = self.describe(Kind.REQUEST, op, offset, length, flags=flags, queue=queue)
        self.send(queue, [request])
        return self.answer_of(request).result

    def fence(self, queue: int = 0) -> Descriptor:
        """Raise the epoch and send FENCE; the caller awaits FENCED."""
        self.epoch += 1
        fence = Descriptor(Kind.FENCE, device=DEVICE_NUMBER, queue=queue, epoch=self.epoch)
        self.send(queue, [fence])
        return fence

    def fence_executing(self, queue: int = 0) -> Descriptor:
        """As `fence`, for a backend that executes requests: returns when it has taken FENCE, before it sends FENCED.

        The last tag must be free: a request beyond the device's end follows FENCE there and is refused at once.
        """
        fence = self.fence(queue)
        refused = self.describe(Kind.REQUEST, Op.DISCARD, 1 << 63, 4096, tag=self.depth - 1, queue=queue)
        self.send(queue, [refused])
        assert self.answer_of(refused).result == -errno.EINVAL
        return fence


def identity_of(descriptor: Descriptor) -> tuple[int, ...]:
    """The identity of a request."""
    return (
        descriptor.device,
        descriptor.queue,
        descriptor.tag,
        descriptor.epoch,
        descriptor.sequence,
    )


class BackendThread:
    """A backend that serves in a thread of the test."""

    def __init__(self, backend: Backend, run_dir: Path) -> None:
        self.status: int | None = None
        self.error: BaseException | None = None
        self._backend, self._run_dir = backend, run_dir
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.status = serve(
                self._backend, device=DEVICE, run_dir=self._run_dir, wait_s=DEADLINE_S, handle_signals=False
            )
        except BaseException as error:
            self.error = error

    def join(self) -> int | None:
        """Wait for its end; returns its exit status, or raises the error that ended it."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the backend did not end"
        if self.error is not None:
            raise self.error
        return self.status


@contextmanager
def serving(worker: FakeWorker, backend: Backend) -> Iterator[FakeWorker]:
    """`backend` attached to `worker` for the duration, detached and joined after it."""
    thread = BackendThread(backend, worker.run_dir)
    try:
        worker.accept()
        yield worker
    finally:
        with suppress(OSError):
            worker.detach()
        assert thread.join() == 0


def spawn(
    run_dir: Path,
    kind_or_file: str | Path,
    options: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> "subprocess.Popen[str]":
    """A backend in a process of its own, as the command line runs it; `prefix` is put before its command."""
    code = (
        "import sys, logging; from pathlib import Path; logging.basicConfig(level=logging.INFO)\n"
        "from ublkpool.bufpool.sdk.loader import run_backend\n"
        "kind, device, run_dir, *options = sys.argv[1:]\n"
        "given = dict(each.split('=', 1) for each in options)\n"
        f"sys.exit(run_backend(kind, given, device, Path(run_dir), wait_s={DEADLINE_S}))"
    )
    arguments: Sequence[str] = [f"{name}={value}" for name, value in (options or {}).items()]
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code, str(kind_or_file), DEVICE, str(run_dir), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait for a spawned backend; returns its status and log."""
    _, log = process.communicate(timeout=DEADLINE_S)
    return process.returncode, log
