"""The server of the admin socket: reads requests, calls a `DeviceService`, writes answers.

Owns the socket file (mode 0600), the connections and the tasks of running operations; must not know what a device is.
Runs on the supervisor's asyncio loop.  If the client disconnects, `wait`, `events`, `add` and `drain` are cancelled:
`add` may wait for a backend without limit, and a device that its user gave up must not appear later.  Other operations
run to their end.
"""

import asyncio
import logging
import select
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from msgspec import UNSET

from ublkpool.daemon.admin.followers import Followers
from ublkpool.daemon.admin.wire import (
    ADMIN_VERSION,
    REQUEST_BYTES_MAX,
    AddRequest,
    DaemonRequest,
    DeleteRequest,
    Done,
    DrainRequest,
    EventsRequest,
    Failed,
    ListRequest,
    Progress,
    RebindRequest,
    ReloadRequest,
    Request,
    ResizeRequest,
    ResumeRequest,
    SetRequest,
    ShutdownRequest,
    StatsRequest,
    StopRequest,
    WaitRequest,
    admin_socket,
    decode_request,
    encode_line,
)
from ublkpool.daemon.errors import STATUS_FAILED, STATUS_USAGE, ConfigError, DaemonError, one_line, status_of
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.unix_socket import ReservedListener, listen
from ublkpool.daemon.settings.changes import Scalar
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import DaemonStatus, DeviceStats, DeviceStatus, Reloaded, ResizeResult, Setting

HANGUP_POLL_S = 0.5
DRAIN_S = 10.0
UNREAD_S = 1.0
"""At the daemon's end: a client that reads nothing of its answer for so long is disconnected."""

WATCHER_MAY = (ListRequest, StatsRequest, DaemonRequest)
"""Requests that change nothing: all that a watcher's connection may ask."""

_log = logging.getLogger("ublkpool.admin")
_STOPPING = Failed(error="the daemon is stopping", status=STATUS_FAILED, code="stopping")
_Names = list[str]
_Kinds = tuple[type[Request], ...]


class DeviceService(Protocol):
    """The supervisor's operations; an exception becomes the error of the request."""

    async def add(
        self, cfg: DeviceConfig, progress: Callable[[str], None], take_over: bool = False
    ) -> DeviceStatus:
        """Create a device; returns when it is live, or at once if the daemon runs no backend for it."""

    async def delete(self, names: _Names | None, force: bool, *, forget: bool = True) -> Sequence[str]:
        """Delete these devices, or all if `names` is None, and forget their stores; returns the names."""

    async def wait_live(self, name: str, timeout_s: float | None) -> DeviceStatus:
        """Return when the device is live; raises `DaemonError` after `timeout_s` seconds (None: no limit)."""

    async def rebind(self, name: str) -> None:
        """Let the next attach give this device another store."""

    async def set(self, name: str, values: Mapping[str, Scalar]) -> Sequence[Setting]:
        """Change settings of a device, all or none; all of its settings then."""

    @property
    def events(self) -> Events:
        """What has happened to the devices."""

    async def reload(self) -> Sequence[Reloaded]:
        """Read the config file again; what became of each device."""

    async def drain(self, name: str, flush: bool, timeout_s: float | None) -> None:
        """Have a device's requests wait and its backend leave; if cancelled before that, it goes on as before."""

    async def resume(self, name: str) -> None:
        """Have the requests of a drained device served again."""

    async def resize(self, name: str, size_bytes: int, is_relative: bool) -> ResizeResult:
        """Give a live device this size, or with `is_relative` that many bytes more."""

    def list(self) -> Sequence[DeviceStatus]:
        """The status of all devices."""

    def stats(self, name: str | None) -> Sequence[DeviceStats]:
        """The counters of one device, or of all."""

    def daemon(self) -> DaemonStatus:
        """The daemon's version and processes."""

    async def stop(self, leave: bool) -> None:
        """Ask the daemon to end, with its devices left for the next daemon or deleted; may return before it ends."""

    async def shut_down(self, final: bool) -> None:
        """Prepare for the machine's shutdown; with `final` delete every device and end."""


