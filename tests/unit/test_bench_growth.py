"""The axes of growth, on a fake daemon."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench import growth as growing
from bench.accounts import Books, Cpu, Memory
from bench.cells import Cell, FioError, FioNumbers
from bench.growth import BLOCKS, DEPTHS, SMALL_POOL_BYTES, grow
from bench.growth_results import Growth
from bench.stage import Disk, Stage

from ublkpool.bufpool.pool.limits import pool_geometry
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import (
    BackendStatus,
    DeviceStats,
    DeviceStatus,
    OpCounts,
    PoolStats,
    QueueStats,
    WorkerStatus,
)


class FakeDaemon:
    """Fake devices, behind the methods of the admin client."""

    def __init__(self) -> None:
        self.configs: dict[str, DeviceConfig] = {}
        self.added: list[DeviceConfig] = []
        self.requests = 0
        self.pid = self.broker_pid = 1

    @property
    def client(self) -> "FakeDaemon":
        return self

    def add(self, config: DeviceConfig, take_over: bool = False) -> DeviceStatus:
        self.configs[config.name] = config
        self.added.append(config)
        return self._status(config)

    def _status(self, config: DeviceConfig) -> DeviceStatus:
        return DeviceStatus(
            name=config.name,
            id=1,
            path=f"/dev/{config.name}",
            state="live",
            size_bytes=1,
            queues=config.queues,
            depth=config.depth,
            need_get_data=True,
            placement="pool",
            recovery="reissue",
            workers=(WorkerStatus(queue=0, pid=1),),
            backend=BackendStatus(kind="null", pid=1, attached=True),
        )

    def devices(self) -> list[DeviceStatus]:
        return [self._status(each) for each in self.configs.values()]

    def delete(self, names: list[str], force: bool = False) -> list[str]:
        for name in names:
            del self.configs[name]
        return names

    def stats(self, name: str) -> DeviceStats:
        pool_bytes = self.configs[name].pool_bytes or 8 << 20
        queue = QueueStats(
            queue=0, requests=OpCounts(write=self.requests), counters={"enters": 2 * self.requests}
        )
        return DeviceStats(name=name, queues=(queue,), pool=PoolStats(size_bytes=pool_bytes))


class FakeStage(Stage):
    """A stage without a daemon process."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), Path("/nowhere"))
        self.fake = FakeDaemon()

    @property
    def daemon(self) -> Any:
        return self.fake


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> FakeStage:
    made = FakeStage()

    def run_fio(disk: Disk, cell: Cell, runtime_s: float) -> tuple[FioNumbers, tuple[Books, Books]]:
        if cell.depth == 1024:
            raise FioError("fio ended with 1")
        made.fake.requests += 1000
        nothing, some = Cpu(0.0, 0.0), Cpu(0.01, 0.03)
        parts = {"worker": some, "backend": nothing, "fio": some}
        return FioNumbers(1000.0, 4e6, 1.0), (
            Books(nothing, dict.fromkeys(parts, nothing), 0, 0, 0, dict.fromkeys(parts, 0)),
            Books(some, parts, 1000, 1000, 900, {"worker": 300, "backend": 200, "fio": 400}),
        )

    monkeypatch.setattr(growing, "run_fio", run_fio)
    monkeypatch.setattr(
        growing, "syscalls_of", lambda disk, cell, runtime_s: {"worker": 0.5, "backend": 0.25}
    )
    monkeypatch.setattr(growing, "memory_of", lambda pid: Memory(200, 100))
    monkeypatch.setattr(growing, "_allow", lambda node, request_bytes: None)
    return made


def _grown(stage: Stage, devices_max: int) -> Growth:
    growth = Growth(kernel="", date="", cpus=2, emulated=True)
    grow(stage, growth, lambda text: None, lambda each: None, devices_max)
    return growth


