"""The exporter's process: from its start to SIGTERM.

Owns the order of its start: listen, connect, give up every privilege, then serve.  Started by the daemon it inherits
the listening socket and its connection; started by hand it makes both.  One asyncio loop; it forks nothing.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from ublkpool.daemon.metrics.collector import render
from ublkpool.daemon.metrics.http_server import HttpServer
from ublkpool.daemon.metrics.pages import Pages
from ublkpool.daemon.metrics.source import Snapshot, Source, by_connection, by_path, open_streams
from ublkpool.daemon.processes.beside import beside
from ublkpool.daemon.processes.listeners import listen_at, remove_left, shown
from ublkpool.daemon.settings.listen import ListenAddress
from ublkpool.workers.privileges import (
    Account,
    account_of,
    become,
    forbid_new_rights,
    give_up_capabilities,
)

USER = "nobody"
_USER_NUMBER = 65534
"""Where the system has no user of that name."""
_NICE = 5
LOOK_S = 1.0
"""Between two looks whether the run directory is still there."""
_log = logging.getLogger("ublkpool.metrics")


def run_inherited(run_dir: Path, listener: int, connection: int) -> int:
    """The daemon's child: serve on this socket what the daemon at the other end of `connection` tells.

    It ends with 0 when the run directory is removed, where no later daemon would find it to end it; and with 1 when the
    daemon answers nonsense, since that daemon starts another one, with another connection.
    """
    directory = None
    with suppress(OSError):
        directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with suppress(OSError):
        # The daemon is spared when memory runs out; its exporter need not be.
        Path("/proc/self/oom_score_adj").write_text("0")
        Path("/proc/self/comm").write_text("ublkpool-metric")
        os.nice(_NICE)
    sock, daemon = socket.socket(fileno=listener), socket.socket(fileno=connection)
    # Whatever the library imports at its first use is read while that may be read.
    for accept in ("", "application/openmetrics-text"):
        render(Snapshot(False, 0.0), accept)
    become_ordinary()

    async def serve() -> int:
        daemon.setblocking(False)
        source = by_connection(await open_streams(daemon))
        await _serve(source, sock, _end(source, directory))
        return int(source.broken.is_set())

    return asyncio.run(serve())


def run(run_dir: Path, address: ListenAddress) -> int:
    """By hand, or by a unit: serve at `address` what the daemon of `run_dir` tells.  Raises `DaemonError`."""
    sock = listen_at(address)
    _log.info("metrics of %s at %s", run_dir, shown(sock))
    try:
        asyncio.run(_serve(by_path(run_dir), sock, asyncio.Event().wait()))
    finally:
        if address.path is not None:
            remove_left(address.path)
    return 0


async def _serve(source: Source, listener: socket.socket, end: Coroutine[Any, Any, object]) -> None:
    """Serve until SIGTERM, or until `end` returns."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = HttpServer(Pages(source.take).page)
    await server.start(listener)
    async with beside(stop.wait()) as stopped, beside(end) as ended:
        await asyncio.wait({stopped, ended}, return_when=asyncio.FIRST_COMPLETED)
    await server.close()


async def _end(source: Source, directory: int | None) -> None:
    """Return when the run directory is removed, or the connection to the daemon is of no more use."""
    async with beside(_removal(directory)) as removed, beside(source.broken.wait()) as broken:
        await asyncio.wait({removed, broken}, return_when=asyncio.FIRST_COMPLETED)


async def _removal(directory: int | None) -> None:
    """Return when this open directory has been removed; never for one that was gone from the start.

    A daemon that runs without its run directory keeps its exporter.
    """
    while directory is None or os.fstat(directory).st_nlink:
        await asyncio.sleep(LOOK_S)


def become_ordinary() -> None:
    """Become the user nobody, if this is root; where the user namespace has no such user it stays root, and says so.

    Whichever user it is, it has no capability any more.
    """
    forbid_new_rights()
    if os.geteuid() == 0:
        try:
            account = account_of(USER)._replace(groups=())
        except LookupError:
            account = Account(USER, _USER_NUMBER, _USER_NUMBER, ())
        try:
            become(account)
        except OSError as error:
            _log.warning(
                "the exporter stays root: it cannot become user %d: %s", account.user, error.strerror
            )
    give_up_capabilities()
