"""The backend nbd against real nbdkit servers: operations, deaths of the server and of the backend, refusals."""

import errno
import select
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.fakes.worker import DEADLINE_S, BackendThread, FakeWorker, finish, serving, spawn
from support.sources.nbdkit import Nbdkit
from support.sources.ports import HeldPort
from ublkpool.backends.nbd import library
from ublkpool.backends.nbd import session as nbd_session
from ublkpool.backends.nbd.backend import NbdBackend
from ublkpool.backends.nbd.session import Session
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Hint
from ublkpool.bufpool.sdk.loader import load
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op

SIZE_BYTES = 1 << 20
BLOCK = 4096


@pytest.fixture(params=["zeromq", "ring"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The transport that fake workers offer to backends; a test with this fixture runs once over each."""
    monkeypatch.setattr(FakeWorker, "transport", request.param)
    return str(request.param)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The file that nbdkit serves."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE_BYTES))
    return disk


@pytest.fixture
def server(tmp_path: Path, disk: Path) -> Iterator[Nbdkit]:
    """nbdkit's file plugin on a unix socket."""
    with Nbdkit(["file", disk], socket_path=tmp_path / "nbd.sock") as server:
        yield server


def backend_for(server: Nbdkit, **options: str) -> NbdBackend:
    backend = load("nbd", {**server.options, **options})
    assert isinstance(backend, NbdBackend)
    return backend


def block(number: int) -> bytes:
    return bytes([number]) * BLOCK


def start_write(worker: FakeWorker, tag: int, offset: int, data: bytes, flags: int = 0) -> Descriptor:
    """Send a write without waiting for its answer."""
    request = worker.describe(Kind.REQUEST, Op.WRITE, offset, len(data), tag=tag, flags=flags)
    worker.pool[request.buffer : request.buffer + len(data)] = data
    worker.send(0, [request])
    return request


def statistic(backend: Backend, name: str) -> int:
    return backend.statistics()[name]


def await_sent(backend: NbdBackend, count: int) -> None:
    """Wait until so many of the backend's commands are on their way to the server, without an answer."""
    deadline_s = time.monotonic() + DEADLINE_S
    session = backend._session
    assert session is not None
    while (sent := sum(len(link.executing) for link in session._links)) != count:
        assert time.monotonic() < deadline_s, f"{sent} commands"
        time.sleep(0.01)


@contextmanager
def stopped(server: Nbdkit) -> Iterator[None]:
    """The server answers nothing, and is killed and started again at the end."""
    server.stop()
    try:
        yield
    finally:
        server.restart()


def every_operation(worker: FakeWorker, disk: Path) -> None:
    assert worker.write(BLOCK, block(1)) == BLOCK
    assert worker.write(2 * BLOCK, block(2), flags=Flag.FUA) == BLOCK
    assert worker.read(0, 3 * BLOCK) == block(0) + block(1) + block(2)
    assert worker.do(Op.FLUSH) == 0
    assert disk.read_bytes()[: 3 * BLOCK] == block(0) + block(1) + block(2)
    assert worker.do(Op.WRITE_ZEROES, BLOCK, BLOCK) == 0
    assert worker.do(Op.WRITE_ZEROES, 2 * BLOCK, BLOCK, flags=Flag.NOUNMAP | Flag.FUA) == 0
    assert worker.do(Op.DISCARD, 3 * BLOCK, BLOCK) == 0
    assert worker.read(0, 4 * BLOCK) == bytes(4 * BLOCK)


@pytest.mark.usefixtures("transport")
def test_every_operation_over_a_unix_socket(tmp_path: Path, server: Nbdkit, disk: Path) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, backend_for(server)):
        assert worker.attach is not None
        assert (worker.attach.size_bytes, worker.attach.volatile_cache) == (SIZE_BYTES, True)
        every_operation(worker, disk)


def test_every_operation_over_tcp_and_several_connections(tmp_path: Path, disk: Path) -> None:
    with Nbdkit(["file", disk]) as server:
        backend = load("nbd", {"uri": f"nbd://127.0.0.1:{server.port}/", "connections": "3"})
        with FakeWorker(tmp_path) as worker, serving(worker, backend):
            every_operation(worker, disk)


def test_every_operation_with_tls(tmp_path: Path, disk: Path) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text("alice:" + "5a" * 32 + "\n")
    with Nbdkit(["file", disk], arguments=["--tls=require", f"--tls-psk={keys}"]) as server:
        options = {"tls": "require", "tls_username": "alice", "tls_psk_file": str(keys)}
        with FakeWorker(tmp_path) as worker, serving(worker, backend_for(server, **options)):
            every_operation(worker, disk)


def test_a_request_is_cut_into_what_the_server_takes(tmp_path: Path, disk: Path) -> None:
    limits = ["blocksize-minimum=512", "blocksize-preferred=4K", "blocksize-maximum=8K"]
    policy = [*limits, "blocksize-error-policy=error"]
    server = Nbdkit(["file", disk, *policy], socket_path=tmp_path / "nbd.sock", filters=["blocksize-policy"])
    data = b"".join(block(each) for each in range(1, 6))
    with server, FakeWorker(tmp_path) as worker, serving(worker, backend_for(server)):
        assert worker.write(BLOCK, data) == len(data)
        assert worker.read(BLOCK, len(data)) == data
    assert disk.read_bytes()[BLOCK : BLOCK + len(data)] == data


def test_a_server_without_fua_is_flushed_after_a_write_with_it(tmp_path: Path, disk: Path) -> None:
    log = tmp_path / "log"
    server = Nbdkit(
        ["file", disk, f"logfile={log}"],
        socket_path=tmp_path / "nbd.sock",
        filters=["log", "fua"],
    )
    with server, FakeWorker(tmp_path) as worker, serving(worker, backend_for(server)):
        assert worker.write(0, block(1), flags=Flag.FUA) == BLOCK
        assert "Flush" in log.read_text()


def test_a_server_without_zeroes_and_trim_is_not_asked_for_them(tmp_path: Path, disk: Path) -> None:
    server = Nbdkit(["file", disk, "zeromode=none"], socket_path=tmp_path / "nbd.sock", filters=["nozero"])
    with server, FakeWorker(tmp_path) as worker, serving(worker, backend_for(server)):
        assert worker.attach is not None
        assert worker.attach.write_zeroes_max_bytes == 0


def test_a_read_only_export_is_a_read_only_disk(tmp_path: Path, disk: Path) -> None:
    server = Nbdkit(["file", disk], socket_path=tmp_path / "nbd.sock", arguments=["--readonly"])
    with server, FakeWorker(tmp_path) as worker, serving(worker, backend_for(server)):
        assert worker.attach is not None and worker.attach.read_only
        assert worker.read(0, BLOCK) == block(0)


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("connections", ["1", "3"])
def test_requests_without_an_answer_are_sent_to_the_server_that_comes_back(
    tmp_path: Path, server: Nbdkit, disk: Path, connections: str
) -> None:
    backend = backend_for(server, connections=connections)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.do(Op.FLUSH) == 0, "the session exists"
        with stopped(server):
            sent = [start_write(worker, tag, tag * BLOCK, block(tag + 1)) for tag in range(8)]
            await_sent(backend, 8)
            assert worker.is_silent()
        answers = {worker.receive().tag: tag for tag in range(8)}
        assert sorted(answers) == [each.tag for each in sent]
        assert worker.read(0, 8 * BLOCK) == b"".join(block(each + 1) for each in range(8))
        assert statistic(backend, "reconnects") == 1
        assert statistic(backend, "replayed") == 8


def test_a_server_that_dies_again_and_again_loses_nothing(tmp_path: Path, server: Nbdkit) -> None:
    content: dict[int, int] = {}
    with FakeWorker(tmp_path) as worker, serving(worker, backend_for(server, connections="2")):
        for turn in range(6):
            with stopped(server):
                for tag in range(4):
                    number = (7 * turn + 3 * tag) % 64
                    content[number] = (turn * 4 + tag) % 255 + 1
                    start_write(worker, tag, number * BLOCK, block(content[number]))
            for _ in range(4):
                assert worker.receive().result == BLOCK
        for number, value in content.items():
            assert worker.read(number * BLOCK, BLOCK) == block(value)


class StaleEvents:
    """The session's epoll, which reports an end of every connection each time it is asked."""

    def __init__(self, session: Session) -> None:
        self._session, self._epoll = session, session._epoll
        self.count = 0

    def poll(self, wait_s: float) -> list[tuple[int, int]]:
        stale = [(link.descriptor, select.EPOLLHUP) for link in self._session._links]
        self.count += len(stale)
        return [*self._epoll.poll(wait_s), *stale]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


def test_an_event_of_an_earlier_socket_stops_no_connection(tmp_path: Path, server: Nbdkit) -> None:
    backend = backend_for(server, connections="2")
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.do(Op.FLUSH) == 0, "its answer comes from the session: it exists"
        session = backend._session
        assert session is not None
        session._epoll = events = StaleEvents(session)  # type: ignore[assignment]
        for number in range(8):
            assert worker.write(number * BLOCK, block(number + 1)) == BLOCK
        server.restart()
        for number in range(8):
            assert worker.read(number * BLOCK, BLOCK) == block(number + 1)
        assert events.count > 8


def test_a_connection_that_ends_while_idle_is_made_again(tmp_path: Path, server: Nbdkit) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, backend_for(server)):
        server.restart()
        assert worker.write(0, block(1)) == BLOCK
        server.signal(signal.SIGTERM)
        server.restart()
        assert worker.read(0, BLOCK) == block(1)