def test_an_axis_that_fails_is_named_and_the_others_are_measured(stage: FakeStage) -> None:
    growth = _grown(stage, 4)
    assert growth.errors == ["depth: fio ended with 1"]
    found = {axis: [each.at for each in growth.steps if each.axis == axis] for axis in _axes(growth)}
    assert found["depth"] == [each for each in DEPTHS if each < 1024]
    assert found["bytes a request"] == list(BLOCKS)
    assert found["bytes of pool, depth 128"] == [8 << 20, SMALL_POOL_BYTES]
    assert found["devices, I/O on one"] == found["devices, I/O on all"] == [1, 4]


def test_only_selects_axes_by_name(stage: FakeStage) -> None:
    growth = Growth(kernel="", date="", cpus=2, emulated=True)
    grow(stage, growth, lambda text: None, lambda each: None, 4, "pool|bytes")
    assert _axes(growth) == ["bytes a request", "bytes of pool, depth 128"] and not growth.timings


def _axes(growth: Growth) -> list[str]:
    return list(dict.fromkeys(each.axis for each in growth.steps))


def test_cost_is_for_each_request(stage: FakeStage) -> None:
    step = _grown(stage, 1).steps[0]
    assert step.machine_us == pytest.approx(40.0)
    assert step.worker_us == pytest.approx(40.0)
    assert (step.backend_us, step.enters) == (0.0, 2.0)
    assert step.syscalls == {"worker": 0.5, "backend": 0.25}


def test_an_exact_cost_is_by_the_scheduler_and_without_a_second_run(stage: FakeStage) -> None:
    growth = Growth(kernel="", date="", cpus=1, emulated=True, exact=True)
    grow(stage, growth, lambda text: None, lambda each: None, 1, "bytes")
    step = growth.steps[0]
    assert step.worker_us == pytest.approx(300.0)
    assert step.backend_us == pytest.approx(200.0)
    assert step.busy == pytest.approx(0.9)
    assert (step.enters, step.syscalls) == (2.0, {})


def test_an_exact_run_is_short_but_for_many_devices(
    monkeypatch: pytest.MonkeyPatch, stage: FakeStage
) -> None:
    asked: list[float] = []
    run: Callable[..., Any] = vars(growing)["run_fio"]

    def run_fio(disk: Disk, cell: Cell, runtime_s: float) -> Any:
        asked.append(runtime_s)
        return run(disk, cell, runtime_s)

    monkeypatch.setattr(growing, "run_fio", run_fio)
    growth = Growth(kernel="", date="", cpus=1, emulated=True, exact=True)
    grow(stage, growth, lambda text: None, lambda each: None, 16, "devices")
    assert asked == [0.2, 0.2, 0.2, 0.2, 0.2, pytest.approx(0.8)]


def test_all_devices_at_once_are_as_deep_as_one(monkeypatch: pytest.MonkeyPatch, stage: FakeStage) -> None:
    asked: list[tuple[int, int]] = []
    run: Callable[..., Any] = vars(growing)["run_fio"]

    def run_fio(disk: Disk, cell: Cell, runtime_s: float) -> Any:
        asked.append((disk.node.count("/dev/"), cell.depth))
        return run(disk, cell, runtime_s)

    monkeypatch.setattr(growing, "run_fio", run_fio)
    _grown(stage, 16)
    assert asked[-2:] == [(1, 32), (16, 16 * 32)]


def test_a_failure_leaves_no_device(stage: FakeStage) -> None:
    growth = _grown(stage, 16)
    assert stage.fake.configs == {}
    assert len({each.name for each in stage.fake.added}) == len(stage.fake.added)
    assert [each.what for each in growth.timings] == [
        *("devices added: 1", "devices added: 3", "devices added: 12"),
        "devices deleted: 16",
    ]
    assert {(each.devices, each.part, each.processes) for each in growth.idle} >= {
        (16, "worker", 16),
        (16, "broker", 1),
    }


def test_the_small_pool_is_a_valid_pool_size() -> None:
    geometry, _ = pool_geometry(1, 128, 512 << 10, True, "pool", SMALL_POOL_BYTES)
    derived, _ = pool_geometry(1, 128, 512 << 10, True, "pool")
    assert geometry.classes[0].count < derived.classes[0].count / 10
