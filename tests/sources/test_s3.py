"""The backend s3 against a real S3 server: operations, late PUTs, an absent server, the cache, refusals."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import obstore
import pytest

from support.fakes.worker import DEADLINE_S, BackendThread, FakeWorker, finish, serving, spawn
from support.sources.s3 import BUCKET, CREDENTIALS, S3Server
from ublkpool.backends.s3.backend import S3Backend
from ublkpool.backends.s3.chunks import name_of
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.loader import load
from ublkpool.bufpool.wire import Descriptor, Kind, Op

BLOCK, CHUNK = 4096, 16384
SIZE_BYTES = 16 * CHUNK


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name.upper(), value)
    with S3Server() as server:
        yield server


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    """A worker whose attaches have rising generations, as the daemon's have."""
    with FakeWorker(tmp_path) as worker:
        worker.generation = 1
        yield worker


def options_for(server: S3Server, tmp_path: Path, **more: str) -> dict[str, str]:
    """Each test has a prefix of its own: moto keeps objects as long as the process lives."""
    chosen = {"size": str(SIZE_BYTES), "chunk_bytes": str(CHUNK)}
    return {"bucket": BUCKET, "prefix": tmp_path.name, "endpoint": server.endpoint, **chosen, **more}


def backend_for(server: S3Server, tmp_path: Path, **more: str) -> S3Backend:
    backend = load("s3", options_for(server, tmp_path, **more))
    assert isinstance(backend, S3Backend)
    return backend


def next_attach(worker: FakeWorker) -> None:
    """What a daemon does for a successor."""
    worker.restart_worker(0)
    worker.may_create = False
    worker.generation += 1


def block(number: int) -> bytes:
    return bytes([number]) * BLOCK


def start_write(worker: FakeWorker, tag: int, offset: int, data: bytes) -> Descriptor:
    request = worker.describe(Kind.REQUEST, Op.WRITE, offset, len(data), tag=tag)
    worker.pool[request.buffer : request.buffer + len(data)] = data
    worker.send(0, [request])
    return request


