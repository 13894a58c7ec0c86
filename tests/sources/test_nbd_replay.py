"""The backend nbd while it writes its copies again: killed, told to end, against servers that do harm."""

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.fakes.worker import DEADLINE_S, BackendThread, FakeWorker, finish, serving, spawn
from support.sources.hostile_nbd import HostileNbd, simple
from support.sources.nbdkit import Nbdkit
from ublkpool.backends.nbd import connector, session
from ublkpool.backends.nbd.backend import NbdBackend
from ublkpool.backends.nbd.connection import Connection, Lost
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.loader import load
from ublkpool.bufpool.wire import Flag, Kind, Op

SIZE_BYTES = 1 << 20
BLOCK = 4096


def block(number: int) -> bytes:
    return bytes([number]) * BLOCK


def backend_for(server: Nbdkit | HostileNbd) -> NbdBackend:
    backend = load("nbd", server.options)
    assert isinstance(backend, NbdBackend)
    return backend


def await_that_exists(path: Path) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline_s, path
        time.sleep(0.01)


class Store:
    """A server whose disk is a file, and which a test lets wait after it has executed a write."""

    def __init__(self, place: Path) -> None:
        self.disk, self._hold, self.written = place / "disk", place / "hold", place / "written"
        self.disk.write_bytes(bytes(SIZE_BYTES))
        write = f"dd of={self.disk} bs=4096 seek=$4 oflag=seek_bytes conv=notrunc status=none"
        wait = f"if [ -e {self._hold} ]; then touch {self.written}; fi; while [ -e {self._hold} ]; do sleep 0.01; done"
        calls = [
            "thread_model=echo serialize_all_requests",
            f"get_size=echo {SIZE_BYTES}",
            f"pread=dd if={self.disk} bs=4096 skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none",
            f"pwrite={write}; {wait}",
            "flush=exit 0",
            "can_flush=exit 0",
            "can_fua=echo native",
            "can_write=exit 0",
        ]
        self.server = Nbdkit(["eval", *calls], socket_path=place / "nbd.sock")

    @contextmanager
    def holding(self) -> Iterator[None]:
        """A write is executed, then not answered until the end of the context."""
        self._hold.touch()
        try:
            yield
        finally:
            self._hold.unlink()

    def forget(self) -> None:
        """What a server that was killed may do to writes that were not flushed."""
        self.disk.write_bytes(bytes(SIZE_BYTES))

    def block(self, number: int) -> bytes:
        return self.disk.read_bytes()[number * BLOCK : (number + 1) * BLOCK]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    with store.server:
        yield store


@pytest.mark.parametrize("flags", [0, Flag.FUA])
def test_a_backend_killed_while_it_writes_again_undoes_no_answered_write(
    tmp_path: Path, store: Store, flags: int
) -> None:
    """The server has lost nothing: only an old copy that is written over a newer one could harm."""
    with FakeWorker(tmp_path) as worker:
        backend = spawn(tmp_path, "nbd", store.server.options)
        worker.accept()
        assert worker.write(0, block(1)) == BLOCK
        assert worker.write(0, block(2), flags=flags) == BLOCK
        store.server.kill()
        with store.holding():
            store.server.start()
            await_that_exists(store.written)
            backend.kill()
            finish(backend)
        assert store.block(0) == block(2)


def test_a_backend_that_is_told_to_end_while_it_writes_again_writes_the_rest(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_REPLAYS_MAX", 1)
    monkeypatch.setattr(session, "END_PATIENCE_S", DEADLINE_S)
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend_for(store.server), tmp_path)
        worker.accept()
        for number in range(3):
            assert worker.write(2 * number * BLOCK, block(number + 1)) == BLOCK
        store.server.kill()
        store.forget()
        with store.holding():
            store.server.start()
            await_that_exists(store.written)
            worker.detach()
        assert thread.join() == 0
    assert [store.block(2 * number) for number in range(3)] == [block(1), block(2), block(3)]


def test_a_backend_that_is_told_to_end_without_its_server_waits_for_it(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "END_PATIENCE_S", DEADLINE_S)
    with FakeWorker(tmp_path) as worker:
        backend = backend_for(store.server)
        thread = BackendThread(backend, tmp_path)
        worker.accept()
        assert worker.write(0, block(1)) == BLOCK
        store.server.kill()
        store.forget()
        worker.detach()
        store.server.start()
        assert thread.join() == 0
    assert store.block(0) == block(1)


def test_without_its_server_a_backend_ends_in_time_and_says_what_may_be_lost(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "END_PATIENCE_S", 0.2)
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend_for(store.server), tmp_path)
        worker.accept()
        assert worker.write(0, block(1)) == BLOCK
        store.server.kill()
        worker.detach()
        assert thread.join() == 0
    assert "1 answered writes were not flushed" in caplog.text
    for each in threading.enumerate():
        if each.name == "nbd-connect":
            each.join(DEADLINE_S)
            assert not each.is_alive(), "it still connects"


@pytest.mark.parametrize("reply", [None, errno.ESHUTDOWN])
def test_a_server_that_gives_no_answer_is_connected_to_ever_more_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: int | None
) -> None:
    """Each connection succeeds, so without a pause the backend would connect and log as fast as it can."""
    chosen: list[int] = []

    class Pauses(tuple[float, ...]):
        def __getitem__(self, at: Any) -> Any:
            chosen.append(at)
            return 0.0

    def answer(_kind: int, cookie: int, _offset: int, length: int) -> bytes | None:
        if len(chosen) >= 3:
            return simple(cookie, data=bytes(length))
        return None if reply is None else simple(cookie, reply)

    monkeypatch.setattr(connector, "_PAUSES_S", Pauses((0.0,) * 5))
    server = HostileNbd(tmp_path / "nbd.sock", answer=answer)
    with server, FakeWorker(tmp_path) as worker, serving(worker, backend_for(server)):
        assert worker.read(0, BLOCK) == bytes(BLOCK)
    assert chosen[:3] == [0, 1, 2]


def test_a_backend_without_a_thread_to_connect_again_ends_and_answers_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_but(self: threading.Thread) -> None:
        if self.name == "nbd-connect":
            raise RuntimeError("can't start new thread")
        start(self)

    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend_for(store.server), tmp_path)
        worker.accept()
        monkeypatch.setattr(threading.Thread, "start", start_but)
        store.server.kill()
        worker.send(0, [worker.describe(Kind.REQUEST, Op.READ, 0, BLOCK)])
        with pytest.raises(BackendError, match="can't start new thread"):
            thread.join()
        assert worker.is_silent()


def test_a_request_that_cannot_be_sent_for_lack_of_memory_is_not_answered(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command may go on, and its buffer must not become another request's meanwhile."""

    def no_memory(*_: object) -> int:
        raise MemoryError

    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend_for(store.server), tmp_path)
        worker.accept()
        monkeypatch.setattr(session, "_send", no_memory)
        worker.send(0, [worker.describe(Kind.REQUEST, Op.READ, 0, BLOCK)])
        with pytest.raises(BackendError, match="cannot go on: MemoryError"):
            thread.join()
        assert worker.is_silent()


def test_a_server_that_talks_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = Connection.go_on
    monkeypatch.setattr(Connection, "go_on", lambda self, for_s=0.0: go_on(self, for_s) or True)
    with HostileNbd(tmp_path / "nbd.sock", talks_without_end=True) as server:
        options = backend_for(server).options
        connection = Connection(options)
        try:
            with pytest.raises(Lost, match=r"no answer within 0\.2 s"):
                connection.connect(options, 0.2)
        finally:
            connection.close()