def forgetful(tmp_path: Path, disk: Path) -> Nbdkit:
    """A server that loses what was not flushed when it dies: it keeps writes in a file without a name."""
    return Nbdkit(["file", disk, "cache=writeback"], socket_path=tmp_path / "nbd.sock", filters=["cache"])


def test_answered_writes_that_a_server_lost_are_written_again(tmp_path: Path, disk: Path) -> None:
    with forgetful(tmp_path, disk) as server, FakeWorker(tmp_path) as worker:
        backend = backend_for(server)
        with serving(worker, backend):
            assert worker.write(0, block(1)) == BLOCK
            assert worker.do(Op.FLUSH) == 0
            # Overlapping: the last one counts.
            assert worker.write(8 * BLOCK, block(2) + block(3)) == 2 * BLOCK
            assert worker.write(8 * BLOCK, block(4), flags=Flag.FUA) == BLOCK
            assert worker.do(Op.WRITE_ZEROES, 9 * BLOCK, BLOCK) == 0
            assert worker.write(10 * BLOCK, block(5)) == BLOCK
            assert disk.read_bytes()[10 * BLOCK : 11 * BLOCK] == block(0), "the server has it in its cache"
            server.restart()
            assert worker.read(8 * BLOCK, 3 * BLOCK) == block(4) + block(0) + block(5)
            assert worker.read(0, BLOCK) == block(1)
            assert statistic(backend, "rewritten") == 3, "neither what the FLUSH covered nor what is older"
            assert worker.do(Op.FLUSH) == 0
            assert statistic(backend, "unflushed_bytes") == 0
        assert disk.read_bytes()[10 * BLOCK : 11 * BLOCK] == block(5)


