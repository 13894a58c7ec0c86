"""Answers scrapes over HTTP on a listening socket, whatever the other end does.

Owns the bounds: `CONNECTIONS_MAX` connections, each with one request of at most `HEAD_BYTES_MAX` and at most
`CONNECTION_S`.  A connection beyond that number takes the place of the oldest one whose request is not complete; if
there is none, it is closed.  So connections that say nothing keep no scraper out, and a scraper that reads nothing
costs one page of memory for a while.  Runs on the exporter's asyncio loop; h11 reads and writes the protocol.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import h11
from prometheus_client.exposition import gzip_accepted

from ublkpool.daemon.metrics.pages import Page

CONNECTIONS_MAX = 32
HEAD_BYTES_MAX = 16 * 1024
CONNECTION_S = 20.0
_READ_BYTES = 8 * 1024
_WRITE_BYTES = 64 * 1024
PATH = "/metrics"
_TEXT = "text/plain; charset=utf-8"
Headers = list[tuple[str, str]]
Pager = Callable[[str, bool], Awaitable[Page]]


class HttpServer:
    """Serves pages between `start` and `close`."""

    def __init__(self, page: Pager, connection_s: float = CONNECTION_S) -> None:
        """`page` is given the Accept header and whether the scraper takes gzip."""
        self._page = page
        self._connection_s = connection_s
        self._server: asyncio.Server | None = None
        self._waiting: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        """Connections whose request is not complete, the oldest first."""
        self._answering: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._ended = 0

    async def start(self, listener: socket.socket) -> None:
        """Serve this socket's connections."""
        self._server = await asyncio.start_server(self._serve, sock=listener, limit=_READ_BYTES)

    async def close(self) -> None:
        """Stop listening, and end all connections."""
        if self._server is not None:
            self._server.close()
        open_now = {**self._waiting, **self._answering}
        for task in open_now:
            task.cancel()
        await asyncio.gather(*open_now, return_exceptions=True)

    def statistics(self) -> dict[str, int]:
        """Connections now, by what they do; and how many have ended so far."""
        return {"waiting": len(self._waiting), "answering": len(self._answering), "ended": self._ended}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if not self._make_room():
            writer.transport.abort()
            return
        self._waiting[task] = writer
        try:
            async with asyncio.timeout(self._connection_s):
                await self._answer_one(task, reader, writer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._waiting.pop(task, None)
            self._answering.pop(task, None)
            self._ended += 1
            writer.close()

    def _make_room(self) -> bool:
        if len(self._waiting) + len(self._answering) < CONNECTIONS_MAX:
            return True
        oldest = next(iter(self._waiting), None)
        if oldest is None:
            return False
        self._waiting.pop(oldest).transport.abort()
        oldest.cancel()
        return True

    async def _answer_one(
        self, task: "asyncio.Task[None]", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        try:
            request = await _next_request(http, reader)
        except h11.RemoteProtocolError as error:
            await _send(http, writer, error.error_status_hint, [], f"{error}\n".encode())
            return
        if request is None:
            return
        self._answering[task] = self._waiting.pop(task)
        answer = await self._answer(request)
        await _send(http, writer, *answer, has_body=request.method != b"HEAD")

    async def _answer(self, request: h11.Request) -> tuple[int, Headers, bytes]:
        """Status, headers and body."""
        if request.method not in (b"GET", b"HEAD"):
            return 405, [("Allow", "GET, HEAD")], b"only GET and HEAD\n"
        path = request.target.partition(b"?")[0].decode("ascii", "replace")
        if path == "/":
            return 200, [], f"ublkpool: metrics are at {PATH}\n".encode()
        if path != PATH:
            return 404, [], f"metrics are at {PATH}\n".encode()
        page = await self._page(
            _header(request, b"accept"), gzip_accepted(_header(request, b"accept-encoding"))
        )
        encoding = [("Content-Encoding", "gzip")] if page.is_compressed else []
        return 200, [("Content-Type", page.content_type), *encoding], page.body


def _header(request: h11.Request, name: bytes) -> str:
    """The values of a header, in one."""
    return ",".join(value.decode("latin-1") for key, value in request.headers if key == name)


async def _next_request(http: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """None at the end of the connection.  Raises `h11.RemoteProtocolError`."""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Request):
            return event
        else:
            return None


async def _send(
    http: h11.Connection,
    writer: asyncio.StreamWriter,
    status: int,
    headers: Headers,
    body: bytes,
    has_body: bool = True,
) -> None:
    given = {name.lower() for name, _ in headers}
    own = [] if "content-type" in given else [("Content-Type", _TEXT)]
    named = [*headers, *own, ("Content-Length", str(len(body))), ("Connection", "close")]
    # A content type may repeat what the scraper sent.
    head = [(name.encode(), value.encode("latin-1")) for name, value in named]
    _put(writer, http.send(h11.Response(status_code=status, headers=head)))
    view = memoryview(body if has_body else b"")
    for begin in range(0, len(view), _WRITE_BYTES):
        _put(writer, http.send(h11.Data(data=bytes(view[begin : begin + _WRITE_BYTES]))))
        # What the other end does not read is not kept a second time.
        await writer.drain()
    _put(writer, http.send(h11.EndOfMessage()))
    await writer.drain()


def _put(writer: asyncio.StreamWriter, data: bytes | None) -> None:
    if data:
        writer.write(data)
