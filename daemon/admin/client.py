"""The client of the admin socket, on a blocking socket, so that commands start fast.

Public in `ublkpool.client`.  Must not import asyncio, zmq or another slow module.  Keeps no connection and no state
between calls.
"""

import os
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ublkpool.daemon.admin import calls
from ublkpool.daemon.admin.calls import CONNECT_TIMEOUT_S, QUERY_TIMEOUT_S, RECONNECT_S, Call
from ublkpool.daemon.admin.event_stream import EventStream
from ublkpool.daemon.admin.patience import DaemonLines, now_s, why_unreachable
from ublkpool.daemon.admin.wire import Reply, Request, admin_socket, decode_reply, encode_line, result_of
from ublkpool.daemon.errors import DaemonStopping, DaemonUnreachable
from ublkpool.daemon.events.event import Event
from ublkpool.daemon.settings.changes import Scalar
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import DaemonStatus, DeviceStats, DeviceStatus, Reloaded, ResizeResult, Setting

_T = TypeVar("_T")


class Client:
    """Requests to the daemon of one run directory, each on a connection of its own; every method raises `DaemonError`.

    Any number of threads may use one client, also after a fork.  A method raises `DaemonSilent` after `timeout_s`
    seconds without an answer.  By default what the daemon answers at once has 30 s and changes wait without a limit.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None = None,
        on_progress: Callable[[str], None] = lambda text: None,
        on_wait: Callable[[str], None] = lambda text: None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """Without a `run_dir` that of $UBLKPOOL_RUN_DIR, else the usual one.

        In the thread that called the method, `on_progress` gets the daemon's progress texts, `on_wait` the reason why
        the daemon is silent, and `on_idle` is called about each second in which the daemon says nothing; it may raise
        to end the call.
        """
        self._run_dir = calls.directory(run_dir)
        self._on_progress = on_progress
        self._on_wait = on_wait
        self._on_idle = on_idle

    def add(
        self,
        device: DeviceConfig | Mapping[str, object],
        take_over: bool = False,
        *,
        timeout_s: float | None = None,
    ) -> DeviceStatus:
        """Create a device; returns when it is live, or at once if the daemon runs no backend for it.

        A mapping has the config file's keys, see `device_config`.  With `take_over` its backend breaks its store's
        lock, no matter which client holds it.  The daemon gives the device up if this call ends early.
        """
        return self._call(calls.add(device, take_over), timeout_s)

    def delete(
        self,
        names: str | Sequence[str] | None,
        force: bool = False,
        *,
        keeps_stores: bool = False,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Delete these devices, or all if `names` is None; returns the names, which may keep their stores."""
        return self._call(calls.delete(names, force, keeps_stores), timeout_s)

    def wait_live(self, name: str, timeout_s: float | None = None) -> DeviceStatus:
        """Return when the device is live; raises `TimedOut` after `timeout_s` seconds (None: no limit)."""
        return self._call(calls.wait_live(name, timeout_s))

    def rebind(self, name: str, *, timeout_s: float | None = None) -> None:
        """Let the next attach give this device another store."""
        self._call(calls.rebind(name), timeout_s)

    def set(
        self, name: str, values: Mapping[str, Scalar], *, timeout_s: float | None = None
    ) -> list[Setting]:
        """Change settings of the device, all or none, by the config file's keys; all of its settings then."""
        return self._call(calls.set_values(name, values), timeout_s)

    def drain(self, name: str, flush: bool = True, timeout_s: float | None = None) -> None:
        """Return when the device's requests wait and its backend has left; raises `TimedOut` after `timeout_s` seconds.

        The device goes on as before if this call ends early.
        """
        self._call(calls.drain(name, flush, timeout_s))

    def resume(self, name: str, *, timeout_s: float | None = None) -> None:
        """Have the requests of a drained device served again."""
        self._call(calls.resume(name), timeout_s)

    def reload(self, *, timeout_s: float | None = None) -> list[Reloaded]:
        """Have the daemon read its config file again; what became of each device."""
        return self._call(calls.reload(), timeout_s)

    def resize(
        self, name: str, size_bytes: int, is_relative: bool = False, *, timeout_s: float | None = None
    ) -> ResizeResult:
        """Give a live device this size, or with `is_relative` that many bytes more."""
        return self._call(calls.resize(name, size_bytes, is_relative), timeout_s)

    def devices(self, timeout_s: float | None = None) -> list[DeviceStatus]:
        """The status of all devices, as in `ublkpool list`."""
        return self._call(calls.devices(), timeout_s)

    def stats(self, name: str | None = None, *, timeout_s: float | None = None) -> list[DeviceStats]:
        """The counters of one device, or of all."""
        return self._call(calls.stats(name), timeout_s)

    def daemon(self, timeout_s: float | None = None) -> DaemonStatus:
        """The daemon itself."""
        return self._call(calls.daemon(), timeout_s)

    def stop(self, leave: bool = False, *, timeout_s: float | None = None) -> None:
        """Ask the daemon to end; with `leave` it leaves its devices for the next daemon, else it deletes them."""
        self._call(calls.stop(leave), timeout_s)

    def shut_down(self, final: bool, *, timeout_s: float | None = None) -> None:
        """Tell the daemon that the machine goes down; with `final` it deletes all devices and ends."""
        self._call(calls.shut_down(final), timeout_s)

    def events(
        self,
        after: int = 0,
        names: str | Sequence[str] | None = None,
        since: str = "",
        *,
        follow: bool = False,
        waits: bool = False,
    ) -> Generator[Event, None, None]:
        """The events numbered above `after`, of these devices, oldest first; `since` is a time as in `Event.time`.

        With `follow` also those to come, without loss or repeat over restarts of the daemon: an absent one is waited
        for, but the first unless `waits`.  Such an iterator ends only by an error or when its reader closes it.
        """
        request = calls.events(after, names, since, follow)
        stream = EventStream(request, waits, self._on_progress, self._on_wait)
        while True:
            try:
                for reply in self._replies(stream.request(), None if follow else QUERY_TIMEOUT_S):
                    if (event := stream.take(reply)) is not None:
                        yield event
            except (DaemonUnreachable, DaemonStopping) as error:
                stream.interrupted(error)
            if not follow:
                return
            self._on_idle()
            time.sleep(RECONNECT_S)

    def _call(self, call: Call[_T], timeout_s: float | None = None) -> _T:
        patience_s = call.patience_s(timeout_s, QUERY_TIMEOUT_S)
        for reply in self._replies(call.request, patience_s, call.is_prompt):
            if reply.ok is not None:
                return result_of(reply, call.result)
            self._on_progress(reply.progress)
        raise AssertionError("the last reply is an answer")

    def _replies(self, request: Request, timeout_s: float | None, is_prompt: bool = True) -> Iterator[Reply]:
        """What the daemon says, up to its answer."""
        path = admin_socket(self._run_dir)
        begun_s = now_s()
        with _connect(path, timeout_s) as connection:
            lines = DaemonLines(path, connection, timeout_s, self._on_wait, self._on_idle, is_prompt, begun_s)
            try:
                connection.sendall(encode_line(request))
                while (reply := decode_reply(lines.next_line())).ok is None:
                    yield reply
                    if reply.event is not None:
                        # The time in which the reader did not ask is not the daemon's.
                        lines.begin_anew()
                yield reply
            except ConnectionError as error:
                raise DaemonUnreachable(f"{path}: the daemon hung up: {error.strerror}") from error


def _connect(path: Path, timeout_s: float | None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(
        CONNECT_TIMEOUT_S if timeout_s is None else min(CONNECT_TIMEOUT_S, max(timeout_s, 0.001))
    )
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise why_unreachable(path, error) from error
    return connection