def test_without_copies_the_flush_after_a_lost_server_fails(tmp_path: Path, disk: Path) -> None:
    server = forgetful(tmp_path, disk)
    options = {"unflushed": "0"}
    with server, FakeWorker(tmp_path) as worker, serving(worker, backend_for(server, **options)):
        assert worker.write(0, block(1)) == BLOCK
        server.restart()
        assert worker.read(0, BLOCK) == block(0), "the server has lost it"
        assert worker.do(Op.FLUSH) == -errno.EIO
        assert worker.do(Op.FLUSH) == 0, "told once"
        assert worker.write(0, block(2)) == BLOCK
        assert worker.do(Op.FLUSH) == 0
        server.restart()
        assert worker.do(Op.FLUSH) == 0, "nothing was lost this time"


def test_without_copies_a_flush_that_was_on_its_way_fails_too(tmp_path: Path, disk: Path) -> None:
    server = forgetful(tmp_path, disk)
    with server, FakeWorker(tmp_path) as worker:
        backend = backend_for(server, unflushed="0")
        with serving(worker, backend):
            assert worker.write(0, block(1)) == BLOCK
            with stopped(server):
                flush = worker.describe(Kind.REQUEST, Op.FLUSH)
                worker.send(0, [flush])
                await_sent(backend, 1)
                assert worker.is_silent()
            assert worker.answer_of(flush).result == -errno.EIO


