"""The exporter that the daemon runs: a child by exec (`metrics/__main__.py`), which answers scrapes.

Owns the listening socket, which outlives each such process of this daemon; the process; and its record
`RUN_DIR/metrics.json`, by which the next daemon finds and ends it.  A daemon that is killed or leaves its devices
leaves the exporter as well: until the next daemon starts it answers that the daemon is down.

The process gets two descriptors: the listening socket, and a connection to the admin server that may only look.  So it
needs no privilege, and a defect in it gives a scraper no more than what `list` and `stats` show.  A scrape costs the
supervisor's loop short answers, each about one device or one list.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ublkpool.daemon.processes.background import Background, logged
from ublkpool.daemon.processes.children import Child, describe_exit
from ublkpool.daemon.processes.left_behind import Process, end_process, identify
from ublkpool.daemon.processes.listeners import listen_at, remove_left, shown
from ublkpool.daemon.processes.reserve import restore_descriptor_limit, with_room_for_one
from ublkpool.daemon.processes.supervised import SupervisedProcess
from ublkpool.daemon.settings.config import LogFormat, LogLevel
from ublkpool.daemon.settings.listen import ListenAddress
from ublkpool.workers.process import fork_child
from ublkpool.workers.record_gate import RecordGate

RECORD = "metrics.json"
RESTART_MIN_S = 0.1
RESTART_MAX_S = 5.0
END_PATIENCE_S = 2.0
_TITLE = "the exporter"
_log = logging.getLogger("ublkpool.metrics")
Watch = Callable[[socket.socket], Coroutine[Any, Any, None]]


class _Left(msgspec.Struct, frozen=True):
    """The record: the process, and the path of its unix socket, which is empty over HTTP."""

    process: Process
    path: str = ""


class MetricsProcess(SupervisedProcess):
    """The exporter of this daemon."""

    def __init__(
        self,
        run_dir: Path,
        address: ListenAddress,
        group: int | None,
        watch: Watch,
        log: tuple[LogLevel, LogFormat] = ("info", "auto"),
    ) -> None:
        """Nothing runs yet: `begin`.  `watch` takes over the exporter's connection to the admin server.

        `log`: the level and format of the daemon's log, on the stderr that they share.
        """
        super().__init__(_TITLE, _log, RESTART_MIN_S, RESTART_MAX_S)
        self._run_dir = run_dir
        self._address = address
        self._group = group
        self._watch = watch
        self._log_as = log
        self._background = Background(_TITLE)
        self._listener: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """None while none was started."""
        return self.child.pid if self.is_started else None

    def begin(self) -> None:
        """Start it as soon as it can be started, and again whenever it ends, until it is stopped."""
        self._background.spawn(self._run())

    async def _run(self) -> None:
        await end_left(self._run_dir)
        await self.start_surely()
        await self.keep_running()

    async def stop(self) -> None:
        """End it, and remove its socket and record."""
        self.let_end()
        self._background.cancel()
        if self.is_started:
            await self.child.end(END_PATIENCE_S)
        if self._listener is not None:
            self._listener.close()
            if self._address.path is not None:
                remove_left(self._address.path)
        with suppress(OSError):
            (self._run_dir / RECORD).unlink(missing_ok=True)

    def _start(self) -> None:
        if self._listener is None:
            self._listener = listen_at(self._address, self._group)
            _log.info("metrics at %s", shown(self._listener))
        gate = RecordGate()
        try:
            self._fork(self._listener, gate)
            self._record()
            gate.open()
        finally:
            gate.close()

    def _fork(self, listener: socket.socket, gate: RecordGate) -> None:
        ours, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        inherited = (listener.fileno(), theirs.fileno())
        command = [
            sys.executable,
            "-m",
            "ublkpool.daemon.metrics",
            str(self._run_dir),
            *map(str, inherited),
            *self._log_as,
        ]
        fork = with_room_for_one(
            lambda: fork_child(
                lambda: _become(command, inherited, gate), (*inherited, gate.reader), "ublkpool-metrics"
            )
        )
        try:
            self.child = Child(fork())
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._background.spawn(self._watch(ours))

    def _record(self) -> None:
        # Without a record the next daemon's exporter waits for the address; this one serves all the same.
        with logged(_TITLE):
            process = identify("metrics", self.child.pid)
            if process is not None:
                _write(self._run_dir / RECORD, _Left(process, str(self._address.path or "")))

    async def _clear_away(self, pause_s: float) -> None:
        how = describe_exit(self.child.exit_status or 0)
        _log.error("the exporter of metrics ended: %s; starting it again in %.1f s", how, pause_s)


async def end_left(run_dir: Path) -> None:
    """End the exporter that an earlier daemon left, and remove its socket and record; a failure is logged."""
    record = run_dir / RECORD
    try:
        left = msgspec.json.decode(record.read_bytes(), type=_Left)
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("%s: not an exporter's record: %s", record, error)
    else:
        with logged(_TITLE):
            await end_process(left.process)
        if left.path:
            remove_left(Path(left.path))
    with logged(_TITLE):
        record.unlink(missing_ok=True)


def _write(path: Path, left: _Left) -> None:
    """Whole or not at all."""
    new = path.with_suffix(".new")
    # A killed daemon may have left one, with another mode.
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.encode(left))
    new.replace(path)


def _become(command: list[str], inherited: Sequence[int], gate: RecordGate) -> int:
    """Runs in the forked child: become the exporter by exec, once it is on record; 1 if that fails."""
    if not gate.passes():
        return 1
    try:
        # A terminal's Ctrl-C is the daemon's to handle.
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        for fd in inherited:
            os.set_inheritable(fd, True)
        restore_descriptor_limit()
        os.execv(command[0], command)
    except (OSError, ValueError) as error:
        os.write(2, f"ublkpool: cannot start the exporter: {error}\n".encode())
    return 1
