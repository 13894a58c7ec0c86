"""The thread that makes connections to a lost server, so that the loop never waits for a name or a peer.

Owns the thread, which tells the loop by an eventfd of the session's, hands over whole connections and ends.
"""

import os
import threading
import time

from ublkpool.backends.nbd.connection import Connection, Export, Lost
from ublkpool.backends.nbd.options import NbdOptions
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import log

_ATTEMPT_S = 20.0
_STOP_S = 1.0
_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0)


def connect_all(options: NbdOptions, expected: Export | None = None) -> tuple[list[Connection], Export]:
    """All connections that the server takes, and its export.  Raises `Lost`, `BackendError`.

    With `expected` an export that differs from it in what the device depends on is `Lost`, too.
    """
    connections: list[Connection] = []
    try:
        connections.append(_connected(options))
        export = connections[0].export()
        if expected is not None and (difference := _difference(export, expected)):
            raise Lost(f"another export: {difference}")
        if export.multi_conn or export.read_only:
            while len(connections) < options.connections:
                connections.append(_connected(options))
                if connections[-1].export() != export:
                    raise Lost("two connections at once were offered different exports")
        return connections, export
    except BaseException:
        for each in connections:
            each.close()
        raise


def _connected(options: NbdOptions) -> Connection:
    connection = Connection(options)
    try:
        connection.connect(options, _ATTEMPT_S)
        return connection
    except BaseException:
        connection.close()
        raise


def _difference(export: Export, expected: Export) -> str:
    """What the device depends on and no longer finds; empty if nothing."""
    if export.size_bytes != expected.size_bytes:
        return f"it has {export.size_bytes} bytes, the device was started on {expected.size_bytes}"
    if export.read_only and not expected.read_only:
        return "it is read-only now"
    if export.block_bytes > expected.block_bytes:
        return f"its smallest block is {export.block_bytes} bytes now, it was {expected.block_bytes}"
    if export.request_bytes_max < expected.request_bytes_max:
        return f"its largest request is {export.request_bytes_max} bytes now, it was {expected.request_bytes_max}"
    lacking = [
        name
        for name in ("flush", "fua", "trim", "zero")
        if getattr(expected, name) and not getattr(export, name)
    ]
    return f"it has no {', '.join(lacking)} any more" if lacking else ""


class Connector:
    """Connects to the server, again and again until it succeeds."""

    def __init__(self, options: NbdOptions, expected: Export, descriptor: int, fruitless: int = 0) -> None:
        """Starts the thread, which writes to the eventfd `descriptor` when it ends.

        `fruitless`: how many connections in a row ended without an answer; each makes the next one come later.
        If it cannot be started, the connector has ended, and `take` raises the reason.
        """
        self._descriptor = descriptor
        self._options, self._expected, self._fruitless = options, expected, fruitless
        self._connections: list[Connection] = []
        self._error: BaseException | None = None
        self._stop, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="nbd-connect", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._error = error
            self._end()

    def _run(self) -> None:
        try:
            self._try_until_stopped()
        except BaseException as error:
            self._error = error
        self._end()

    def _end(self) -> None:
        self._ended.set()
        os.eventfd_write(self._descriptor, 1)

    @property
    def has_ended(self) -> bool:
        """Whether `take` has something to return or to raise."""
        return self._ended.is_set()

    def _try_until_stopped(self) -> None:
        reason, attempt, since_s = "", self._fruitless, time.monotonic()
        if attempt:
            self._pause(attempt - 1)
        while not self._stop.is_set():
            try:
                self._connections, _ = connect_all(self._options, self._expected)
                return
            except Lost as error:
                if str(error) != reason:
                    reason = str(error)
                    log.warning("%s: cannot connect, trying again: %s", self._options.server, reason)
            waited_s = time.monotonic() - since_s
            if 0 < self._options.timeout <= waited_s:
                raise BackendError(
                    f"{self._options.server}: lost for timeout={self._options.timeout:g} s: {reason}"
                )
            self._pause(attempt)
            attempt += 1

    def _pause(self, attempt: int) -> None:
        self._stop.wait(_PAUSES_S[min(attempt, len(_PAUSES_S) - 1)])

    def take(self) -> list[Connection]:
        """The connections, called once when the connector has ended.

        Raises `BackendError` if no attempt can succeed, or `timeout` seconds have passed.
        """
        if self._thread.ident is not None:
            self._thread.join()
        if isinstance(self._error, BackendError):
            raise self._error
        if self._error is not None:
            raise BackendError(f"{self._options.server}: {self._error}") from self._error
        return self._connections

    def stop(self) -> bool:
        """End the thread and close what it has connected; False if its attempt hangs until the process ends."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_S)
        if self._thread.is_alive():
            return False
        for each in self._connections:
            each.close()
        return True