def test_the_copies_are_bounded_by_flushes_of_the_backends_own(tmp_path: Path, disk: Path) -> None:
    with forgetful(tmp_path, disk) as server, FakeWorker(tmp_path) as worker:
        backend = backend_for(server, unflushed="64K")
        with serving(worker, backend):
            for number in range(128):
                assert worker.write(number * BLOCK, block(number % 255 + 1)) == BLOCK
                assert statistic(backend, "unflushed_bytes") <= 2 * (64 << 10) + BLOCK + 256
            server.restart()
            for number in range(128):
                assert worker.read(number * BLOCK, BLOCK) == block(number % 255 + 1)


def test_writes_wait_while_the_copies_are_twice_their_bound(tmp_path: Path, disk: Path) -> None:
    gate = tmp_path / "gate"
    calls = [
        "thread_model=echo parallel",
        f"get_size=echo {SIZE_BYTES}",
        f"pread=dd if={disk} bs=1 skip=$4 count=$3 status=none",
        f"pwrite=dd of={disk} bs=4096 seek=$4 oflag=seek_bytes conv=notrunc status=none",
        f"flush=while ! [ -e {gate} ]; do sleep 0.01; done",
        "can_flush=exit 0",
        "can_write=exit 0",
    ]
    server = Nbdkit(["eval", *calls], socket_path=tmp_path / "nbd.sock")
    options = {"unflushed": "8K"}
    with server, FakeWorker(tmp_path) as worker, serving(worker, backend_for(server, **options)):
        try:
            for number in range(4):
                assert worker.write(number * BLOCK, block(1)) == BLOCK
            request = start_write(worker, 0, 4 * BLOCK, block(1))
            assert worker.is_silent(for_s=0.5)
        finally:
            gate.touch()
        assert worker.answer_of(request).result == BLOCK


def test_the_backend_flushes_before_it_ends(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_session, "END_PATIENCE_S", DEADLINE_S)
    with forgetful(tmp_path, disk) as server, FakeWorker(tmp_path) as worker:
        with serving(worker, backend_for(server)):
            assert worker.write(0, block(1)) == BLOCK
        server.kill()
    assert disk.read_bytes()[:BLOCK] == block(1)


def test_another_export_is_refused_until_the_right_one_is_back(
    tmp_path: Path, server: Nbdkit, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(2 * SIZE_BYTES))
    with FakeWorker(tmp_path) as worker, serving(worker, backend_for(server)):
        server.kill()
        server.plugin = ["file", other]
        server.start()
        request = start_write(worker, 0, 0, block(1))
        deadline_s = time.monotonic() + DEADLINE_S
        while "another export: it has 2097152 bytes" not in caplog.text:
            assert time.monotonic() < deadline_s, caplog.text
            time.sleep(0.01)
        server.kill()
        server.plugin = ["file", disk]
        server.start()
        assert worker.answer_of(request).result == BLOCK
    assert other.read_bytes() == bytes(2 * SIZE_BYTES)


def test_a_server_that_stays_away_ends_the_backend_after_the_timeout(tmp_path: Path, server: Nbdkit) -> None:
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend_for(server, timeout="0.2"), tmp_path)
        worker.accept()
        server.kill()
        request = start_write(worker, 0, 0, block(1))
        with pytest.raises(BackendError, match=r"lost for timeout=0.2 s: .*nbd\.sock|lost for timeout=0.2 s"):
            thread.join()
        assert worker.is_silent(), f"{request} stays for the successor"


def test_a_successor_of_a_killed_backend_finds_every_answered_write(tmp_path: Path, server: Nbdkit) -> None:
    with FakeWorker(tmp_path) as worker:
        for turn in range(2):
            backend = spawn(tmp_path, "nbd", server.options)
            worker.accept()
            if turn:
                assert worker.read(0, 2 * BLOCK) == block(1) + block(2)
                worker.detach()
                assert finish(backend)[0] == 0
                return
            assert worker.write(0, block(1)) == BLOCK
            assert worker.write(BLOCK, block(2)) == BLOCK
            backend.kill()
            finish(backend)
            worker.restart_worker(0)


