"""The exporter's HTTP: scrapers of every kind, also those that say nothing, read nothing, flood or send nonsense."""

import asyncio
import gzip
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ublkpool.daemon.metrics import http_server
from ublkpool.daemon.metrics.http_server import CONNECTIONS_MAX, HEAD_BYTES_MAX, HttpServer
from ublkpool.daemon.metrics.pages import Page

DEADLINE_S = 60
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Rig:
    """A server on a port of its own, whose page is `body`, once `gate` is set."""

    def __init__(self, connection_s: float = DEADLINE_S) -> None:
        self.body = b"ublkpool_up 1.0\n"
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[tuple[str, bool]] = []
        self.server = HttpServer(self._page, connection_s)
        self.address: tuple[str, int] = ("", 0)

    async def _page(self, accept: str, gzipped: bool) -> Page:
        self.asked.append((accept, gzipped))
        await self.gate.wait()
        body = gzip.compress(self.body) if gzipped else self.body
        return Page("text/plain; version=0.0.4", body, gzipped)

    async def start(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        await self.server.start(listener)

    async def connect(self) -> Streams:
        return await asyncio.open_connection(*self.address)

    async def ask(self, request: bytes) -> bytes:
        """The whole answer to this request."""
        reader, writer = await self.connect()
        writer.write(request)
        answer = await _all_of(reader)
        writer.close()
        return answer

    async def until(self, **counts: int) -> None:
        while not counts.items() <= self.server.statistics().items():
            await asyncio.sleep(0.001)


async def _all_of(reader: asyncio.StreamReader) -> bytes:
    text = b""
    while part := await _part(reader):
        text += part
    return text


async def _part(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(65536)
    except ConnectionError:
        return b""


def with_rig(test: Callable[[Rig], Coroutine[Any, Any, None]], connection_s: float = DEADLINE_S) -> None:
    async def run() -> None:
        rig = Rig(connection_s)
        await rig.start()
        try:
            await test(rig)
        finally:
            await rig.server.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_scrape_gets_the_page_in_the_form_that_it_asks_for() -> None:
    async def test(rig: Rig) -> None:
        head, _, body = (await rig.ask(GET)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"Content-Type: text/plain; version=0.0.4" in head
        assert body == rig.body
        headers = b"Host: x\r\nAccept: a\r\naccept: b\xff\r\nAccept-Encoding: gzip\r\n"
        request = b"GET /metrics?name[]=x HTTP/1.1\r\n" + headers + b"\r\n"
        head, _, body = (await rig.ask(request)).partition(b"\r\n\r\n")
        assert b"Content-Encoding: gzip" in head
        assert gzip.decompress(body) == rig.body
        assert rig.asked == [("", False), ("a,b\xff", True)]

    with_rig(test)


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /other HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (2 * HEAD_BYTES_MAX), 431),
        (b"x" * (2 * HEAD_BYTES_MAX), 431),
        (b"GET /metrics HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_a_request_that_makes_no_sense_is_answered_so(request_text: bytes, status: int) -> None:
    async def test(rig: Rig) -> None:
        assert (await rig.ask(request_text)).split()[1] == str(status).encode()
        assert (await rig.ask(GET)).endswith(rig.body)
        await rig.until(waiting=0, answering=0)

    with_rig(test)


def test_head_gets_no_body() -> None:
    async def test(rig: Rig) -> None:
        head, _, body = (await rig.ask(GET.replace(b"GET", b"HEAD"))).partition(b"\r\n\r\n")
        assert f"Content-Length: {len(rig.body)}".encode() in head
        assert body == b""

    with_rig(test)


def test_thousands_of_connections_that_say_nothing_keep_no_scraper_out() -> None:
    async def test(rig: Rig) -> None:
        silent = []
        for number in range(10 * CONNECTIONS_MAX):
            _, writer = await rig.connect()
            if number % 2:
                writer.write(b"GET /metr")
            silent.append(writer)
            now = rig.server.statistics()
            assert now["waiting"] + now["answering"] <= CONNECTIONS_MAX
        assert (await rig.ask(GET)).endswith(rig.body)
        for writer in silent:
            writer.transport.abort()
        await rig.until(waiting=0, answering=0)

    with_rig(test)


def test_a_scraper_whose_answer_is_due_is_not_turned_away_for_newcomers() -> None:
    async def test(rig: Rig) -> None:
        rig.gate.clear()
        asked = [asyncio.ensure_future(rig.ask(GET)) for _ in range(CONNECTIONS_MAX)]
        await rig.until(waiting=0, answering=CONNECTIONS_MAX)
        assert await rig.ask(GET) == b""
        rig.gate.set()
        answers = await asyncio.gather(*asked)
        assert all(each.endswith(rig.body) for each in answers)
        assert (await rig.ask(GET)).endswith(rig.body)

    with_rig(test)


def test_a_scraper_that_never_reads_keeps_no_other_waiting() -> None:
    async def test(rig: Rig) -> None:
        rig.body = bytes(64 << 20)
        with socket.create_connection(rig.address) as deaf:
            deaf.sendall(GET)
            await rig.until(waiting=0, answering=1)
            small = await rig.ask(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in small.partition(b"\r\n")[0]
            assert rig.server.statistics()["answering"] == 1

    with_rig(test)


def test_a_scraper_that_never_reads_is_let_go() -> None:
    async def test(rig: Rig) -> None:
        rig.body = bytes(64 << 20)
        with socket.create_connection(rig.address) as deaf:
            deaf.sendall(GET)
            await rig.until(waiting=0, answering=0, ended=1)

    with_rig(test, connection_s=0.2)


def test_a_connection_that_says_nothing_ends() -> None:
    async def test(rig: Rig) -> None:
        reader, writer = await rig.connect()
        assert await _all_of(reader) == b""
        writer.close()

    with_rig(test, connection_s=0.05)


def test_a_scraper_that_hangs_up_leaves_nothing_behind() -> None:
    async def test(rig: Rig) -> None:
        rig.gate.clear()
        for request in (b"", b"GET", GET):
            _, writer = await rig.connect()
            writer.write(request)
            await writer.drain()
            writer.transport.abort()
        rig.gate.set()
        assert (await rig.ask(GET)).endswith(rig.body)
        await rig.until(waiting=0, answering=0)

    with_rig(test)


def test_the_end_of_the_server_ends_its_connections() -> None:
    async def test(rig: Rig) -> None:
        rig.gate.clear()
        reader, writer = await rig.connect()
        other = asyncio.ensure_future(rig.ask(GET))
        await rig.until(waiting=1, answering=1)
        await rig.server.close()
        assert await _all_of(reader) == b""
        assert await other == b""
        writer.close()

    with_rig(test)


def test_a_page_that_fails_ends_only_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        def fail(_header: str) -> bool:
            raise OSError("no")

        with monkeypatch.context() as patched:
            patched.setattr(http_server, "gzip_accepted", fail)
            assert await rig.ask(GET) == b""
        assert (await rig.ask(GET)).endswith(rig.body)

    with_rig(test)
