"""The budget of memory, `memory_max`: what counts, what it refuses, and that it never touches a device that exists."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fakes.device_parts import SIZE_BYTES, FakeSession, FakeTeam, fake_device
from support.served import Client, serving
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.bufpool.pool.arena import Arena, arena_prefix, list_orphans
from ublkpool.bufpool.pool.limits import pool_geometry
from ublkpool.daemon.admin.wire import (
    AddRequest,
    DaemonRequest,
    DeleteRequest,
    ListRequest,
    ReloadRequest,
    StatsRequest,
)
from ublkpool.daemon.device import memory
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.memory import WAY_OUT, Made, MemoryBudget, memory_of
from ublkpool.daemon.device.records import Record, Records
from ublkpool.daemon.doctor.daemon import DaemonAnswer, daemon_findings
from ublkpool.daemon.errors import STATUS_FAILED, ConfigError, DaemonError
from ublkpool.daemon.metrics.families import FAMILIES
from ublkpool.daemon.metrics.source import Snapshot
from ublkpool.daemon.settings.config import DeviceConfig, ServeConfig
from ublkpool.daemon.settings.config_file import load_config
from ublkpool.daemon.status import DaemonStatus
from ublkpool.ublk.queue import Port
from unit.test_device_table import World, managed, nothing

MIB = 1 << 20
DEADLINE_S = 60
ONE_BYTES = memory_of(managed("vol0"), 0)
"""What a device of the default config needs."""


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))


class Sized:
    """A device with this much memory."""

    def __init__(self, name: str, memory_bytes: int) -> None:
        self.name, self.memory_bytes = name, memory_bytes


# What counts


def test_without_a_budget_nothing_is_computed_for_an_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda *_: pytest.fail("there is no budget"))
    assert MemoryBudget().refusal_of(managed("vol0")) == ""


@pytest.mark.parametrize("queues", [1, 2])
def test_what_counts_is_what_is_allocated(queues: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "queues_max", lambda: 64)
    config = DeviceConfig(name="vol", queues=queues, depth=4, max_io_bytes=64 << 10)
    geometry, reserve = pool_geometry(queues, 4, 64 << 10, True, "pool")
    instance = f"memory-max-{os.getpid()}"
    with Arena.create(arena_prefix(instance, 0), geometry, queues, 0, reserve) as arena:
        arena.unlink()
        pool_bytes = sum(os.fstat(fd).st_size for fd in (arena.data_fd, arena.control_fd))
    assert list_orphans(instance) == []
    port = Port(4)
    rings_bytes = os.fstat(port.memory_fd).st_size
    port.close()
    scratch_bytes = 64 << 10
    expected = pool_bytes + queues * (rings_bytes + scratch_bytes)
    assert memory_of(config, 0) == memory_of(config, 0, Made(geometry, queues)) == expected
    assert memory_of(config, MIB) == expected + MIB
    without_rings = msgspec.structs.replace(config, rings=False)
    assert memory_of(without_rings, 0) == expected - queues * rings_bytes


def test_more_queues_than_cpus_are_not_made_and_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    possible = tmp_path / "possible"
    monkeypatch.setattr(memory, "POSSIBLE_CPUS", possible)
    many = DeviceConfig(name="vol", queues=64)
    for text, queues in (("0", 1), ("0-3\n", 4), ("0-1,4-7\n", 8)):
        possible.write_text(text)
        assert memory_of(many, 0) == memory_of(DeviceConfig(name="vol", queues=queues), 0)
    possible.unlink()
    assert memory_of(many, 0) > 8 * memory_of(DeviceConfig(name="vol", queues=4), 0)


def test_a_config_of_which_no_pool_can_be_made_is_refused_by_that_and_not_by_the_budget() -> None:
    impossible = DeviceConfig(name="vol", pool_bytes=512 << 10)
    assert memory_of(impossible, 0) == 0
    assert MemoryBudget(1).refusal_of(impossible) == ""


def test_a_device_counts_its_slices_and_the_segment_of_its_backend() -> None:
    async def run() -> None:
        device = fake_device(DeviceConfig(name="vol", client_buffers_bytes=MIB))
        plain = memory_of(device.config, 0)
        assert device.memory_bytes == plain + MIB
        # Its driver does not support them, so none were made.
        device.parts.resources.team = FakeTeam()
        assert device.memory_bytes == plain
        device.parts.resources.segment_bytes = 3 * MIB
        assert device.memory_bytes == device.status().memory_bytes == plain + 3 * MIB
        device.parts.life.state = "failed"
        assert device.memory_bytes == 0

    in_loop(run)


# What is refused


@pytest.mark.parametrize(("max_bytes", "is_refused"), [(0, False), (12 * MIB, False), (12 * MIB - 1, True)])
def test_the_refusal_has_the_figures_and_the_way_out(max_bytes: int, is_refused: bool) -> None:
    budget = MemoryBudget(max_bytes, lambda: [Sized("a", 4 * MIB), Sized("b", 6 * MIB)])
    assert budget.used_bytes == 10 * MIB
    assert budget.refusal("c", 2 * MIB) == (
        "it needs 2.0 MiB of memory, and 10.0 MiB of the 12.0 MiB of memory_max are in use: " + WAY_OUT
        if is_refused
        else ""
    )
    # A device that replaces a failed one of its name does not count twice.
    assert budget.refusal("a", 4 * MIB) == ""


def with_budget(max_bytes: int, seed: int = 0) -> World:
    """Devices of which each takes what its config says, also when a fake makes it."""
    world = World(seed)
    budget = MemoryBudget(max_bytes)
    world.table._refusal = budget.refusal_of
    budget.devices = lambda: [
        Sized(each.config.name, memory_of(each.config, 0) if each.state != "failed" else 0)
        for each in world.table.devices()
    ]
    return world


def test_an_add_above_the_budget_makes_nothing_and_the_name_stays_free() -> None:
    async def run() -> None:
        world = with_budget(2 * ONE_BYTES - 1)
        await world.table.add(managed("vol0"), nothing)
        with pytest.raises(
            DaemonError, match=r"^vol1: it needs .* of memory_max are in use: lower"
        ) as refused:
            await world.table.add(managed("vol1"), nothing)
        assert refused.value.status == STATUS_FAILED
        assert len(world.made) == 1 and "vol1" not in world.table
        with pytest.raises(DaemonError, match="exists already"):
            await world.table.add(managed("vol0"), nothing)
        await world.table.delete("vol0", force=False)
        await world.table.add(managed("vol1"), nothing)
        assert world.table.device("vol1").state == "live"

    in_loop(run)


def test_of_two_adds_at_once_the_first_gets_the_memory() -> None:
    async def run() -> None:
        world = with_budget(ONE_BYTES)
        adds = (world.table.add(managed(name), nothing) for name in ("vol0", "vol1"))
        first, second = await asyncio.gather(*adds, return_exceptions=True)
        assert isinstance(first, Device) and isinstance(second, DaemonError)

    in_loop(run)


def test_a_device_of_the_config_that_is_refused_is_listed_with_the_reason_and_can_be_added_later() -> None:
    async def run() -> None:
        world = with_budget(ONE_BYTES)
        for name in ("vol0", "vol1"):
            world.table.add_configured(managed(name), nothing)
        await world.table.settled()
        refused = world.table.device("vol1")
        assert world.table.device("vol0").state == "live" and refused.state == "failed"
        assert refused.reason.startswith("it needs ")
        await world.table.delete("vol0", force=False)
        await world.table.add(managed("vol2"), nothing)
        refused.note_failure("figures of another time")
        assert "memory_max" in world.table.add_configured(managed("vol1"), nothing)
        assert world.table.device("vol1") is refused and refused.reason.startswith("it needs ")
        await world.table.delete("vol2", force=False)
        assert world.table.add_configured(managed("vol1"), nothing) == ""
        await world.table.settled()
        assert world.table.device("vol1").state == "live"

    in_loop(run)


def test_a_device_that_was_there_under_the_daemon_before_is_made_whatever_the_budget_is() -> None:
    async def run() -> None:
        world = with_budget(ONE_BYTES)
        await world.table.add(managed("vol0"), nothing)
        assert world.table.add_configured(managed("vol1"), nothing, was_there=True) == ""
        await world.table.settled()
        assert world.table.device("vol1").state == "live"

    in_loop(run)


def test_a_device_that_could_not_be_taken_over_still_has_its_memory() -> None:
    async def run() -> None:
        device = fake_device()
        needed_bytes = device.memory_bytes
        device.await_takeover(Record(config=device.config))
        device.note_failure("left by an earlier daemon")
        assert device.state == "failed" and device.memory_bytes == needed_bytes > 0

    in_loop(run)


def test_a_refused_device_of_the_config_is_made_by_a_later_try() -> None:
    async def run() -> None:
        world = with_budget(ONE_BYTES)
        for name in ("vol0", "vol1"):
            world.table.add_configured(managed(name), nothing)
        await world.table.settled()
        await world.table.delete("vol0", force=False)
        world.table.add_configured(managed("vol1"), nothing)
        await world.table.settled()
        assert world.table.device("vol1").state == "live"

    in_loop(run)


@pytest.mark.parametrize("first", range(0, 100, 50))
def test_no_order_of_requests_makes_devices_above_the_budget(first: int) -> None:
    async def run(seed: int) -> None:
        world = with_budget(2 * ONE_BYTES, seed)
        world.failing = world.rng.choice([0, 0.3])
        names = [f"vol{number}" for number in range(4)]
        refused = 0

        async def request() -> None:
            nonlocal refused
            await world.pause()
            name = world.rng.choice(names)
            try:
                if world.chance(0.6):
                    await world.table.add(managed(name), nothing)
                else:
                    await world.table.delete(name, force=True)
            except DaemonError as error:
                refused += "memory_max" in str(error)
            assert len([each for each in world.table.devices() if each.state != "failed"]) <= 2
            assert len(world.kernel) <= 2

        for _ in range(3):
            await asyncio.gather(*(request() for _ in range(8)))
        assert await world.table.delete_all()
        refusals.append(refused)

    refusals: list[int] = []
    for seed in range(first, first + 50):
        asyncio.run(asyncio.wait_for(run(seed), DEADLINE_S))
    assert sum(refusals) > 50


# The backend's segment


def segmented(size_bytes: int) -> FakeSession:
    session = FakeSession("file")
    session.attach = wire.Attach(v=1, device="vol", kind="file", segment_bytes=size_bytes)
    return session


def test_a_segment_that_has_no_room_is_refused_before_the_device_is_made_and_bound() -> None:
    async def run() -> None:
        device = fake_device()
        budget = device.parts.context.budget
        budget.max_bytes, budget.devices = device.memory_bytes + MIB, lambda: [device]
        with pytest.raises(AttachRefused, match=r"^with its backend's segment of 2\.0 MiB it needs .* MiB"):
            await device.attach(segmented(2 * MIB))
        assert device.parts.binding.store is None and device.parts.resources.kernel is None
        assert device.parts.resources.segment_bytes == 0 and device.state == "waiting"

    in_loop(run)


def test_the_successor_of_a_backend_is_never_refused_for_the_budget() -> None:
    async def run() -> None:
        device = fake_device()
        device.parts.resources.team = FakeTeam()
        budget = device.parts.context.budget
        budget.max_bytes, budget.devices = 1, lambda: [device]
        before_bytes = device.memory_bytes
        await device.attach(segmented(2 * MIB))
        assert device.session is not None
        assert device.memory_bytes == before_bytes + 2 * MIB and budget.excess

    in_loop(run)


def test_the_segment_of_a_backend_that_is_refused_for_another_reason_does_not_count() -> None:
    async def run() -> None:
        device = fake_device()

        async def bind(*_: object) -> int:
            raise DaemonError("the state directory is full")

        device._bind = bind  # type: ignore[assignment, method-assign]
        with pytest.raises(DaemonError, match="is full"):
            await device.attach(segmented(2 * MIB))
        assert device.parts.resources.segment_bytes == 0

    in_loop(run)


def test_the_segment_of_a_successor_that_the_workers_cannot_be_told_of_does_not_count() -> None:
    async def run() -> None:
        device = fake_device()
        device.parts.resources.team = FakeTeam()

        async def introduce_next(*_: object) -> None:
            raise DaemonError("a worker has just died")

        device._introduce_next = introduce_next  # type: ignore[assignment, method-assign]
        with pytest.raises(DaemonError, match="just died"):
            await device.attach(segmented(2 * MIB))
        assert device.parts.resources.segment_bytes == 0

    in_loop(run)


# The daemon

CONFIG = """
[daemon]
run_dir = "{run}"
state_dir = "{state}"
memory_max = {max}