class AdminServer:
    """Serves `service` on the run directory's admin socket between `start()` and `close()`."""

    def __init__(self, service: DeviceService, run_dir: Path) -> None:
        self._service = service
        self._path = admin_socket(run_dir)
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}
        self._operations = Background("admin")
        self._followers = Followers(service.events)
        self._request_count = 0
        self._failure_count = 0
        self._is_ending = False

    async def start(self) -> None:
        """Listen.  Raises `DaemonError` if another daemon listens here or the socket cannot be made."""
        listener = ReservedListener(_listen(self._path))
        self._server = await asyncio.start_unix_server(
            self._serve_connection, sock=listener, limit=REQUEST_BYTES_MAX
        )

    async def serve_watcher(self, sock: socket.socket) -> None:
        """Serve this connection, which takes over `sock`, until it ends; it may ask only what changes nothing."""
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=REQUEST_BYTES_MAX)
        await self._serve_connection(reader, writer, may=WATCHER_MAY)

    async def close(self, drain_s: float = DRAIN_S) -> None:
        """Stop listening, remove the socket, give running operations `drain_s` seconds to answer, and disconnect.

        Requests that have not begun are answered that the daemon is stopping, each client by itself: one that does not
        read keeps no other waiting, and the end waits `UNREAD_S` for it.
        """
        if self._server is None:
            return
        self._is_ending = True
        self._server.close()
        self._server = None
        self._path.unlink(missing_ok=True)
        self._followers.end()
        for reader, writer in self._connections.values():
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            reader.feed_eof()
        await _end_within(list(self._operations.tasks), drain_s)
        await self._disconnect(drain_s)

    async def _disconnect(self, drain_s: float) -> None:
        """Wait up to `drain_s` seconds for the clients to read their answers, for one that does not read less."""
        loop = asyncio.get_running_loop()
        until_s, unread = loop.time() + drain_s, dict[asyncio.Task[None], int]()
        while self._connections and (left_s := until_s - loop.time()) > 0:
            for task, (_, writer) in self._connections.items():
                size_bytes, before = writer.transport.get_write_buffer_size(), unread.get(task, 0)
                unread[task] = size_bytes
                if 0 < before <= size_bytes:
                    writer.transport.abort()
            await asyncio.wait(list(self._connections), timeout=min(UNREAD_S, left_s))
        await _end_within(list(self._connections), 0)

    def statistics(self) -> dict[str, int]:
        """The number of connections and operations now, of requests and failures since the start."""
        return {
            "connections": len(self._connections),
            "operations": len(self._operations.tasks),
            "requests": self._request_count,
            "failures": self._failure_count,
        }

    async def _serve_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, may: _Kinds | None = None
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = (reader, writer)
        try:
            while await self._serve_line(reader, writer, may):
                pass
        except (ConnectionError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            del self._connections[task]
            writer.close()

    async def _serve_line(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, may: _Kinds | None
    ) -> bool:
        """Answer one request; False at the end of the connection."""
        try:
            line = await reader.readline()
        except ValueError:
            error = f"bad request: longer than {REQUEST_BYTES_MAX} bytes"
            await self._send(writer, Failed(error=error, status=STATUS_USAGE, code="bad-request"))
            return False
        if not line:
            return False
        self._request_count += 1
        await self._send(writer, await self._answer(line, writer, may))
        return True

    async def _send(self, writer: asyncio.StreamWriter, message: Done | Failed) -> None:
        self._failure_count += isinstance(message, Failed)
        writer.write(encode_line(message))
        await writer.drain()

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter, may: _Kinds | None) -> Done | Failed:
        try:
            request = decode_request(line)
        except ConfigError as error:
            return _failed(error)
        if self._is_ending:
            return _STOPPING
        if may is not None and not isinstance(request, may):
            return Failed(error="this connection may only look: use the admin socket", status=STATUS_USAGE)
        operation = self._operations.spawn_awaited(self._perform(request, writer))
        if isinstance(request, WaitRequest | AddRequest | DrainRequest | EventsRequest):
            await _end_with_client(operation, writer)
        await asyncio.wait({operation})
        if operation.cancelled():
            return _STOPPING
        failure = operation.exception()
        return Done(result=operation.result()) if failure is None else _failed(failure)

    async def _perform(self, request: Request, writer: asyncio.StreamWriter) -> object:
        match request:
            case AddRequest():
                take_over = request.take_over is True
                return await self._service.add(request.device, _progress_to(writer), take_over)
            case DeleteRequest():
                return await self._service.delete(
                    request.names, request.force, forget=request.keeps_stores is not True
                )
            case WaitRequest():
                return await self._service.wait_live(request.name, request.timeout_s)
            case RebindRequest():
                await self._service.rebind(request.name)
                return None
            case SetRequest() | ResizeRequest() | DrainRequest() | ResumeRequest() | ReloadRequest():
                return await self._change(request)
            case ListRequest() | StatsRequest() | DaemonRequest():
                return self._look(request)
            case EventsRequest():
                await self._followers.tell(request, writer)
                return None
            case _:
                await self._perform_end(request)
                return None

    async def _perform_end(self, request: StopRequest | ShutdownRequest) -> None:
        match request:
            case StopRequest():
                await self._service.stop(request.leave)
            case ShutdownRequest():
                await self._service.shut_down(request.final)

    def _look(self, request: ListRequest | StatsRequest | DaemonRequest) -> object:
        match request:
            case ListRequest():
                return self._service.list()
            case StatsRequest():
                return self._service.stats(request.name)
            case DaemonRequest():
                return self._service.daemon()

    async def _change(
        self, request: SetRequest | ResizeRequest | DrainRequest | ResumeRequest | ReloadRequest
    ) -> object:
        match request:
            case ReloadRequest():
                return await self._service.reload()
            case SetRequest():
                return await self._service.set(request.name, request.values)
            case ResizeRequest():
                return await self._service.resize(request.name, request.size_bytes, request.is_relative)
            case DrainRequest():
                await self._service.drain(request.name, request.flush, request.timeout_s)
                return None
            case ResumeRequest():
                await self._service.resume(request.name)
                return None


