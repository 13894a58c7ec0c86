"""A web server with one file, which answers ranges, or does not, as a test wants; a context manager."""

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from support.sources.ports import HeldPort


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Each range is a connection of its own; one that finds no place in the queue is tried again a second later.
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that is killed resets its connection."""


class WebServer:
    """Serves `content` at `/dir/disk.img`."""

    def __init__(self, content: bytes, *, ranges: bool = True, e_tag: str = '"1"') -> None:
        self.content, self.ranges, self.e_tag = content, ranges, e_tag
        self.delay_s = 0.0
        self.status = 200
        self.requests: list[str] = []
        self._port = HeldPort()
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The file's URL."""
        return f"http://127.0.0.1:{self._port.number}/dir/disk.img"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._port.close()

    def start(self) -> None:
        """Listen, each time at the same port."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                """Answer."""
                outer.answer(self)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Write no access log."""

        self._server = _Server(("127.0.0.1", self._port.number), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """Stop listening."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        wanted = request.headers.get("Range", "")
        self.requests.append(wanted)
        time.sleep(self.delay_s)
        if self.status != 200 or request.path != "/dir/disk.img":
            request.send_error(self.status if self.status != 200 else 404)
            return
        content, found = self.content, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if found and self.ranges and int(found[1]) >= len(content):
            request.send_error(416)
            return
        if found and self.ranges:
            first, last = int(found[1]), min(int(found[2]), len(content) - 1)
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        if self.e_tag:
            request.send_header("ETag", self.e_tag)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)
