"""The client of the admin socket for asyncio; public in `ublkpool.client`.

Keeps no connection and no state between calls.  A call that is cancelled closes its connection.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

from ublkpool.daemon.admin import calls
from ublkpool.daemon.admin.calls import CONNECT_TIMEOUT_S, QUERY_TIMEOUT_S, RECONNECT_S, Call
from ublkpool.daemon.admin.event_stream import EventStream
from ublkpool.daemon.admin.patience import silence, why_unreachable
from ublkpool.daemon.admin.wire import (
    REPLY_BYTES_MAX,
    Reply,
    Request,
    admin_socket,
    decode_reply,
    encode_line,
    result_of,
)
from ublkpool.daemon.errors import BadAnswer, DaemonStopping, DaemonUnreachable
from ublkpool.daemon.events.event import Event
from ublkpool.daemon.settings.changes import Scalar
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import DaemonStatus, DeviceStats, DeviceStatus, Reloaded, ResizeResult, Setting
from ublkpool.workers.credentials import credentials_of

_T = TypeVar("_T")


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited; any number of tasks, of any loop, may use one client."""

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None = None,
        on_progress: Callable[[str], None] = lambda text: None,
        on_wait: Callable[[str], None] = lambda text: None,
    ) -> None:
        """As for `Client`; `on_wait` is told only of a daemon that `events` waits for."""
        self._run_dir = calls.directory(run_dir)
        self._on_progress = on_progress
        self._on_wait = on_wait

    async def add(
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
        return await self._call(calls.add(device, take_over), timeout_s)

    async def delete(
        self,
        names: str | Sequence[str] | None,
        force: bool = False,
        *,
        keeps_stores: bool = False,
        timeout_s: float | None = None,
    ) -> list[str]:
        """Delete these devices, or all if `names` is None; returns the names, which may keep their stores."""
        return await self._call(calls.delete(names, force, keeps_stores), timeout_s)

    async def wait_live(self, name: str, timeout_s: float | None = None) -> DeviceStatus:
        """Return when the device is live; raises `TimedOut` after `timeout_s` seconds (None: no limit)."""
        return await self._call(calls.wait_live(name, timeout_s))

    async def rebind(self, name: str, *, timeout_s: float | None = None) -> None:
        """Let the next attach give this device another store."""
        await self._call(calls.rebind(name), timeout_s)

    async def set(
        self, name: str, values: Mapping[str, Scalar], *, timeout_s: float | None = None
    ) -> list[Setting]:
        """Change settings of the device, all or none, by the config file's keys; all of its settings then."""
        return await self._call(calls.set_values(name, values), timeout_s)

    async def drain(self, name: str, flush: bool = True, timeout_s: float | None = None) -> None:
        """Return when the device's requests wait and its backend has left; raises `TimedOut` after `timeout_s` seconds.

        The device goes on as before if this call ends early.
        """
        await self._call(calls.drain(name, flush, timeout_s))

    async def resume(self, name: str, *, timeout_s: float | None = None) -> None:
        """Have the requests of a drained device served again."""
        await self._call(calls.resume(name), timeout_s)

    async def reload(self, *, timeout_s: float | None = None) -> list[Reloaded]:
        """Have the daemon read its config file again; what became of each device."""
        return await self._call(calls.reload(), timeout_s)

    async def resize(
        self, name: str, size_bytes: int, is_relative: bool = False, *, timeout_s: float | None = None
    ) -> ResizeResult:
        """Give a live device this size, or with `is_relative` that many bytes more."""
        return await self._call(calls.resize(name, size_bytes, is_relative), timeout_s)

    async def devices(self, timeout_s: float | None = None) -> list[DeviceStatus]:
        """The status of all devices, as in `ublkpool list`."""
        return await self._call(calls.devices(), timeout_s)

    async def stats(self, name: str | None = None, *, timeout_s: float | None = None) -> list[DeviceStats]:
        """The counters of one device, or of all."""
        return await self._call(calls.stats(name), timeout_s)

    async def daemon(self, timeout_s: float | None = None) -> DaemonStatus:
        """The daemon itself."""
        return await self._call(calls.daemon(), timeout_s)

    async def stop(self, leave: bool = False, *, timeout_s: float | None = None) -> None:
        """Ask the daemon to end; with `leave` it leaves its devices for the next daemon, else it deletes them."""
        await self._call(calls.stop(leave), timeout_s)

    async def shut_down(self, final: bool, *, timeout_s: float | None = None) -> None:
        """Tell the daemon that the machine goes down; with `final` it deletes all devices and ends."""
        await self._call(calls.shut_down(final), timeout_s)

    async def events(
        self,
        after: int = 0,
        names: str | Sequence[str] | None = None,
        since: str = "",
        *,
        follow: bool = False,
        waits: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """The events numbered above `after`, of these devices, oldest first; `since` is a time as in `Event.time`.

        With `follow` also those to come, without loss or repeat over restarts of the daemon: an absent one is waited
        for, but the first unless `waits`.  It ends only by an error, or when its reader closes it or is cancelled.
        """
        request = calls.events(after, names, since, follow)
        stream = EventStream(request, waits, self._on_progress, self._on_wait)
        patience_s = None if follow else QUERY_TIMEOUT_S
        while True:
            try:
                async with aclosing(self._replies(stream.request(), patience_s, True)) as replies:
                    async for reply in replies:
                        if (event := stream.take(reply)) is not None:
                            yield event
            except (DaemonUnreachable, DaemonStopping) as error:
                stream.interrupted(error)
            if not follow:
                return
            await asyncio.sleep(RECONNECT_S)

    async def _call(self, call: Call[_T], timeout_s: float | None = None) -> _T:
        patience_s = call.patience_s(timeout_s, QUERY_TIMEOUT_S)
        async with aclosing(self._replies(call.request, patience_s, call.is_prompt)) as replies:
            async for reply in replies:
                if reply.ok is not None:
                    return result_of(reply, call.result)
                self._on_progress(reply.progress)
        raise AssertionError("the last reply is an answer")

    async def _replies(
        self, request: Request, timeout_s: float | None, is_prompt: bool
    ) -> AsyncGenerator[Reply, None]:
        path = admin_socket(self._run_dir)
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        reader, writer = await _open(path, timeout_s)
        pid = credentials_of(writer.get_extra_info("socket")).pid
        try:
            writer.write(encode_line(request))
            while True:
                try:
                    async with asyncio.timeout_at(None if timeout_s is None else begun_s + timeout_s):
                        reply = decode_reply(await _line(path, reader))
                except TimeoutError:
                    assert timeout_s is not None
                    raise silence(path, pid, timeout_s, is_prompt) from None
                yield reply
                if reply.ok is not None:
                    return
                if reply.event is not None:
                    # The time in which the reader did not ask is not the daemon's.
                    begun_s = loop.time()
        finally:
            writer.transport.abort()


async def _open(path: Path, timeout_s: float | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    patience_s = CONNECT_TIMEOUT_S if timeout_s is None else min(CONNECT_TIMEOUT_S, timeout_s)
    try:
        async with asyncio.timeout(patience_s):
            return await asyncio.open_unix_connection(str(path), limit=REPLY_BYTES_MAX)
    except OSError as error:
        # It looks at every process, which takes its time.
        raise await asyncio.to_thread(why_unreachable, path, error) from error


async def _line(path: Path, reader: asyncio.StreamReader) -> bytes:
    try:
        line = await reader.readline()
    except ValueError as error:
        raise BadAnswer(f"{path}: the daemon's answer is longer than {REPLY_BYTES_MAX} bytes") from error
    except ConnectionError as error:
        raise DaemonUnreachable(f"{path}: the daemon hung up: {error.strerror}") from error
    if not line.endswith(b"\n"):
        raise DaemonUnreachable("the daemon ended before it answered; its log says why")
    return line
