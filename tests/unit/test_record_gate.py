"""Processes that the daemon forks and records after: none outlives a daemon that is killed in between."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from support.fakes.device_parts import FakeKernel, FakeParts, fake_context
from ublkpool.daemon.device import forks
from ublkpool.daemon.device import team as team_module
from ublkpool.daemon.device.records import NotRecorded
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk import process_calls
from ublkpool.workers import process
from ublkpool.workers.engine_inside import EngineSpec
from ublkpool.workers.process import EXIT_FAULT, run_worker
from ublkpool.workers.record_gate import RecordGate

DEADLINE_S = 200

_EXPORTER = """
import asyncio, os, signal, sys
from pathlib import Path
from ublkpool.daemon.processes.metrics_process import MetricsProcess
from ublkpool.daemon.settings.listen import ListenAddress

class Daemon(MetricsProcess):
    def _record(self):
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    run_dir = Path(sys.argv[1])
    daemon = Daemon(run_dir, ListenAddress(path=run_dir / "metrics.sock"), None, lambda sock: asyncio.sleep(0))
    daemon.begin()
    await asyncio.Event().wait()

asyncio.run(main())
"""

_BROKER = """
import asyncio, os, signal, sys
from pathlib import Path
from support.fakes.device_parts import FakeHolder
from ublkpool.daemon.processes.broker_process import BrokerProcess

class Holder(FakeHolder):
    def hold(self, name, fd):
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    BrokerProcess(Path(sys.argv[1]), Holder()).start()

asyncio.run(main())
"""

_BACKEND = """
import asyncio, os, signal, sys
from pathlib import Path
from ublkpool.daemon.backends.backend_process import BackendProcess
from ublkpool.daemon.settings.config import BackendConfig

def hold(fd):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    backend = BackendProcess("vol", BackendConfig(kind="memory", options={"size": "1M"}), Path(sys.argv[1]), hold)
    backend.start()

asyncio.run(main())
"""


@pytest.mark.parametrize("daemon", [_EXPORTER, _BROKER, _BACKEND], ids=["exporter", "broker", "backend"])
def test_no_child_outlives_a_daemon_that_is_killed_before_the_child_is_on_record(
    daemon: str, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", daemon, str(tmp_path)], stderr=subprocess.DEVNULL, start_new_session=True
    ) as parent:
        assert parent.wait(DEADLINE_S) == -signal.SIGKILL
        until_s = time.monotonic() + DEADLINE_S
        try:
            while left := _of_session(parent.pid):
                assert time.monotonic() < until_s, f"still there: {left}"
                time.sleep(0.02)
        finally:
            for child in _of_session(parent.pid):
                os.kill(child, signal.SIGKILL)


def _of_session(session: int) -> list[int]:
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            fields = (each / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(each.name))
    return found


class ForkedParts(FakeParts):
    """Parts whose team is made of real processes; `on_save` is called at each record."""

    def __init__(self, told: int, on_save: Callable[[Team], None]) -> None:
        super().__init__(DeviceConfig(name="vol"), fake_context())
        self.resources.new_team = self._new_team  # type: ignore[method-assign]
        self.resources.hold_workers = lambda team: None  # type: ignore[method-assign]
        self._told, self._on_save = told, on_save

    def _new_team(self, epoch: int, engine: EngineSpec | None = None) -> Team:
        plan = cast(
            Any,
            SimpleNamespace(
                kernel=OpenKernel(),
                arena=Descriptors(self._told),
                group=None,
                account=None,
                engine=engine,
                template=None,
            ),
        )
        plan.queue_dir, plan.config = Path("/nonexistent/queues"), self.config
        self.team = SpecTeam(plan, epoch, lambda *_: None)
        return self.team

    def save(self) -> None:
        self._on_save(self.team)


class Descriptors:
    """An arena of which only the descriptors are used: the worker writes to them that it goes on."""

    def __init__(self, told: int) -> None:
        self.data_fd = self.control_fd = told


class OpenKernel(FakeKernel):
    """A kernel's device whose node is /dev/null."""

    async def open_char(self) -> int:
        return os.open(os.devnull, os.O_RDWR)


class SpecTeam(Team):
    """A team whose workers need no configuration."""

    def _spec(self, queue: int, cpu: int | None) -> Any:
        return SimpleNamespace(
            queue=SimpleNamespace(queue=queue), cpu=cpu, title="ublkpool-test", descriptors=list
        )

    def _socket(self, queue: int) -> Path:
        return Path("/nonexistent")


def _fake_worker(spec: object, char: int, mapped: object, arena: Any, sock: object, gate: RecordGate) -> int:
    if not gate.passes():
        return EXIT_FAULT
    os.write(arena.data_fd, b"+")
    signal.pause()
    return 0


@pytest.mark.parametrize("is_recorded", [True, False])
def test_workers_fetch_only_once_they_are_on_record(
    is_recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "map_descriptors", lambda *_: None)
    monkeypatch.setattr(forks, "unmap_descriptors", lambda *_: None)
    monkeypatch.setattr(team_module, "restore_queues", lambda *_, **__: None)
    monkeypatch.setattr(forks, "run_worker", _fake_worker)

    async def run() -> None:
        reader, writer = os.pipe()
        saved: list[int] = []

        def on_save(team: Team) -> None:
            saved.append(len(team.workers))
            if team.workers:
                assert team._gate is not None, "it is open before the record"
                if not is_recorded:
                    raise NotRecorded("no room")

        parts = ForkedParts(writer, on_save)
        try:
            if is_recorded:
                await parts.fork(1)
                os.set_blocking(reader, True)
                said = os.read(reader, 1) + os.read(reader, 1)
            else:
                with pytest.raises(NotRecorded):
                    await parts.fork(1)
                said = b""
        finally:
            await parts.team.kill()
            os.close(writer)
        assert saved == [0, 2]
        assert said + os.read(reader, 9) == (b"++" if is_recorded else b"")
        os.close(reader)

    asyncio.run(run())


@pytest.mark.parametrize("opens", [True, False])
def test_a_worker_whose_daemon_ends_before_the_record_ends_without_a_fetch(
    opens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    class Loop:
        def __init__(self, *_: object) -> None:
            ran.append("made")

        def run(self) -> int:
            ran.append("ran")
            return 0

    monkeypatch.setattr(process, "QueueLoop", Loop)
    monkeypatch.setattr(process_calls, "set_io_flusher", lambda: None)
    monkeypatch.setattr(process_calls, "lock_memory", lambda: None)
    gate = RecordGate()
    reader = os.dup(gate.reader)
    (gate.open if opens else gate.close)()
    gate.reader = reader
    spec: Any = SimpleNamespace(queue=SimpleNamespace(queue=0), account=None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        status = run_worker(spec, -1, [None], cast(Any, None), theirs, gate)
    os.close(reader)
    assert (status, ran) == ((0, ["made", "ran"]) if opens else (EXIT_FAULT, ["made"]))


def test_a_gate_leaves_no_descriptor_and_minds_no_dead_process() -> None:
    for end in (lambda gate: gate.open(3), RecordGate.close):
        gate = RecordGate()
        descriptors = (gate.reader, gate._writer)
        end(gate)
        gate.close()
        for each in descriptors:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(each)
