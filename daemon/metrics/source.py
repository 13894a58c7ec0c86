"""Asks the daemon for everything that one scrape shows.

Owns the connection to the admin server, and the deadline after which the daemon counts as down.  Each question is about
one device at most, so that the daemon's loop answers each in a moment, however many devices there are.  Runs on the
exporter's asyncio loop.
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from ublkpool.daemon.admin.wire import (
    REPLY_BYTES_MAX,
    DaemonRequest,
    ListRequest,
    Reply,
    Request,
    StatsRequest,
    admin_socket,
    decode_reply,
    encode_line,
    result_of,
)
from ublkpool.daemon.errors import DaemonError, DaemonUnreachable, RemoteError, one_line
from ublkpool.daemon.metrics.usage import ProcessUsage, Usages
from ublkpool.daemon.status import DaemonStatus, DeviceStats, DeviceStatus

DEADLINE_S = 8.0
"""Below the 10 s after which Prometheus gives a scrape up."""
_T = TypeVar("_T")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Snapshot(NamedTuple):
    """What one scrape shows; without `daemon` and devices if the daemon does not answer."""

    is_up: bool
    duration_s: float
    devices: tuple[tuple[DeviceStatus, DeviceStats], ...] = ()
    daemon: DaemonStatus | None = None
    processes: tuple[ProcessUsage, ...] = ()
    trouble: str = ""
    """Why the daemon does not answer."""


class Source:
    """The daemon of one run directory, as a scrape sees it."""

    def __init__(self, connect: Callable[[], Awaitable[Streams]], usages: Usages, is_only: bool) -> None:
        """`connect` opens a connection; `is_only`: it can do so once, and that connection is kept."""
        self._connect = connect
        self._usages = usages
        self._is_only = is_only
        self._streams: Streams | None = None
        self._owed = 0
        """Answers to questions of an earlier scrape, which gave up."""
        self.broken = asyncio.Event()
        """Set once the only connection is of no more use although the daemon at its other end may live."""

    async def take(self) -> Snapshot:
        """Everything now.  Never fails: a daemon that does not answer in time is down."""
        begun_s = time.monotonic()
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self._open()
                snapshot = await self._ask_everything()
        except TimeoutError:
            trouble = f"the daemon has not answered after {DEADLINE_S:.0f} s"
        except (DaemonUnreachable, ConnectionError) as error:
            self._end()
            trouble = one_line(error)
        except (DaemonError, OSError, asyncio.IncompleteReadError, ValueError) as error:
            self._end()
            trouble = one_line(error)
            if self._is_only:
                self.broken.set()
        else:
            return snapshot._replace(duration_s=time.monotonic() - begun_s)
        finally:
            if not self._is_only:
                self._end()
        return Snapshot(False, time.monotonic() - begun_s, trouble=trouble)

    async def _open(self) -> None:
        if self._streams is None:
            self._streams = await self._connect()
            self._owed = 0
        while self._owed:
            await self._next_line()
            self._owed -= 1

    def _end(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _ask_everything(self) -> Snapshot:
        asked_ticks = self._usages.ticks()
        statuses = await self._ask(ListRequest(), list[DeviceStatus])
        devices = [
            (status, stats)
            for status in statuses
            if (stats := await self._ask_stats(status.name)) is not None
        ]
        daemon = await self._ask_daemon()
        processes = self._usages.of(statuses, daemon, asked_ticks)
        return Snapshot(True, 0.0, tuple(devices), daemon, tuple(processes))

    async def _ask_stats(self, name: str) -> DeviceStats | None:
        """None if the device was deleted meanwhile."""
        try:
            found = await self._ask(StatsRequest(name=name), list[DeviceStats])
        except RemoteError:
            return None
        return found[0] if found else None

    async def _ask_daemon(self) -> DaemonStatus | None:
        """None from a daemon of an earlier version."""
        try:
            return await self._ask(DaemonRequest(), DaemonStatus)
        except RemoteError:
            return None

    async def _ask(self, request: Request, result: type[_T]) -> _T:
        """The answer.  Raises `RemoteError`, `DaemonError`, `OSError`."""
        assert self._streams is not None
        self._streams[1].write(encode_line(request))
        self._owed += 1
        reply = await self._next_line()
        self._owed -= 1
        return result_of(reply, result)

    async def _next_line(self) -> Reply:
        assert self._streams is not None
        line = await self._streams[0].readline()
        if not line.endswith(b"\n"):
            raise DaemonUnreachable("the daemon hung up")
        return decode_reply(line)


async def open_streams(sock: socket.socket) -> Streams:
    """The streams of a connected socket, which they take over."""
    return await asyncio.open_unix_connection(sock=sock, limit=REPLY_BYTES_MAX)


def by_path(run_dir: Path) -> Source:
    """The daemon that answers on this run directory's admin socket, at each scrape anew."""

    async def connect() -> Streams:
        path = admin_socket(run_dir)
        try:
            return await asyncio.open_unix_connection(str(path), limit=REPLY_BYTES_MAX)
        except OSError as error:
            raise DaemonUnreachable(f"{path}: {error.strerror or error}") from error

    return Source(connect, Usages(), is_only=False)


def by_connection(streams: Streams) -> Source:
    """The daemon at the other end of this connection, until that ends."""
    rest = [streams]

    async def connect() -> Streams:
        if not rest:
            raise DaemonUnreachable("the daemon that started this exporter has ended")
        return rest.pop()

    return Source(connect, Usages(), is_only=True)