def await_that(check: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def chunk_puts(server: S3Server) -> int:
    return sum(method == "PUT" and "/chunks/" in path for method, path in server.requests)


def is_chunk_put(method: str, path: str) -> bool:
    return method == "PUT" and "/chunks/" in path


def test_what_is_written_is_read_by_a_successor(tmp_path: Path, server: S3Server, worker: FakeWorker) -> None:
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.attach is not None
        assert (worker.attach.size_bytes, worker.attach.volatile_cache) == (SIZE_BYTES, False)
        assert worker.read(0, 4 * CHUNK) == bytes(4 * CHUNK), "absent chunks are zeros"
        assert worker.write(CHUNK - BLOCK, block(1) + block(2)) == 2 * BLOCK
        assert worker.write(2 * CHUNK, bytes([3]) * CHUNK) == CHUNK
        assert worker.write(3 * CHUNK + 512, bytes([4]) * 512) == 512
        assert worker.do(Op.FLUSH) == 0
    next_attach(worker)
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.read(CHUNK - BLOCK, 2 * BLOCK) == block(1) + block(2)
        assert worker.read(2 * CHUNK, CHUNK) == bytes([3]) * CHUNK
        assert worker.read(3 * CHUNK, BLOCK) == bytes(512) + bytes([4]) * 512 + bytes(3072)


def test_a_disk_grows_and_a_successor_has_its_new_size_whatever_its_option_says(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    worker.described = {"knows_resize": True}
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.write(SIZE_BYTES - BLOCK, block(1)) == BLOCK
        worker.tell(wire.Resize(size_bytes=2 * SIZE_BYTES))
        assert worker.connection is not None
        answer = wire.decode_session_message(worker.connection.recv(wire.ATTACH_MESSAGE_BYTES_MAX))
        assert answer == wire.Resized(size_bytes=2 * SIZE_BYTES)
        assert worker.write(SIZE_BYTES, block(2)) == BLOCK
        assert worker.read(SIZE_BYTES - BLOCK, 3 * BLOCK) == block(1) + block(2) + bytes(BLOCK)
    next_attach(worker)
    worker.size_bytes, worker.described["resized_bytes"] = 2 * SIZE_BYTES, 2 * SIZE_BYTES
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.attach is not None and worker.attach.size_bytes == 2 * SIZE_BYTES
        assert worker.read(SIZE_BYTES, BLOCK) == block(2)


def test_zeroed_and_trimmed_chunks_are_zeros_and_stay_so(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.write(0, bytes([7]) * 3 * CHUNK) == 3 * CHUNK
        assert worker.do(Op.WRITE_ZEROES, BLOCK, CHUNK) == 0
        assert worker.do(Op.DISCARD, 2 * CHUNK, CHUNK) == 0
        assert worker.do(Op.DISCARD, BLOCK, BLOCK) == 0
        assert worker.do(Op.DISCARD, 5 * CHUNK, CHUNK) == 0
        expected = block(7) + bytes(CHUNK) + bytes([7]) * (CHUNK - BLOCK) + bytes(CHUNK)
        assert worker.read(0, 3 * CHUNK) == expected
    next_attach(worker)
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.read(0, 3 * CHUNK) == expected
        assert worker.write(2 * CHUNK, block(8)) == BLOCK
        assert worker.read(2 * CHUNK, CHUNK) == block(8) + bytes(CHUNK - BLOCK)
    names = [each["path"] for page in obstore.list(server.store(), tmp_path.name) for each in page]
    assert f"{tmp_path.name}/{name_of(5)}" not in names, "a trim makes no object"


def test_requests_for_one_chunk_at_once_lose_nothing(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    with serving(worker, backend_for(server, tmp_path)):
        for turn in range(4):
            sent = [start_write(worker, tag, tag * 512, bytes([16 * turn + tag]) * 512) for tag in range(8)]
            assert {worker.receive().result for _ in sent} == {512}
            expected = b"".join(bytes([16 * turn + tag]) * 512 for tag in range(8))
            assert worker.read(0, BLOCK) == expected


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("moment", range(5))
def test_a_put_that_a_dead_process_sent_cannot_land_after_a_newer_one(
    tmp_path: Path, server: S3Server, worker: FakeWorker, moment: int, is_new: bool
) -> None:
    """The server has received the PUT, the process is killed, and the store executes the PUT later."""
    old = bytes(CHUNK) if is_new else block(1) + bytes(CHUNK - BLOCK)
    predecessor = spawn(tmp_path, "s3", options_for(server, tmp_path))
    worker.accept()
    if not is_new:
        assert worker.write(0, block(1)) == BLOCK
    server.hold(is_chunk_put)
    start_write(worker, 0, BLOCK, block(2))
    (late,) = server.held(1)
    predecessor.kill()
    finish(predecessor)
    server.hold(None)
    next_attach(worker)
    with serving(worker, backend_for(server, tmp_path)):
        if moment == 0:
            late.release()
        assert worker.read(0, CHUNK) in (old, old[:BLOCK] + block(2) + old[2 * BLOCK :])
        if moment == 1:
            late.release()
        assert worker.write(2 * BLOCK, block(9)) == BLOCK
        assert worker.read(2 * BLOCK, BLOCK) == block(9), "the write is added to what the late PUT has left"
        assert worker.write(BLOCK, block(2)) == BLOCK, "the daemon sends it again"
        if moment == 2:
            late.release()
        assert worker.write(BLOCK, block(3)) == BLOCK
        # The content is what it was before the late PUT, so a hash of it alone would match again.
        assert worker.write(BLOCK, old[BLOCK : 3 * BLOCK]) == 2 * BLOCK
        if moment == 3:
            late.release()
        assert worker.do(Op.WRITE_ZEROES, 0, CHUNK) == 0
        assert worker.write(0, block(5)) == BLOCK
        if moment == 4:
            late.release()
        assert worker.read(0, CHUNK) == block(5) + bytes(CHUNK - BLOCK)
    assert late.status.startswith("200" if moment < 2 else "412"), late.status
    next_attach(worker)
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.read(0, CHUNK) == block(5) + bytes(CHUNK - BLOCK)


def test_a_late_put_does_not_undo_zeros_that_were_written_where_no_object_was(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    predecessor = spawn(tmp_path, "s3", options_for(server, tmp_path))
    worker.accept()
    server.hold(is_chunk_put)
    start_write(worker, 0, 0, block(2))
    (late,) = server.held(1)
    predecessor.kill()
    finish(predecessor)
    server.hold(None)
    next_attach(worker)
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.do(Op.WRITE_ZEROES, 0, CHUNK) == 0
        assert late.release().startswith("412")
    next_attach(worker)
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.read(0, CHUNK) == bytes(CHUNK)


def test_a_process_that_was_replaced_ends_when_it_writes(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    (other := tmp_path / "other").mkdir()
    old = BackendThread(backend_for(server, tmp_path), tmp_path)
    worker.accept()
    assert worker.write(0, block(1)) == BLOCK
    with FakeWorker(other) as second:
        second.generation = 5
        with serving(second, backend_for(server, tmp_path)):
            assert second.write(0, block(2)) == BLOCK
            request = start_write(worker, 0, 0, block(3))
            with pytest.raises(BackendError, match="generation 5 has written chunk 0"):
                old.join()
            assert second.read(0, BLOCK) == block(2)
    assert request is not None


def test_with_claim_all_a_replaced_process_cannot_change_what_was_read(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    (other := tmp_path / "other").mkdir()
    old = BackendThread(backend_for(server, tmp_path), tmp_path)
    worker.accept()
    assert worker.write(0, block(1)) == BLOCK
    with FakeWorker(other) as second:
        second.generation = 5
        with serving(second, backend_for(server, tmp_path, claim="all")):
            assert second.read(0, BLOCK) == block(1)
            start_write(worker, 0, 0, block(3))
            with pytest.raises(BackendError, match="generation 5 has written chunk 0"):
                old.join()
            assert second.read(0, BLOCK) == block(1)


def test_an_attach_with_a_generation_that_was_passed_is_refused(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    worker.generation = 9
    with serving(worker, backend_for(server, tmp_path)):
        pass
    next_attach(worker)
    worker.generation = 9
    thread = BackendThread(backend_for(server, tmp_path), tmp_path)
    attach = worker.answer_attach()
    assert attach.generation_seen == 9
    with pytest.raises(BackendError, match="generation 9 has been attached, this one is 9"):
        thread.join()


@pytest.mark.parametrize("failure", ["dead", "503 Slow Down", "500 Internal Server Error"])
def test_requests_wait_for_a_server_that_is_away(
    tmp_path: Path, server: S3Server, worker: FakeWorker, failure: str
) -> None:
    backend = backend_for(server, tmp_path)
    with serving(worker, backend):
        assert worker.write(0, block(1)) == BLOCK
        if failure == "dead":
            server.kill()
        else:
            server.answer_instead = lambda _method, _path: failure
        sent = [start_write(worker, tag, tag * CHUNK, block(tag + 2)) for tag in range(4)]
        await_that(lambda: backend.statistics()["retries"] >= 4, "tried again")
        assert worker.is_silent()
        server.answer_instead = lambda _method, _path: None
        if failure == "dead":
            server.start()
        assert {worker.receive().result for _ in sent} == {BLOCK}
        for tag in range(4):
            assert worker.read(tag * CHUNK, BLOCK) == block(tag + 2)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_start_survives_a_store_that_is_away_for_a_moment(
    tmp_path: Path, server: S3Server, worker: FakeWorker, method: str
) -> None:
    failures = iter(["503 Slow Down"] * 3)
    server.answer_instead = lambda this, _path: next(failures, None) if this == method else None
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.write(0, block(1)) == BLOCK
    assert next(failures, None) is None


def test_a_start_fails_on_a_store_that_stays_away(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    server.answer_instead = lambda _method, _path: "503 Slow Down"
    before = len(server.requests)
    thread = BackendThread(backend_for(server, tmp_path), tmp_path)
    worker.answer_question()
    with pytest.raises(BackendError, match="503"):
        thread.join()
    assert len(server.requests) == before + 4


def test_a_put_whose_answer_was_lost_is_not_a_conflict_with_another(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    backend = backend_for(server, tmp_path)
    with serving(worker, backend):
        assert worker.do(Op.FLUSH) == 0
        # From here on: its start has more time.
        backend.options = msgspec.structs.replace(backend.options, request_timeout=0.3)
        backend._open._store = backend._make_store()
        server.hold(is_chunk_put)
        request = start_write(worker, 0, 0, block(1))
        # While the others are still held: a third could be executed before it.
        assert server.held(2)[0].release().startswith("200")
        server.hold(None)
        assert worker.answer_of(request).result == BLOCK
        assert worker.read(0, CHUNK) == block(1) + bytes(CHUNK - BLOCK)
        assert worker.write(BLOCK, block(2)) == BLOCK
        assert server.held(2)[1].release().startswith("412"), "the second is late"
        assert worker.read(0, CHUNK) == block(1) + block(2) + bytes(CHUNK - 2 * BLOCK)


def test_a_server_that_stays_away_ends_the_backend_after_the_timeout(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    thread = BackendThread(backend_for(server, tmp_path, timeout="0.2"), tmp_path)
    worker.accept()
    assert worker.write(0, block(2)) == BLOCK, "it serves"
    server.kill()
    start_write(worker, 0, 0, block(1))
    with pytest.raises(BackendError, match=r"no answer for timeout=0.2 s"):
        thread.join()


def test_a_killed_backend_loses_no_answered_write(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    backend = spawn(tmp_path, "s3", options_for(server, tmp_path, cache=str(tmp_path / "cache")))
    worker.accept()
    for number in range(8):
        assert worker.write(number * BLOCK, block(number + 1)) == BLOCK
    backend.kill()
    finish(backend)
    next_attach(worker)
    with serving(worker, backend_for(server, tmp_path, cache=str(tmp_path / "cache"))):
        assert worker.read(0, 8 * BLOCK) == b"".join(block(each + 1) for each in range(8))


def test_a_disk_that_is_gone_is_not_replaced_by_an_empty_one(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.write(0, block(1)) == BLOCK
    obstore.delete(server.store(), f"{tmp_path.name}/header")
    next_attach(worker)
    thread = BackendThread(backend_for(server, tmp_path), tmp_path)
    worker.answer_question()
    with pytest.raises(BackendError, match="no header object, and this device has been served before"):
        thread.join()


def test_a_chunk_whose_object_was_deleted_ends_the_backend(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    thread = BackendThread(backend_for(server, tmp_path), tmp_path)
    worker.accept()
    assert worker.write(0, block(1)) == BLOCK
    obstore.delete(server.store(), f"{tmp_path.name}/{name_of(0)}")
    start_write(worker, 0, 0, block(2))
    with pytest.raises(BackendError, match="the object of chunk 0 is gone"):
        thread.join()


def test_a_damaged_chunk_is_an_error_and_not_data(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    name = f"{tmp_path.name}/{name_of(0)}"
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.write(0, block(1)) == BLOCK
    body = bytearray(obstore.get(server.store(), name).bytes())
    body[-1] ^= 1
    obstore.put(server.store(), name, bytes(body))
    next_attach(worker)
    with serving(worker, backend_for(server, tmp_path)):
        request = worker.describe(Kind.REQUEST, Op.READ, 0, BLOCK)
        worker.send(0, [request])
        assert worker.answer_of(request).result < 0


def test_a_store_that_ignores_conditions_is_refused(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    server.ignores_conditions = True
    thread = BackendThread(backend_for(server, tmp_path), tmp_path)
    worker.answer_attach()
    with pytest.raises(BackendError, match="the store ignores If-Match or If-None-Match"):
        thread.join()


def test_the_cache_survives_a_restart_and_is_never_older_than_the_store(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    cache = {"cache": str(tmp_path / "cache")}
    with serving(worker, backend_for(server, tmp_path, **cache)):
        assert worker.write(0, block(1)) == BLOCK
        assert worker.write(CHUNK, block(2)) == BLOCK
    next_attach(worker)
    with serving(worker, backend_for(server, tmp_path)):
        assert worker.write(CHUNK, block(3)) == BLOCK, "without the cache"
    next_attach(worker)
    backend = backend_for(server, tmp_path, **cache)
    with serving(worker, backend):
        assert worker.read(0, BLOCK) == block(1)
        assert backend.statistics()["gets"] == 0, "not modified"
        assert worker.read(CHUNK, BLOCK) == block(3)
        assert backend.statistics()["gets"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_bytes": "5000"}, "chunk_bytes=5000 is not a power of two"),
        ({"chunk_bytes": "8K"}, "its chunks have 16K, not chunk_bytes=8K"),
        ({"size": "1G"}, "has 256K, fewer than 1G"),
    ],
)
def test_options_that_do_not_fit_the_disk_are_refused(
    tmp_path: Path, server: S3Server, worker: FakeWorker, options: dict[str, str], message: str
) -> None:
    with serving(worker, backend_for(server, tmp_path)):
        pass
    worker.size_bytes = 0
    next_attach(worker)
    with pytest.raises(BackendError, match=message):
        thread = BackendThread(backend_for(server, tmp_path, **options), tmp_path)
        worker.answer_question()
        thread.join()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "garbage"}, "endpoint=garbage: give an http or https URL"),
        ({"bucket": ""}, "bucket= is empty"),
        ({"request_timeout": "-1"}, "request_timeout=-1"),
        ({"timeout": "nan"}, "timeout=nan"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        load("s3", {"bucket": BUCKET, **options})


@pytest.mark.parametrize("change", ["chunk_bytes", "size_bytes"])
def test_a_header_with_an_impossible_size_is_refused(
    tmp_path: Path, server: S3Server, worker: FakeWorker, change: str
) -> None:
    with serving(worker, backend_for(server, tmp_path)):
        pass
    name = f"{tmp_path.name}/header"
    header = msgspec.json.decode(bytes(obstore.get(server.store(), name).bytes()))
    obstore.put(server.store(), name, msgspec.json.encode({**header, change: 0}))
    next_attach(worker)
    thread = BackendThread(backend_for(server, tmp_path), tmp_path)
    worker.answer_question()
    with pytest.raises(BackendError, match=f"the header object is damaged.*{change} 0"):
        thread.join()


def test_two_devices_that_create_the_same_disk_have_one(
    tmp_path: Path, server: S3Server, worker: FakeWorker
) -> None:
    server.hold(lambda method, path: method == "PUT" and path.endswith("/header"))
    first = BackendThread(backend_for(server, tmp_path), tmp_path)
    worker.answer_question()
    (held,) = server.held(1)
    server.hold(None)
    (other := tmp_path / "other").mkdir()
    with FakeWorker(other) as second:
        with serving(second, backend_for(server, tmp_path)):
            assert second.write(0, block(1)) == BLOCK
        assert held.release().startswith("412")
        worker.generation = 20
        worker.accept()
        assert worker.read(0, BLOCK) == block(1)
        worker.detach()
        assert first.join() == 0


def test_a_missing_library_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "obstore", None)
    from ublkpool.backends._objects.client import library

    with pytest.raises(BackendError, match=r"pip install 'ublkpool\[s3\]'"):
        library("s3")