def test_a_server_with_a_limit_lets_a_successor_in_after_its_predecessors_last_write(
    tmp_path: Path, disk: Path
) -> None:
    log = tmp_path / "log"
    server = Nbdkit(
        ["file", disk, "limit=1", f"logfile={log}", "wdelay=700ms"],
        socket_path=tmp_path / "nbd.sock",
        filters=["limit", "log", "delay"],
    )
    with server, FakeWorker(tmp_path) as worker:
        # The probe of the start may still count as a client.
        worker.may_create = False
        predecessor = spawn(tmp_path, "nbd", server.options)
        worker.accept()
        start_write(worker, 0, 0, block(1))
        await_text(log, " Write id=")
        predecessor.kill()
        finish(predecessor)
        worker.restart_worker(0)
        successor = spawn(tmp_path, "nbd", server.options)
        worker.accept()
        lines = log.read_text().splitlines()
        worker.detach()
        assert finish(successor)[0] == 0
    written = next(at for at, each in enumerate(lines) if "...Write" in each)
    connected = [at for at, each in enumerate(lines) if " Connect " in each]
    assert connected[0] < written < connected[1], lines


def await_text(log: Path, text: str) -> None:
    """Wait until a log of nbdkit contains `text`."""
    deadline_s = time.monotonic() + DEADLINE_S
    while text not in log.read_text():
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.01)


def test_an_export_smaller_than_its_device_is_refused(tmp_path: Path, server: Nbdkit) -> None:
    with pytest.raises(BackendError, match="fewer than device vol0"):
        backend_for(server).open(Hint("vol0", tmp_path, 2 * SIZE_BYTES))
    backend = backend_for(server)
    assert backend.open(Hint("vol0", tmp_path, SIZE_BYTES // 2)).size_bytes == SIZE_BYTES // 2
    # `ublkpool resize` gives the device what the export had when the backend connected.
    backend.resize(SIZE_BYTES)
    with pytest.raises(BackendError, match="grow the export, restart the backend"):
        backend.resize(2 * SIZE_BYTES)
    backend.close()


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with closing(HeldPort()) as port:
        for options in (
            {"socket": str(tmp_path / "none")},
            {"host": "127.0.0.1", "port": str(port.number)},
        ):
            with pytest.raises(BackendError, match=r"nbd: nbd.*://.*(No such file|refused)"):
                load("nbd", options).open(Hint("vol0", tmp_path))


def test_an_export_name_that_the_server_does_not_have_is_refused(tmp_path: Path, disk: Path) -> None:
    (tmp_path / "exports").mkdir()
    plugin = ["file", f"dir={tmp_path / 'exports'}"]
    server = Nbdkit(plugin, socket_path=tmp_path / "nbd.sock")
    with server, pytest.raises(BackendError, match="gone"):
        backend_for(server, export="gone").open(Hint("vol0", tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of uri=URI, socket=PATH and host=NAME"),
        ({"uri": "nbd://a", "host": "b"}, "give one of"),
        ({"uri": "nbd://a", "export": "b"}, "leave export= out"),
        ({"host": "a", "port": "0"}, "port=0"),
        ({"host": "a", "connections": "0"}, "connections=0"),
        ({"host": "a", "timeout": "nan"}, "timeout=nan"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        load("nbd", options)


def test_a_missing_library_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_NAME", "libnbd-absent.so.0")
    library.library.cache_clear()
    try:
        with pytest.raises(BackendError, match=r"ublkpool\[nbd\].*apt install libnbd0"):
            load("nbd", {"socket": "/none"}).open(Hint("vol0", tmp_path))
    finally:
        library.library.cache_clear()


def test_the_identity_names_server_and_export(tmp_path: Path, server: Nbdkit) -> None:
    backend = backend_for(server)
    identity = backend.open(Hint("vol0", tmp_path)).identity
    backend.close()
    assert identity is not None and not isinstance(identity, str)
    assert (identity.value, identity.strength) == (f"nbd:{backend.options.server}", "weak")
