"""A store of objects behind HTTP that refuses writers of a lower generation, and can hold PUTs back.

Each PUT of an object carries a generation.  The store keeps the highest that it has seen, and compares when it stores,
not when the request arrives.  `PUT PATH/generation` claims a generation, which must be higher than all before it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT_S = 120.0


class Held:
    """A PUT that has arrived and is not stored yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._may_go = threading.Event()
        self._is_stored = threading.Event()

    def wait(self) -> None:
        """Called by the server's thread: wait until the test lets the PUT go."""
        self._may_go.wait()

    def stored(self) -> None:
        """Called by the server's thread: the PUT was stored or refused."""
        self._is_stored.set()

    def let_go(self) -> None:
        """Let the store go on with this PUT, and wait until it has."""
        self._may_go.set()
        assert self._is_stored.wait(WAIT_S)


class RestStore:
    """The objects, the generation, and what happens to PUTs on their way."""

    needs_token = True
    compares = True

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.highest = 0
        self.held: list[Held] = []
        self.refused = 0
        self.holds = False
        self.most_at_once = self._at_once = 0
        self._changed = threading.Condition()
        self.address = ""

    def refuses(self, generation: int) -> bool:
        """Whether a PUT of this generation is too late."""
        return self.compares and generation < self.highest

    def may_claim(self, generation: int) -> bool:
        """Whether a backend may begin to serve with this generation."""
        return generation > self.highest

    def wait_for_held(self, count: int) -> list[Held]:
        """Wait until so many PUTs are held back."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.held) >= count, WAIT_S), len(self.held)
            return list(self.held)

    def hold_no_more(self) -> list[Held]:
        """From now on hold no PUT back; those that were held."""
        with self._changed:
            self.holds = False
            return list(self.held)

    def put(self, name: str, body: bytes, token: str | None) -> int:
        """The status that answers a PUT."""
        if token is None and self.needs_token:
            return 428
        generation = int(token or 0)
        if name == "generation":
            return self._claim(generation, body)
        held = self._held(name)
        if held is not None:
            held.wait()
        with self._changed:
            is_refused = self.refuses(generation)
            if not is_refused:
                self.highest = max(self.highest, generation)
                self.objects[name] = body
            self.refused += is_refused
        if held is not None:
            held.stored()
        return 412 if is_refused else 204

    def _claim(self, generation: int, body: bytes) -> int:
        with self._changed:
            if not self.may_claim(generation):
                return 412
            self.highest = generation
            self.objects["generation"] = body
            return 204

    def _held(self, name: str) -> Held | None:
        with self._changed:
            if not self.holds:
                return None
            held = Held(name)
            self.held.append(held)
            self._changed.notify_all()
            return held

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count the requests that the store has at once."""
        with self._changed:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._changed:
                self._at_once -= 1


def _handler(store: RestStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with store.busy():
                body = store.objects.get(self.path.rpartition("/")[2])
            self._answer(404 if body is None else 200, body or b"")

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with store.busy():
                status = store.put(self.path.rpartition("/")[2], body, self.headers["Generation"])
            self._answer(status, b"")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return Handler


class _Server(ThreadingHTTPServer):
    request_queue_size = 64
    # Joined by `server_close`: a thread that outlived the store would close its socket during a later test.
    daemon_threads = False

    def handle_error(self, request: object, client_address: object) -> None:
        """The client was killed while it waited for the answer."""


@contextmanager
def served(store: RestStore) -> Iterator[RestStore]:
    """The store on a port of this host, named by `address`."""
    server = _Server(("127.0.0.1", 0), _handler(store))
    store.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield store
    finally:
        for each in store.hold_no_more():
            each.let_go()
        server.shutdown()
        thread.join()
        server.server_close()
