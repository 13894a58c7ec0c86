"""The backends nbd, http and s3 under `ublkpool backend check`: kills, stops and fences, over both transports."""

import itertools
import random
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from support.sources.nbdkit import Nbdkit
from support.sources.s3 import BUCKET, CREDENTIALS, S3Server
from support.sources.web import WebServer
from ublkpool.testing import Report, report_on
from ublkpool.testing import check_backend as check_backend

MIB = 1 << 20
CONTENT = random.Random(1).randbytes(MIB)
CHUNK = "64K"
SEED = 35
"""With it the kills come while a change is executed: over rings soon, over ZeroMQ once it takes long."""
Check = Callable[..., Report]


@pytest.fixture
def check(check_backend: Check) -> Check:
    """Checks a backend: what happens to it at least in each round is all that happens to it."""

    def checked(kind: str, options: dict[str, str]) -> Report:
        report = check_backend(kind, options, seconds=0, seed=SEED, deadline_s=60)
        assert min(report.counts["kill"], report.counts["fence"]) >= 2, "once over each transport"
        assert report.counts["stop"] >= 3
        return report

    return checked


@pytest.fixture(params=["without a cache", "with a cache"])
def cached(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The options for a chunk cache, or none."""
    return {"cache": str(tmp_path / "cache")} if request.param == "with a cache" else {}


def expect_entries(cached: dict[str, str]) -> None:
    for directory in cached.values():
        assert any(each.is_file() for each in Path(directory).rglob("*"))


@pytest.mark.parametrize("connections", [1, 2])
def test_nbd_keeps_every_promise(tmp_path: Path, check: Check, connections: int) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4 * MIB))
    server = Nbdkit(
        ["file", disk, f"limit={connections}"],
        socket_path=tmp_path / "nbd.sock",
        filters=["limit"],
        # With more threads nbdkit before 1.34 aborts when a client is killed that it is about to answer.
        arguments=["--threads=1"],
    )
    with server:
        report = check("nbd", {**server.options, "connections": str(connections)})
    assert {"READ", "WRITE", "FLUSH", "DISCARD", "WRITE_ZEROES"} <= report.counts.keys()
    assert any(disk.read_bytes())


def test_http_keeps_every_promise(check: Check, cached: dict[str, str]) -> None:
    with WebServer(CONTENT) as server:
        report = check("http", {"url": server.url, "chunk_bytes": CHUNK, "memory": "128K", **cached})
    assert report.counts["READ"] > 0 and "WRITE" not in report.counts
    expect_entries(cached)


class Changing(WebServer):
    """Its file changes after 100 requests, and keeps its ETag."""

    def start(self) -> None:
        """Listen, and count from 0."""
        self.turns = itertools.count()
        super().start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        # Threads answer; each takes a number of its own.
        if next(self.turns) == 100:
            self.content = self.content[::-1]
        super().answer(request)


def test_a_file_that_changes_unnoticed_breaks_a_promise_of_http() -> None:
    with Changing(CONTENT) as server:
        options = {"url": server.url, "chunk_bytes": "4K", "memory": "0"}
        report = report_on("http", options, seconds=20, seed=SEED, deadline_s=60)
    assert "no request touched it, so it should hold what it held before the check" in report.what


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name.upper(), value)
    return S3Server()


def s3_options(server: S3Server, tmp_path: Path) -> dict[str, str]:
    """Each test has a prefix of its own: moto keeps objects as long as the process lives."""
    place = {"bucket": BUCKET, "prefix": tmp_path.name, "endpoint": server.endpoint}
    return {**place, "size": "1M", "chunk_bytes": CHUNK}


def test_s3_keeps_every_promise(
    tmp_path: Path, check: Check, store: S3Server, cached: dict[str, str]
) -> None:
    with store:
        report = check("s3", {**s3_options(store, tmp_path), **cached})
    assert {"READ", "WRITE", "DISCARD", "WRITE_ZEROES"} <= report.counts.keys()
    expect_entries(cached)


def test_s3_keeps_every_promise_on_a_store_that_is_often_away(
    tmp_path: Path, check: Check, store: S3Server
) -> None:
    numbers = itertools.count()
    store.answer_instead = lambda _method, path: (
        "503 Slow Down" if tmp_path.name in path and next(numbers) % 20 == 19 else None
    )
    with store:
        check("s3", s3_options(store, tmp_path))
