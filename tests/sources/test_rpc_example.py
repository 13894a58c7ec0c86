"""The RPC example: the data of a write lies inside the message that ZeroMQ sends, and no slot is used too early."""

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cffi
import pytest
import zmq

from support.fakes.worker import DEADLINE_S, OWN_SEGMENT, BackendThread, FakeWorker, finish, spawn
from support.stopping import stop
from ublkpool.bufpool.sdk.backend import Backend
from ublkpool.bufpool.wire import Flag, Kind, Op

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE_BYTES = 1 << 20
_ffi = cffi.FFI()


def _address(memory: Any) -> int:
    return int(_ffi.cast("uintptr_t", _ffi.from_buffer(memory)))


class Server:
    """The example's server as a process, and its store."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"ipc://{directory}/rpc"
        self.store = directory / "store"
        self.start()

    def start(self) -> None:
        server = str(EXAMPLES / "rpc_server.py")
        command = [sys.executable, server, self.endpoint, str(self.store), str(SIZE_BYTES)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("serving")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def content(self, offset: int, length: int) -> bytes:
        return self.store.read_bytes()[4096 + offset : 4096 + offset + length]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.kill()


@pytest.fixture
def example() -> Any:
    """The example's module."""
    spec = importlib.util.spec_from_file_location("rpc_store", EXAMPLES / "rpc_store.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Sent:
    """What the example gave to ZeroMQ: the address and size of each message; and its own hold on each message."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, int]] = []
        self.has_let_go = threading.Event()
        self.has_let_go.set()

    def frame(self) -> type[zmq.Frame]:
        """A `zmq.Frame` that records the memory that ZeroMQ reads, as `zmq_msg_data` says."""
        messages, has_let_go = self.messages, self.has_let_go

        class Tracker:
            @property
            def done(self) -> bool:
                return has_let_go.is_set()

            def wait(self) -> None:
                assert has_let_go.wait(DEADLINE_S)

        class Recorded(zmq.Frame):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                if not arguments:  # one that ZeroMQ will fill
                    return
                messages.append((_address(self.buffer), len(self.buffer)))
                self.tracker = Tracker() if not has_let_go.is_set() else self.tracker

        return Recorded


@pytest.fixture
def sent(example: Any, monkeypatch: pytest.MonkeyPatch) -> Sent:
    made = Sent()
    monkeypatch.setattr(example.zmq, "Frame", made.frame())
    return made


def _backend(example: Any, server: Server, segment: int = 1 << 20) -> Backend:
    made: Backend = example.RpcStore(example.RpcOptions(endpoint=server.endpoint, segment=segment))
    return made


@pytest.mark.parametrize("transport", ["zeromq", "ring"])
def test_what_the_kernel_wrote_is_what_zeromq_sends_at_the_same_address(
    tmp_path: Path, example: Any, server: Server, sent: Sent, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeWorker, "transport", transport)
    backend = _backend(example, server)
    with FakeWorker(tmp_path, placement="backend") as worker:
        thread = BackendThread(backend, tmp_path)
        worker.accept()
        for length in (512, 4096, 65536):
            data = bytes([length >> 9]) * length
            placed, request = worker.place(8192, length)
            assert (placed.kind, placed.segment) == (Kind.PLACED, OWN_SEGMENT)
            assert worker.fill(placed, request, data) == length
            written_at = _address(backend.device.own) + placed.buffer  # type: ignore[attr-defined]
            # The header lies right before the data, so the message is one piece.
            assert sent.messages.pop() == (written_at - example.HEAD.size, example.HEAD.size + length)
            assert server.content(8192, length) == data
            assert worker.read(8192, length) == data
        assert backend.statistics()["sent_in_place"] == 3
        worker.detach()
        assert thread.join() == 0


def test_every_operation_as_a_process(tmp_path: Path, server: Server) -> None:
    with FakeWorker(tmp_path, placement="backend", queues=2) as worker:
        process = spawn(tmp_path, EXAMPLES / "rpc_store.py", {"endpoint": server.endpoint})
        attach = worker.accept()
        assert (attach.size_bytes, attach.volatile_cache) == (SIZE_BYTES, False)
        assert worker.write(0, b"r" * 12288, flags=Flag.FUA) == 12288
        assert worker.write(16384, b"s" * 4096, queue=1) == 4096
        assert worker.do(Op.WRITE_ZEROES, 4096, 4096) == 0
        assert worker.do(Op.DISCARD, 16384, 4096) == 0
        assert worker.read(0, 12288, queue=1) == b"r" * 4096 + bytes(4096) + b"r" * 4096
        worker.detach()
        assert finish(process)[0] == 0


def test_a_slot_is_used_again_when_both_have_let_go(
    tmp_path: Path, example: Any, server: Server, sent: Sent
) -> None:
    one_slot = 4096 + 65536
    with FakeWorker(tmp_path, placement="backend") as worker:
        thread = BackendThread(_backend(example, server, one_slot), tmp_path)
        worker.accept()
        # ZeroMQ has let go, the worker has not.
        placed, request = worker.place(0, 4096)
        assert worker.fill(placed, request, b"1" * 4096, release=False) == 4096
        second = worker.describe(Kind.PLACE, Op.WRITE, 4096, 4096, tag=1)
        sent.has_let_go.clear()
        worker.send(0, [second])
        assert worker.is_silent()
        worker.release(request)
        placed = worker.answer_of(second)
        # The worker has let go, ZeroMQ has not.
        assert worker.fill(placed, second, b"2" * 4096) == 4096
        third = worker.describe(Kind.PLACE, Op.WRITE, 8192, 4096, tag=2)
        worker.send(0, [third])
        assert worker.is_silent()
        sent.has_let_go.set()
        assert worker.answer_of(third).buffer == placed.buffer
        worker.detach()
        assert thread.join() == 0
    assert server.content(0, 8192) == b"1" * 4096 + b"2" * 4096


def test_a_write_outlives_the_server_and_is_sent_again(tmp_path: Path, example: Any, server: Server) -> None:
    backend = _backend(example, server)
    with FakeWorker(tmp_path, placement="backend") as worker:
        thread = BackendThread(backend, tmp_path)
        worker.accept()
        assert worker.write(0, b"a" * 4096) == 4096
        stop(server.process.pid)
        placed, request = worker.place(4096, 4096)
        assert worker.own is not None
        worker.own[placed.buffer : placed.buffer + 4096] = b"b" * 4096
        worker.send(0, [request._replace(kind=Kind.DATA)])
        assert worker.is_silent()
        server.kill()
        server.start()
        assert worker.answer_of(request).result == 4096
        worker.release(request)
        assert worker.read(0, 8192) == b"a" * 4096 + b"b" * 4096
        # A third one: the kernel closes a killed server's connection first, and its listener may still take another.
        assert backend.statistics()["connections"] >= 2
        worker.detach()
        assert thread.join() == 0


def test_a_predecessors_late_write_changes_nothing(tmp_path: Path, example: Any, server: Server) -> None:
    with (
        FakeWorker(tmp_path, placement="backend") as worker,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as dead,
        dead.get_monitor_socket(zmq.EVENT_DISCONNECTED) as ends,
    ):
        worker.generation = 8
        dead.linger = 0
        dead.setsockopt(zmq.ROUTING_ID, example.SENDER.pack(b"\1", 7, 99))
        dead.connect(server.endpoint)
        late = example.HEAD.pack(Op.WRITE, 0, 1, 0, 4096) + b"x" * 4096
        dead.send(late)
        assert dead.poll(int(1000 * DEADLINE_S)) and dead.recv()
        thread = BackendThread(_backend(example, server), tmp_path)
        assert worker.accept().generation_seen == 7
        assert worker.write(0, b"n" * 4096) == 4096
        for _ in range(2):
            dead.send(late)
            # The server hears this connection, in order, and answers what needs no generation.
            dead.send(example.HEAD.pack(example.ASK_ABOUT, 0, 0, 0, 0))
            assert dead.poll(int(1000 * DEADLINE_S))
            assert example.ABOUT.unpack(dead.recv()[example.REPLY.size :])[1] == 8
            assert worker.read(0, 4096) == b"n" * 4096
            server.kill()
            # What ZeroMQ sends before it knows of the end is lost.
            assert ends.poll(int(1000 * DEADLINE_S)) and ends.recv_multipart()
            server.start()
        worker.detach()
        assert thread.join() == 0
        dead.disable_monitor()


def test_without_a_server_it_says_so(tmp_path: Path, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "_ANSWER_TIMEOUT_MS", 10)
    backend = example.RpcStore(example.RpcOptions(endpoint=f"ipc://{tmp_path}/none"))
    with FakeWorker(tmp_path, placement="backend") as worker:
        thread = BackendThread(backend, tmp_path)
        worker.answer_question()
        with pytest.raises(Exception, match="is the server running"):
            thread.join()
    backend.context.term()


def test_a_device_that_places_in_the_pool_is_refused(tmp_path: Path, example: Any, server: Server) -> None:
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(_backend(example, server), tmp_path)
        worker.answer_question()
        with pytest.raises(Exception, match="--placement backend"):
            thread.join()