def _failed(error: BaseException) -> Failed:
    if not type(error).__module__.startswith("ublkpool."):
        _log.error("a request failed unexpectedly", exc_info=error)
    code = error.code if isinstance(error, DaemonError) else ""
    return Failed(
        error=one_line(error),
        status=status_of(error),
        code=code or UNSET,
        speaks=ADMIN_VERSION if code == "version" else UNSET,
    )


def _progress_to(writer: asyncio.StreamWriter) -> Callable[[str], None]:
    def progress(text: str) -> None:
        if not writer.is_closing():
            writer.write(encode_line(Progress(text)))

    return progress


async def _end_within(tasks: Sequence[asyncio.Task[Any]], seconds: float) -> None:
    """Wait for these tasks; cancel those that take longer than `seconds`."""
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)


async def _end_with_client(operation: asyncio.Task[object], writer: asyncio.StreamWriter) -> None:
    """Wait for the operation; cancel it if its client disconnects first."""
    while not operation.done():
        await asyncio.wait({operation}, timeout=HANGUP_POLL_S)
        if _has_hung_up(writer):
            operation.cancel()
            return


def _has_hung_up(writer: asyncio.StreamWriter) -> bool:
    """Whether the client has disconnected; shutdown(2) of its sending side alone does not count."""
    if writer.is_closing():
        return True
    poll = select.poll()
    poll.register(writer.get_extra_info("socket").fileno(), 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def _listen(path: Path) -> socket.socket:
    """A listening socket at `path`, for its owner only; replaces the socket file of a daemon that is gone."""
    if _is_answered(path):
        raise DaemonError(f"{path}: another daemon is running here (stop it, or choose another --run-dir)")
    return listen(path, socket.SOCK_STREAM)


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except TimeoutError:
            return True
        except OSError:
            return False
    return True
