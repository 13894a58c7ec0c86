"""The client of the admin socket, on a blocking socket, so that commands start fast.

Owns the error texts for a daemon that cannot be reached.  Must not import asyncio, zmq or another slow module.
"""

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import UNSET

from ublkpool.daemon.admin.patience import DaemonLines, explain_missing
from ublkpool.daemon.admin.wire import (
    AddRequest,
    DaemonRequest,
    DeleteRequest,
    DrainRequest,
    EventsRequest,
    ListRequest,
    RebindRequest,
    ReloadRequest,
    Reply,
    Request,
    ResizeRequest,
    ResumeRequest,
    SetRequest,
    ShutdownRequest,
    StatsRequest,
    StopRequest,
    WaitRequest,
    admin_socket,
    decode_reply,
    encode_line,
)
from ublkpool.daemon.errors import DaemonError, DaemonUnreachable, RemoteError
from ublkpool.daemon.events.event import Event
from ublkpool.daemon.settings.changes import Scalar
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import DaemonStatus, DeviceStats, DeviceStatus, Reloaded, ResizeResult, Setting

CONNECT_TIMEOUT_S = 10.0
QUERY_TIMEOUT_S = 30.0

_T = TypeVar("_T")


class AdminClient:
    """Requests to the daemon of one run directory, each on a connection of its own; every method raises `DaemonError`.

    Methods with QUERY_TIMEOUT_S give up after that many seconds without a line from the daemon; the others wait.
    """

    def __init__(
        self,
        run_dir: Path,
        on_progress: Callable[[str], None] = lambda text: None,
        on_wait: Callable[[str], None] = lambda text: None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_progress` gets the daemon's progress texts, `on_wait` the reason why the daemon is silent.

        `on_idle` is called after each second in which the daemon says nothing.
        """
        self._run_dir = run_dir
        self._on_progress = on_progress
        self._on_wait = on_wait
        self._on_idle = on_idle

    def add(self, device: DeviceConfig, take_over: bool = False) -> DeviceStatus:
        """Create a device; returns when it is live, or at once if the daemon runs no backend for it.

        With `take_over` its backend breaks its store's lock, no matter which client holds it.
        """
        return self._call(AddRequest(device=device, take_over=take_over or UNSET), DeviceStatus)

    def delete(
        self, names: list[str] | None, force: bool = False, *, keeps_stores: bool = False
    ) -> list[str]:
        """Delete these devices, or all if `names` is None; returns the names, which may keep their stores."""
        return self._call(
            DeleteRequest(names=names, force=force, keeps_stores=keeps_stores or UNSET), list[str]
        )

    def wait_live(self, name: str, timeout_s: float | None = None) -> DeviceStatus:
        """Return when the device is live; raises `DaemonError` after `timeout_s` seconds (None: no limit)."""
        return self._call(WaitRequest(name=name, timeout_s=timeout_s), DeviceStatus)

    def rebind(self, name: str) -> None:
        """Let the next attach give this device another store."""
        self._call(RebindRequest(name=name), None, QUERY_TIMEOUT_S)

    def set(self, name: str, values: Mapping[str, Scalar]) -> list[Setting]:
        """Change settings of the device, all or none; all of its settings then."""
        return self._call(SetRequest(name=name, values=dict(values)), list[Setting])

    def drain(self, name: str, flush: bool = True, timeout_s: float | None = None) -> None:
        """Return when the device's requests wait and its backend has left."""
        self._call(DrainRequest(name=name, flush=flush, timeout_s=timeout_s), None)

    def resume(self, name: str) -> None:
        """Have the requests of a drained device served again."""
        self._call(ResumeRequest(name=name), None)

    def reload(self) -> list[Reloaded]:
        """Have the daemon read its config file again; what became of each device."""
        return self._call(ReloadRequest(), list[Reloaded])

    def resize(self, name: str, size_bytes: int, is_relative: bool = False) -> ResizeResult:
        """Give a live device this size, or with `is_relative` that many bytes more."""
        request = ResizeRequest(name=name, size_bytes=size_bytes, is_relative=is_relative)
        return self._call(request, ResizeResult)

    def devices(self, timeout_s: float | None = None) -> list[DeviceStatus]:
        """The status of all devices; `timeout_s` in place of QUERY_TIMEOUT_S."""
        return self._call(ListRequest(), list[DeviceStatus], timeout_s or QUERY_TIMEOUT_S)

    def stats(self, name: str | None = None) -> list[DeviceStats]:
        """The counters of one device, or of all."""
        return self._call(StatsRequest(name=name), list[DeviceStats], QUERY_TIMEOUT_S)

    def events(self, request: EventsRequest, on_event: Callable[[Event], None]) -> None:
        """Have `on_event` called with each event that the request asks for.

        One that follows returns when the daemon ends in order; the caller asks its successor, from the number that it
        has.
        """
        reply = self._exchange(encode_line(request), None if request.follow else QUERY_TIMEOUT_S, on_event)
        if not reply.ok:
            raise RemoteError(reply.error, reply.status)

    def daemon(self, timeout_s: float | None = None) -> DaemonStatus:
        """The daemon itself; `RemoteError` from a daemon of an earlier version."""
        return self._call(DaemonRequest(), DaemonStatus, timeout_s or QUERY_TIMEOUT_S)

    def stop(self, leave: bool = False) -> None:
        """Ask the daemon to end; with `leave` it leaves its devices for the next daemon, else it deletes them."""
        self._call(StopRequest(leave=leave), None, QUERY_TIMEOUT_S)

    def shut_down(self, final: bool) -> None:
        """Tell the daemon that the machine goes down; with `final` it deletes all devices and ends."""
        self._call(ShutdownRequest(final=final), None, QUERY_TIMEOUT_S)

    def _call(self, request: Request, result: type[_T] | None, timeout_s: float | None = None) -> _T:
        reply = self._exchange(encode_line(request), timeout_s)
        if not reply.ok:
            raise RemoteError(reply.error, reply.status)
        try:
            answer: _T = msgspec.json.decode(reply.result, type=result)
        except msgspec.DecodeError as error:
            raise DaemonError(f"the daemon's answer makes no sense: {error}") from error
        return answer

    def _exchange(
        self,
        line: bytes,
        timeout_s: float | None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> Reply:
        path = admin_socket(self._run_dir)
        with _connect(path) as connection:
            lines = DaemonLines(path, connection, timeout_s, self._on_wait, self._on_idle)
            try:
                connection.sendall(line)
                while (reply := decode_reply(lines.next_line())).ok is None:
                    if reply.event is not None:
                        on_event(reply.event)
                    else:
                        self._on_progress(reply.progress)
                return reply
            except ConnectionError as error:
                raise DaemonUnreachable(f"{path}: the daemon hung up: {error.strerror}") from error


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(CONNECT_TIMEOUT_S)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise DaemonUnreachable(_why_unreachable(path, error)) from error
    return connection


def _why_unreachable(path: Path, error: OSError) -> str:
    start = "start it with: ublkpool serve --run-dir " + str(path.parent)
    match error:
        case FileNotFoundError():
            return explain_missing(path) or f"{path}: no such socket, the daemon is not running; {start}"
        case ConnectionRefusedError():
            return f"{path}: a daemon that was killed left this socket, none is running; {start}"
        case PermissionError():
            return f"{path}: permission denied; run this as the daemon's user, usually with sudo"
        case TimeoutError() | BlockingIOError():
            return f"{path}: the daemon does not accept connections; it may be hung"
        case _:
            return f"{path}: cannot reach the daemon: {error.strerror or error}"