[[device]]
name = "vol0"
size = "1M"
"""


def written(directory: Path, max_bytes: int, more: str = "") -> Path:
    path = directory / "ublkpool.toml"
    path.write_text(CONFIG.format(run=directory / "run", state=directory / "state", max=max_bytes) + more)
    return path


def added(name: str) -> AddRequest:
    return AddRequest(device=DeviceConfig(name=name, size_bytes=SIZE_BYTES))


def test_a_daemon_refuses_what_its_file_does_not_allow_and_a_reload_changes_that(tmp_path: Path) -> None:
    async def test(client: Client) -> None:
        with pytest.raises(DaemonError, match=r"vol1: it needs .* of memory_max are"):
            await client.ask(added("vol1"))
        assert await client.states() == {"vol0": "waiting"}
        told = await client.ask(DaemonRequest())
        assert (told["memory_bytes"], told["memory_max_bytes"]) == (ONE_BYTES, ONE_BYTES)
        for request in (ListRequest(), StatsRequest()):
            assert [each["memory_bytes"] for each in await client.ask(request)] == [ONE_BYTES]
        written(tmp_path, 2 * ONE_BYTES, '[[device]]\nname = "vol2"\nsize = "1M"\n')
        (vol0, vol2, daemon) = await client.ask(ReloadRequest())
        assert vol0["needs"] == "" and vol2["done"] == "is being added"
        assert daemon == {"name": "daemon", "done": f"set memory_max to {2 * ONE_BYTES}", "needs": ""}
        assert (await client.ask(ReloadRequest()))[2:] == []
        written(tmp_path, 1)
        lowered = (await client.ask(ReloadRequest()))[-1]
        assert "memory_max is 0.0 MiB: they are served, and no device is added" in lowered["needs"]
        assert await client.states() == {"vol0": "waiting", "vol2": "waiting"}
        await client.ask(DeleteRequest(names=["vol2"]))
        with pytest.raises(DaemonError, match="memory_max"):
            await client.ask(added("vol2"))
        written(tmp_path, 0)
        await client.ask(ReloadRequest())
        await client.ask(added("vol2"))

    serving(load_config(written(tmp_path, ONE_BYTES)), test)


@pytest.mark.parametrize("are_configured", [False, True])
def test_a_daemon_serves_devices_above_its_budget_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, are_configured: bool
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir(0o700)
    devices = [DeviceConfig(name=name, size_bytes=SIZE_BYTES) for name in ("vol0", "vol1")]
    for each in devices:
        # An earlier daemon was killed while these waited for their backends.
        Records(run_dir / "devices").save(Record(config=each))

    async def test(client: Client) -> None:
        while await client.states() != {"vol0": "waiting", "vol1": "waiting"}:
            await asyncio.sleep(0.01)
        if not are_configured:
            # Those of the config are made anew after the takeover, of which this is the end.
            while "memory_max is" not in caplog.text:
                await asyncio.sleep(0.01)
        with pytest.raises(DaemonError, match="vol2: it needs "):
            await client.ask(added("vol2"))

    config = ServeConfig(
        run_dir=run_dir,
        state_dir=tmp_path / "state",
        memory_max_bytes=ONE_BYTES,
        devices=tuple(devices) if are_configured else (),
    )
    serving(config, test)


def test_the_key_is_a_size_and_zero_is_no_budget(tmp_path: Path) -> None:
    def load(value: str) -> int:
        path = tmp_path / "some.toml"
        path.write_text(f"[daemon]\nmemory_max = {value}\n")
        return load_config(path).memory_max_bytes

    assert (load('"2G"'), load("4096"), load("0")) == (2 << 30, 4096, 0)
    for wrong in ("-1", '"much"', "true"):
        with pytest.raises(ConfigError, match=r"daemon\.memory_max: "):
            load(wrong)


def answer(used_bytes: int, max_bytes: int) -> DaemonAnswer:
    return DaemonAnswer("answers", 1, memory_bytes=used_bytes, memory_max_bytes=max_bytes)


@pytest.mark.parametrize(
    ("used_bytes", "level", "words"),
    [
        (90 * MIB, "ok", "the devices have 90.0 MiB of memory, of 100.0 MiB (memory_max)"),
        (91 * MIB, "warn", "little is left"),
        (100 * MIB + 1, "warn", "all are served, and no device is added"),
    ],
)
def test_the_doctor_says_how_much_of_the_budget_is_in_use(
    tmp_path: Path, used_bytes: int, level: str, words: str
) -> None:
    found: list[Any] = daemon_findings(tmp_path, answer(used_bytes, 100 * MIB))
    assert (found[-1].level, bool(found[-1].way_out)) == (level, level != "ok")
    assert words in found[-1].says
    assert len(daemon_findings(tmp_path, answer(used_bytes, 0))) == len(found) - 1


def test_metrics_have_the_memory_in_use_and_the_budget_if_there_is_one() -> None:
    def values(name: str, max_bytes: int) -> list[object]:
        status = DaemonStatus(version="1", memory_bytes=5, memory_max_bytes=max_bytes)
        (family,) = (each for each in FAMILIES if each.name == name)
        return [value for _, value in family.read(Snapshot(True, 0.0, daemon=status))]

    assert values("ublkpool_memory_bytes", 0) == [5]
    assert (values("ublkpool_memory_max_bytes", 9), values("ublkpool_memory_max_bytes", 0)) == ([9], [])
