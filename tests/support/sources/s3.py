"""A real S3 server (moto) on the loopback, in this process: a test stops it, and holds back its requests.

Its objects survive `kill`, which closes the listening socket and every connection.
"""

import io
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Self

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from obstore.store import S3Store
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from support.sources.ports import HeldPort

BUCKET = "disks"
CREDENTIALS = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "aws_region": "us-east-1"}
_DEADLINE_S = 60.0
Environ = dict[str, Any]


class _Quiet(WSGIRequestHandler):
    # Head and body of an answer are two sends: the second would wait for the client's delayed ACK.
    disable_nagle_algorithm = True

    def log(self, type: str, message: str, *args: Any) -> None:
        """Write no access log."""


class Held:
    """A request that the server has received as a whole and has not executed yet."""

    def __init__(self, environ: Environ) -> None:
        self.method, self.path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self._go, self._done = threading.Event(), threading.Event()
        self.status = ""

    def release(self) -> str:
        """Let it be executed, also if its client is gone; returns the status."""
        self._go.set()
        assert self._done.wait(_DEADLINE_S)
        return self.status


class S3Server:
    """The server; a context manager."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer | None = None
        self._thread: threading.Thread | None = None
        self._port = HeldPort()
        self._lives = 0
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._holds: Callable[[str, str], bool] | None = None
        self._held: list[Held] = []
        self._holding = threading.Condition()
        self.answer_instead: Callable[[str, str], str | None] = lambda _method, _path: None
        """Returns a status such as `503 Slow Down` for a request that is not to be executed."""
        self.ignores_conditions = False
        self.refuses_the_dead = False
        """Whether a request is not executed once its client has closed the connection: a fence for any client."""
        self.requests: list[tuple[str, str]] = []

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self._port.number}"

    def __enter__(self) -> Self:
        self.start()
        self.make_bucket()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold(None)
        for each in self._held:
            each._go.set()
        self.kill()
        self._port.close()

    def start(self) -> None:
        """Listen, each time at the same port."""
        server = make_server(
            "127.0.0.1", self._port.number, self._serve, threaded=True, request_handler=self._handler()
        )
        self._server = server
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def _handler(self) -> type[WSGIRequestHandler]:
        outer, life = self, self._lives

        class Handler(_Quiet):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                with outer._lock:
                    outer._connections.append(self.connection)
                    # Accepted before `kill`, and given to this thread after it.
                    if life != outer._lives:
                        self.connection.shutdown(socket.SHUT_RDWR)

        return Handler

    def kill(self) -> None:
        """Stop listening and close every connection."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            # The thread closes the listening socket as well.
            self._thread.join()
            self._server.server_close()
            self._server = None
        with self._lock:
            self._lives += 1
            for each in self._connections:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            self._connections.clear()

    def hold(self, which: Callable[[str, str], bool] | None) -> None:
        """Hold back the requests of which `which(method, path)` is true; None: none."""
        self._holds = which

    def held(self, count: int = 1) -> list[Held]:
        """Wait until as many requests are held back, and return them."""
        with self._holding:
            assert self._holding.wait_for(lambda: len(self._held) >= count, _DEADLINE_S)
            return list(self._held)

    def make_bucket(self) -> None:
        """Make the bucket of the tests."""
        request = urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT")
        with urllib.request.urlopen(request) as answer:
            answer.read()

    def store(self) -> Any:
        """The bucket, for a test that looks at objects or changes them."""
        config: Any = {**CREDENTIALS, "endpoint": self.endpoint, "virtual_hosted_style_request": False}
        return S3Store(BUCKET, config=config, client_options={"allow_http": True})

    def _serve(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if status := self.answer_instead(method, path):
            # What is left of it would be taken for the connection's next request.
            _take_body(environ)
            start(status, [("Content-Length", "0")])
            return [b""]
        if self.ignores_conditions:
            environ.pop("HTTP_IF_MATCH", None)
            environ.pop("HTTP_IF_NONE_MATCH", None)
        # Read once: the test may set it at any time.
        holds = self._holds
        if holds is None or not holds(method, path):
            return self._execute(environ, start)
        return self._execute_later(environ, start)

    def _execute(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        if self.refuses_the_dead:
            _take_body(environ)
        # One at a time: a condition and the PUT that has it are one step, and so are a client's life and its request.
        with self._lock:
            if self.refuses_the_dead and not _is_alive(environ["werkzeug.socket"]):
                start("408 Request Timeout", [("Content-Length", "0")])
                return [b""]
            return list(self._app(environ, start))

    def _execute_later(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        _take_body(environ)
        held = Held(environ)
        with self._holding:
            self._held.append(held)
            self._holding.notify_all()
        held._go.wait()

        def started(status: str, *rest: Any) -> Any:
            held.status = status
            return start(status, *rest)

        try:
            return self._execute(environ, started)
        finally:
            held._done.set()


def _take_body(environ: Environ) -> None:
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(body)


def _is_alive(connection: socket.socket) -> bool:
    """Whether the client, whose request has been read, still has the connection."""
    try:
        return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except OSError:
        return False
