"""A device service made of dictionaries, behind the real admin server on a real socket, in a thread of its own."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ublkpool.bufpool.errors import BackendError
from ublkpool.daemon.admin.server import AdminServer
from ublkpool.daemon.errors import ConfigError, DaemonError
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.settings.changes import APPLIES, Scalar, changed, shown
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import (
    BackendStatus,
    CopyStats,
    DaemonStatus,
    DeviceStats,
    DeviceStatus,
    OpCounts,
    PoolStats,
    ProcessStatus,
    QueueStats,
    Reloaded,
    ResizeResult,
    Setting,
    State,
    WorkerStatus,
)

_T = TypeVar("_T")
_Names = list[str]
_Bools = list[bool]


class FakeService:
    """A `DeviceService`: a device with a backend is live at once, another when the test sets its state."""

    def __init__(self) -> None:
        self.configs: dict[str, DeviceConfig] = {}
        self.states: dict[str, State] = {}
        self.hold_adds: asyncio.Event | None = None
        self.hold_deletes: asyncio.Event | None = None
        self.adds_cancelled = 0
        self.forced: set[bool] = set()
        self.forgot: _Bools = []
        self.rebound: list[str] = []
        self.waits_cancelled = 0
        self.config_problems: _Names = []
        self.reloaded: Sequence[Reloaded] = []
        self.drains: list[tuple[str, bool, float | None]] = []
        self.resumed: list[str] = []
        self.stopped = False
        self.events = Events()
        self.shutdowns: _Bools = []
        self.take_overs: _Bools = []

    async def add(
        self, cfg: DeviceConfig, progress: Callable[[str], None], take_over: bool = False
    ) -> DeviceStatus:
        progress(f"creating {cfg.name}")
        self.take_overs.append(take_over)
        if self.hold_adds is not None:
            try:
                await self.hold_adds.wait()
            except asyncio.CancelledError:
                self.adds_cancelled += 1
                raise
        if cfg.name in self.configs:
            raise DaemonError(f"{cfg.name}: there is such a device already", code="exists")
        if cfg.backend is not None and "bad" in cfg.backend.options:
            raise BackendError("memory: unknown option bad")
        if cfg.name == "bug":
            raise ZeroDivisionError("by\nzero")
        self.configs[cfg.name] = cfg
        self.states[cfg.name] = "live" if cfg.backend else "waiting"
        return self._status(cfg.name)

    async def delete(self, names: _Names | None, force: bool, *, forget: bool = True) -> _Names:
        if self.hold_deletes is not None:
            await self.hold_deletes.wait()
        self.forced.add(force)
        self.forgot.append(forget)
        names = _Names(self.configs) if names is None else names
        for name in names:
            if name not in self.configs:
                raise DaemonError(f"{name}: no such device", code="no-device")
            del self.configs[name]
        return names

    async def wait_live(self, name: str, timeout_s: float | None) -> DeviceStatus:
        try:
            async with asyncio.timeout(timeout_s):
                while self.states[name] != "live":
                    await asyncio.sleep(0.01)
        except TimeoutError as error:
            raise DaemonError(
                f"{name}: no backend attached within {timeout_s:g} s", code="timeout"
            ) from error
        except asyncio.CancelledError:
            self.waits_cancelled += 1
            raise
        return self._status(name)

    async def rebind(self, name: str) -> None:
        if name not in self.configs:
            raise DaemonError(f"{name}: no such device", code="no-device")
        self.rebound.append(name)

    async def set(self, name: str, values: Mapping[str, Scalar]) -> Sequence[Setting]:
        if name not in self.configs:
            raise DaemonError(f"{name}: no such device", code="no-device")
        added, self.configs[name] = self.configs[name], changed(self.configs[name], values)
        return [
            Setting(key=key, value=shown(self.configs[name], key), configured=shown(added, key), applies=when)
            for key, when in APPLIES.items()
        ]

    async def reload(self) -> Sequence[Reloaded]:
        if self.config_problems:
            raise ConfigError(self.config_problems)
        return self.reloaded

    async def drain(self, name: str, flush: bool, timeout_s: float | None) -> None:
        if name not in self.configs:
            raise DaemonError(f"{name}: no such device", code="no-device")
        self.drains.append((name, flush, timeout_s))

    async def resume(self, name: str) -> None:
        if name not in self.configs:
            raise DaemonError(f"{name}: no such device", code="no-device")
        self.resumed.append(name)

    async def resize(self, name: str, size_bytes: int, is_relative: bool) -> ResizeResult:
        if name not in self.configs:
            raise DaemonError(f"{name}: no such device", code="no-device")
        before = self.configs[name].size_bytes or 0
        after = before + size_bytes if is_relative else size_bytes
        self.configs[name] = msgspec.structs.replace(self.configs[name], size_bytes=after)
        return ResizeResult(before_bytes=before, after_bytes=after)

    def list(self) -> Sequence[DeviceStatus]:
        return [self._status(name) for name in self.configs]

    def stats(self, name: str | None) -> Sequence[DeviceStats]:
        if name is not None and name not in self.configs:
            raise DaemonError(f"{name}: no such device", code="no-device")
        return [_stats(each) for each in self.configs if name in (None, each)]

    def daemon(self) -> DaemonStatus:
        processes = (ProcessStatus(role="supervisor", pid=os.getpid()),)
        return DaemonStatus(version="1.2.3", processes=processes)

    async def stop(self, leave: bool) -> None:
        self.stopped = True

    async def shut_down(self, final: bool) -> None:
        self.shutdowns.append(final)

    def _status(self, name: str) -> DeviceStatus:
        cfg, number = self.configs[name], tuple(self.configs).index(name)
        backend = cfg.backend
        return DeviceStatus(
            name=name,
            id=number,
            path=f"/dev/ublkb{number}",
            state=self.states[name],
            size_bytes=cfg.size_bytes,
            queues=cfg.queues,
            depth=cfg.depth,
            need_get_data=cfg.need_get_data,
            placement=cfg.placement,
            recovery=cfg.recovery,
            flags=("URING_CMD_COMP_IN_TASK",),
            workers=tuple(WorkerStatus(queue=q, pid=100 + q, cpu=q) for q in range(cfg.queues)),
            backend=BackendStatus(kind=backend.kind, pid=99, attached=True) if backend else BackendStatus(),
        )


def _stats(name: str) -> DeviceStats:
    queue = QueueStats(
        queue=0,
        requests=OpCounts(read=3, write=2),
        bytes=OpCounts(read=12288, write=8192),
        copies=CopyStats(kernel_bytes=20480),
        counters={"replayed": 1},
    )
    return DeviceStats(
        name=name, queues=(queue,), pool=PoolStats(size_bytes=1 << 20, buffer_count=8, free_count=8)
    )


class FakeDaemon:
    """The service, the server, and their loop."""

    def __init__(self, run_dir: Path, events: Events | None = None) -> None:
        self.run_dir = run_dir
        self.service = FakeService()
        self.service.events = events or self.service.events
        self.server = AdminServer(self.service, run_dir)
        self.loop = asyncio.new_event_loop()

    def call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the daemon's loop, from the test's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=60)


async def _settle() -> None:
    """Let asyncio make tasks of the connections of clients that have ended.

    Python 3.11 leaves a connection open that it accepts in the turn of the loop in which its server is closed.
    """
    for _ in range(10):
        await asyncio.sleep(0)


@contextmanager
def running_daemon(run_dir: Path, events: Events | None = None) -> Iterator[FakeDaemon]:
    """A fake daemon that answers on `run_dir`, with these events or none."""
    daemon = FakeDaemon(run_dir, events)
    thread = threading.Thread(target=daemon.loop.run_forever)
    thread.start()
    try:
        daemon.call(daemon.server.start())
        yield daemon
        daemon.call(_settle())
        daemon.call(daemon.server.close())
    finally:
        daemon.loop.call_soon_threadsafe(daemon.loop.stop)
        thread.join()
        daemon.loop.close()
