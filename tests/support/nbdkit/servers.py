"""HTTP servers on loopback for plugins whose data is elsewhere: one image, and a store of objects as S3 has them."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_KEY = re.compile(rb"<Key>([^<]*)</Key>")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(data))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def is_alive(self) -> bool:
        """Whether the client still has its connection: a store with a fence takes nothing from a dead one."""
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def part(self, data: bytes | bytearray) -> bytes:
        """The bytes that the request's Range names, all without one."""
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        return bytes(data[int(found[1]) : int(found[2]) + 1] if found else data)


class _ImageHandler(_Handler):
    def do_HEAD(self) -> None:
        self.answer(200, length=str(len(self.server.image)), Accept_Ranges="bytes")

    def do_GET(self) -> None:
        self.body()
        self.answer(206, self.part(self.server.image))

    do_POST = do_GET
    """nbdkit's example sends an empty body, so its requests are POSTs."""

    def do_PUT(self) -> None:
        data, start = self.body(), int(self.headers["X-Offset"])
        with self.server.changing:
            if self.is_alive():
                self.server.image[start : start + len(data)] = data
        self.answer(200)


class _ObjectHandler(_Handler):
    @property
    def key(self) -> str:
        return unquote(urlsplit(self.path).path)

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._list(query)
        elif self.key in self.server.objects:
            self.answer(206, self.part(self.server.objects[self.key]))
        else:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        data = self.body()
        with self.server.changing:
            if self.is_alive():
                self.server.objects[self.key] = data
        self.answer(200, ETag='"1"')

    def do_POST(self) -> None:
        keys = _KEY.findall(self.body())
        with self.server.changing:
            for key in keys if self.is_alive() else []:
                self.server.objects.pop(f"{self.key}/{key.decode()}".replace("//", "/"), None)
        self.answer(200, b"<DeleteResult></DeleteResult>")

    def _list(self, query: dict[str, list[str]]) -> None:
        bucket = self.key.rstrip("/") + "/"
        prefix, after = (query.get(each, [""])[0] for each in ("prefix", "start-after"))
        keys = sorted(each.removeprefix(bucket) for each in self.server.objects if each.startswith(bucket))
        found = [each for each in keys if each.startswith(prefix) and each > after]
        rows = "".join(f"<Contents><Key>{escape(each)}</Key></Contents>" for each in found)
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        self.answer(200, text.encode(), Content_Type="application/xml")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.changing = threading.Lock()
        """Held while a change is made: one whose client dies in between comes before its successor's changes."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that is killed resets its connection."""


@contextmanager
def _serving(handler: type[_Handler], **state: object) -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), handler)
    vars(server).update(state)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def image_server(image: bytearray) -> Any:
    """Serves `image`, for reading by range and for writing at an offset; a context manager of the URL."""
    return _serving(_ImageHandler, image=image)


def object_server(objects: dict[str, bytes]) -> Any:
    """Serves `objects` by /BUCKET/KEY as S3 does, without looking at signatures; a context manager of the URL."""
    return _serving(_ObjectHandler, objects=objects)


def set_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give processes that start from now on what a client of S3 needs."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }.items():
        monkeypatch.setenv(name, value)


IMAGEIO_CLIENT = '''
"""A stand-in for ovirt_imageio.client: the methods that nbdkit's example calls, over HTTP."""

import http.client
import threading
from urllib.parse import urlsplit


class ImageioClient:
    def __init__(self, url, cafile=None, secure=True):
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port)

    def _request(self, method, body=None, **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, "/image", body, named)
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status >= 300:
            raise RuntimeError(answer.status)
        return answer, data

    def size(self):
        return int(self._request("HEAD")[0].headers["Content-Length"])

    def read(self, offset, buf):
        buf[:] = self._request("GET", Range=f"bytes={offset}-{offset + len(buf) - 1}")[1]

    def write(self, offset, buf):
        self._request("PUT", bytes(buf), X_Offset=str(offset))

    def zero(self, offset, count):
        self._request("PUT", bytes(count), X_Offset=str(offset))

    def flush(self):
        pass

    def close(self):
        self._connection.close()
'''
