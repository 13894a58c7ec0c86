"""The backend http against a web server: ranges, changes of the file, an absent or slow server, the cache."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from support.fakes.worker import DEADLINE_S, BackendThread, FakeWorker, serving
from support.sources.web import WebServer
from ublkpool.backends.http import HttpBackend
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.loader import load
from ublkpool.bufpool.wire import Kind, Op

CONTENT = random.Random(1).randbytes(512 * 400)
CHUNK = 16384


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer(CONTENT) as server:
        yield server


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    with FakeWorker(tmp_path) as worker:
        yield worker


def backend_for(server: WebServer, **options: str) -> HttpBackend:
    backend = load("http", {"url": server.url, "chunk_bytes": str(CHUNK), **options})
    assert isinstance(backend, HttpBackend)
    return backend


def refused(worker: FakeWorker, backend: HttpBackend, message: str) -> None:
    thread = BackendThread(backend, worker.run_dir)
    worker.answer_question()
    with pytest.raises(BackendError, match=message):
        thread.join()


def ended(worker: FakeWorker, thread: BackendThread, offset: int, message: str) -> None:
    """A read that ends the backend, unanswered."""
    worker.send(0, [worker.describe(Kind.REQUEST, Op.READ, offset, 4096)])
    with pytest.raises(BackendError, match=message):
        thread.join()


def test_every_part_of_the_file_can_be_read(server: WebServer, worker: FakeWorker) -> None:
    backend = backend_for(server)
    with serving(worker, backend):
        assert worker.attach is not None
        assert (worker.attach.size_bytes, worker.attach.read_only) == (len(CONTENT), True)
        for offset, length in ((0, 512), (CHUNK - 512, 1024), (512, 65536), (len(CONTENT) - 4096, 4096)):
            assert worker.read(offset, length) == CONTENT[offset : offset + length]
    assert backend.statistics()["fetched"] == 6, "each chunk once"


def test_a_server_that_ignores_range_is_refused(worker: FakeWorker) -> None:
    with WebServer(CONTENT, ranges=False) as server:
        refused(worker, backend_for(server), "the server ignores Range")


def test_a_server_that_ignores_range_later_ends_the_backend(server: WebServer, worker: FakeWorker) -> None:
    thread = BackendThread(backend_for(server), worker.run_dir)
    worker.accept()
    assert worker.read(0, 4096) == CONTENT[:4096]
    server.ranges = False
    ended(worker, thread, CHUNK, "the file can no longer be read")


@pytest.mark.parametrize("change", ["etag", "size", "gone", "shorter", "empty"])
def test_a_file_that_changes_ends_the_backend(server: WebServer, worker: FakeWorker, change: str) -> None:
    thread = BackendThread(backend_for(server), worker.run_dir)
    worker.accept()
    assert worker.read(0, 4096) == CONTENT[:4096]
    if change == "etag":
        server.e_tag = '"2"'
    elif change == "size":
        server.content += bytes(512)
    elif change in ("shorter", "empty"):
        server.content = server.content[: 4096 if change == "shorter" else 0]
    else:
        server.status = 404
    ended(
        worker,
        thread,
        CHUNK,
        "the file can no longer be read" if change == "gone" else "the file has changed",
    )


def test_a_changed_file_is_another_store(server: WebServer, worker: FakeWorker) -> None:
    identities = []
    for e_tag in ('"1"', '"1"', '"2"'):
        server.e_tag = e_tag
        with serving(worker, backend_for(server)):
            assert worker.attach is not None and worker.attach.identity is not None
            identities.append(worker.attach.identity.value)
        worker.restart_worker(0)
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize("failure", ["dead", "503", "slow"])
def test_reads_wait_for_a_server_that_is_away(server: WebServer, worker: FakeWorker, failure: str) -> None:
    backend = backend_for(server)
    with serving(worker, backend):
        # From here on: its start has more time.
        backend.options = msgspec.structs.replace(backend.options, request_timeout=0.3)
        backend._store = backend._make_store()
        if failure == "dead":
            server.kill()
        elif failure == "503":
            server.status = 503
        else:
            server.delay_s = 0.9
        request = worker.describe(Kind.REQUEST, Op.READ, 0, 4096)
        worker.send(0, [request])
        deadline_s = time.monotonic() + DEADLINE_S
        while backend.statistics()["retries"] < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        server.status, server.delay_s = 200, 0.0
        if failure == "dead":
            server.start()
        assert worker.answer_of(request).result == 4096
        assert worker.pool[request.buffer : request.buffer + 4096] == CONTENT[:4096]


def test_a_server_that_stays_away_ends_the_backend_after_the_timeout(
    server: WebServer, worker: FakeWorker
) -> None:
    thread = BackendThread(backend_for(server, timeout="0.2"), worker.run_dir)
    worker.accept()
    assert worker.read(0, 4096) == CONTENT[:4096]
    server.kill()
    ended(worker, thread, CHUNK, "no answer for timeout=0.2 s")


def test_the_cache_survives_a_restart_and_another_version(
    server: WebServer, worker: FakeWorker, tmp_path: Path
) -> None:
    cache = {"cache": str(tmp_path / "cache")}
    fetched = []
    for content, e_tag in ((CONTENT, '"1"'), (CONTENT, '"1"'), (CONTENT[::-1], '"2"'), (CONTENT, '"1"')):
        server.content, server.e_tag = content, e_tag
        backend = backend_for(server, **cache)
        with serving(worker, backend):
            assert worker.read(0, 65536) == content[:65536]
        fetched.append(backend.statistics()["fetched"])
        worker.restart_worker(0)
    assert fetched == [4, 0, 4, 0]


def test_a_cache_for_a_file_without_a_version_is_refused(worker: FakeWorker, tmp_path: Path) -> None:
    with WebServer(CONTENT, e_tag="") as server:
        refused(worker, backend_for(server, cache=str(tmp_path / "cache")), "no ETag and no Last-Modified")


def test_a_file_that_does_not_exist_or_is_too_small_is_refused(server: WebServer, worker: FakeWorker) -> None:
    refused(worker, backend_for(server, url=server.url + "x"), "no such file")
    worker.size_bytes = 2 * len(CONTENT)
    refused(worker, backend_for(server), "fewer than device")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://a/b"}, "give an http or https URL"),
        ({"url": "http://[::1/b"}, "Invalid IPv6 URL"),
        ({"url": "http://a:99999/b"}, "Port out of range"),
        ({"url": "http://:80/b"}, "give an http or https URL"),
        ({"url": "http://a/"}, "URL of a file"),
        ({"url": "http://a/b?c"}, "cannot be served"),
        ({"url": "http://a/b", "chunk_bytes": "1000"}, "chunk_bytes=1000"),
        ({"url": "http://a/b", "chunk_bytes": "1G"}, "4K to 64M"),
        ({"url": "http://a/b", "timeout": "nan"}, "timeout=nan"),
        ({"url": "http://a/b", "timeout": "-1"}, "timeout=-1"),
        ({"url": "http://a/b", "request_timeout": "0"}, "request_timeout=0"),
        ({"url": "http://a/b", "request_timeout": "nan"}, "request_timeout=nan"),
    ],
)
def test_options_that_cannot_be_served_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        load("http", options)
