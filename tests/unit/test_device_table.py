"""Requests for one name in any order and at once end with a listed device or with a free name."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from ublkpool.daemon.device import table as device_table
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.device.table import DeviceTable, Show
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.daemon.status import State

DEADLINE_S = 60
SEEDS = 400
NAMES = ("vol0", "vol1")


def managed(name: str) -> DeviceConfig:
    return DeviceConfig(name=name, size_bytes=1 << 20, backend=BackendConfig(kind="memory"))


class World:
    """The kernel's devices: one entry for each that was made and not removed."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.kernel: list[FakeDevice] = []
        self.made: list[FakeDevice] = []
        self.failing = self.hanging = self.in_use = 0.0
        self.changes = 0
        self.table = DeviceTable(self._make, self._changed)

    def _make(self, cfg: DeviceConfig) -> Device:
        device = FakeDevice(cfg, self)
        self.made.append(device)
        return device

    def _changed(self) -> None:
        self.changes += 1

    async def pause(self) -> None:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def check(self) -> None:
        """The list and the kernel have the same devices, but for failed ones."""
        listed = [each for each in self.table.devices() if each.state != "failed"]
        assert sorted(map(id, self.kernel)) == sorted(map(id, listed))


class FakeDevice(Device):
    """A device whose steps take a random number of turns, and some of which fail."""

    def __init__(self, cfg: DeviceConfig, world: World) -> None:
        self._cfg = cfg
        self._state: State = "waiting"
        self._reason = ""
        self.hangs = False
        self.outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._world = world

    @property
    def config(self) -> DeviceConfig:
        return self._cfg

    @property
    def state(self) -> State:
        return self._state

    @property
    def reason(self) -> str:
        return self._reason

    def on_change(self, call: Callable[[], None]) -> None:
        """No observer is called."""

    def note_failure(self, reason: str) -> None:
        self._state, self._reason = "failed", reason

    def await_takeover(self, record: Record) -> None:
        self._state = "recovering"

    async def live(self) -> None:
        await self.outcome

    async def check_unused(self) -> None:
        if await self.describe_use():
            raise DaemonError("its disk is in use")

    async def settled(self) -> None:
        await self._world.pause()

    def save(self) -> None:
        if not self.config.backend:
            self._world.kernel.append(self)

    async def run(self) -> None:
        world = self._world
        await world.pause()
        world.kernel.append(self)
        await world.pause()
        if world.chance(world.failing):
            raise DaemonError("its backend ended")
        if world.chance(world.hanging):
            self.hangs = True
            await asyncio.Event().wait()
        self._state = "live"
        await world.pause()

    async def describe_use(self) -> str:
        await self._world.pause()
        return "mounted" if self._world.chance(self._world.in_use) else ""

    async def delete(self, force: bool, keep: bool = False, forget: bool = False) -> None:
        await self._world.pause()
        if not force and await self.describe_use():
            raise DaemonError("its disk is in use")
        await self._world.pause()
        if self in self._world.kernel:
            self._world.kernel.remove(self)
        await self._world.pause()


def in_loop(test: Callable[[World], Awaitable[None]], seed: int = 0) -> World:
    async def run() -> World:
        world = World(seed)
        await asyncio.wait_for(test(world), DEADLINE_S)
        return world

    return asyncio.run(run())


def nothing(_text: str) -> None:
    """No observer."""


async def _request(world: World) -> None:
    """One client: an add whose client may go, or a del, forced or not."""
    name = world.rng.choice(NAMES)
    await world.pause()
    try:
        if world.chance(0.5):
            cfg = managed(name) if world.chance(0.7) else DeviceConfig(name=name)
            adding = asyncio.ensure_future(world.table.add(cfg, nothing))
            if world.chance(0.3):
                await world.pause()
                adding.cancel()
            await asyncio.wait({adding})
            adding.cancelled() or adding.result()
        else:
            await world.table.delete(name, force=world.chance(0.5))
    except DaemonError:
        # In use, exists already, being deleted, deleted meanwhile, no such device: all are answers.
        pass


@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_any_order_of_requests_leaves_only_devices_that_are_listed(first: int) -> None:
    async def run(world: World) -> None:
        world.failing, world.hanging, world.in_use = world.rng.choice([(0, 0, 0), (0.3, 0.1, 0.3)])
        requests = [asyncio.ensure_future(_request(world)) for _ in range(12)]
        await asyncio.sleep(0)
        # A hanging add is given up by a del, or at the end.
        await asyncio.wait(requests, timeout=0 if world.hanging else None)
        for _ in range(500):
            await asyncio.sleep(0)
        if all(each.done() for each in requests):
            await world.table.settled()
            world.check()
        assert await world.table.delete_all()
        for each in requests:
            await each
        assert world.kernel == [] and list(world.table.devices()) == []

    for seed in range(first, first + 50):
        in_loop(run, seed)


def test_two_callers_that_delete_the_same_device_both_succeed() -> None:
    async def run(world: World) -> None:
        await world.table.add(managed("vol0"), nothing)
        await asyncio.gather(*(world.table.delete("vol0", force=False) for _ in range(3)))
        assert world.kernel == [] and "vol0" not in world.table

    in_loop(run)


def test_a_forced_del_beside_one_that_is_refused_deletes() -> None:
    async def run(world: World) -> None:
        await world.table.add(managed("vol0"), nothing)
        world.in_use = 1.0
        refused, _ = await asyncio.gather(
            world.table.delete("vol0", force=False),
            world.table.delete("vol0", force=True),
            return_exceptions=True,
        )
        assert isinstance(refused, DaemonError) and world.kernel == []

    in_loop(run)


def test_a_del_gives_up_a_hanging_add_whose_client_is_told() -> None:
    async def run(world: World) -> None:
        world.hanging = 1.0
        adding = asyncio.ensure_future(world.table.add(managed("vol0"), nothing))
        while not world.kernel:
            await asyncio.sleep(0)
        await world.table.delete("vol0", force=False)
        assert world.kernel == [] and "vol0" not in world.table
        with pytest.raises(DaemonError, match="vol0: deleted while it was being added"):
            await adding

    in_loop(run)


def test_an_add_whose_client_has_gone_is_undone() -> None:
    async def run(world: World) -> None:
        world.hanging = 1.0
        adding = asyncio.ensure_future(world.table.add(managed("vol0"), nothing))
        while not world.kernel:
            await asyncio.sleep(0)
        adding.cancel()
        await asyncio.wait({adding})
        await world.table.settled()
        assert world.kernel == [] and "vol0" not in world.table

    in_loop(run)


def test_the_name_is_held_while_its_device_is_removed() -> None:
    async def run(world: World) -> None:
        await world.table.add(managed("vol0"), nothing)
        going = asyncio.Event()

        async def delete(force: bool, keep: bool = False, forget: bool = False) -> None:
            await going.wait()
            world.kernel.clear()

        world.made[0].delete = delete  # type: ignore[method-assign]
        deleting = asyncio.ensure_future(world.table.delete("vol0", force=False))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(DaemonError, match="vol0 is being deleted: try again"):
            await world.table.add(managed("vol0"), nothing)
        going.set()
        await deleting
        await world.table.add(managed("vol0"), nothing)
        assert world.kernel == [world.made[-1]]

    in_loop(run)


def test_a_failed_device_is_listed_with_its_reason_if_it_cannot_be_made_again() -> None:
    async def run(world: World) -> None:
        await world.table.add(managed("vol0"), nothing)
        world.kernel.clear()
        world.made[0].note_failure("five workers died")
        world.failing = 1.0
        with pytest.raises(DaemonError, match="its backend ended"):
            await world.table.add(managed("vol0"), nothing)
        assert world.table.device("vol0") is world.made[0]
        world.failing, world.hanging = 0.0, 1.0
        adding = asyncio.ensure_future(world.table.add(managed("vol0"), nothing))
        while not world.kernel:
            await asyncio.sleep(0)
        await world.table.delete("vol0", force=False)
        assert world.kernel == [] and "vol0" not in world.table, "a del removes the failed one as well"
        await asyncio.wait({adding})

    in_loop(run)


def test_a_configured_device_that_cannot_start_is_listed_with_its_reason_and_can_be_made_again() -> None:
    async def run(world: World) -> None:
        world.failing = 1.0
        world.table.add_configured(managed("vol0"), nothing)
        await world.table.settled()
        device = world.table.device("vol0")
        assert (device.state, device.reason) == ("failed", "its backend ended") and world.kernel == []
        world.failing = 0.0
        await world.table.add(managed("vol0"), nothing)
        assert world.table.device("vol0").state == "live"

    in_loop(run)


def test_a_hanging_device_delays_neither_the_others_nor_the_end() -> None:
    async def run(world: World) -> None:
        world.hanging = 1.0
        world.table.add_configured(managed("vol0"), nothing)
        while not (world.made and world.made[0].hangs):
            await asyncio.sleep(0)
        world.hanging = 0.0
        world.table.add_configured(managed("vol1"), nothing)
        while world.table.device("vol1").state != "live":
            await asyncio.sleep(0)
        assert world.table.device("vol0").state == "waiting"
        world.table.close()
        with pytest.raises(DaemonError, match="the daemon is stopping"):
            await world.table.add(managed("vol2"), nothing)
        assert await world.table.delete_all()
        assert world.kernel == []

    in_loop(run)


def test_a_device_that_cannot_be_removed_at_the_end_delays_no_other_and_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeouts: dict[float | None, list[asyncio.Timeout]] = {}
    make_timeout = asyncio.timeout

    def timeout(delay_s: float | None) -> asyncio.Timeout:
        made = make_timeout(delay_s)
        timeouts.setdefault(delay_s, []).append(made)
        return made

    async def run(world: World) -> None:
        for name in NAMES:
            await world.table.add(managed(name), nothing)
        monkeypatch.setattr(asyncio, "timeout", timeout)

        async def hang(force: bool, keep: bool = False, forget: bool = False) -> None:
            while len(world.kernel) > 1:
                await asyncio.sleep(0)
            for first in timeouts.get(device_table.DELETE_DEADLINE_S, [])[:1]:
                first.reschedule(asyncio.get_running_loop().time())
            await asyncio.Event().wait()

        world.made[0].delete = hang  # type: ignore[method-assign]
        assert not await world.table.delete_all()
        assert world.kernel == [world.made[0]]

    in_loop(run)


def test_as_many_devices_are_removed_at_the_same_time_as_may_have_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_table, "DELETED_AT_ONCE_MAX", 3)
    running: list[str] = []
    most: list[int] = []

    async def run(world: World) -> None:
        for number in range(10):
            await world.table.add(managed(f"many{number}"), nothing)
        for device in world.made:
            really = device.delete

            async def delete(
                force: bool,
                keep: bool = False,
                forget: bool = False,
                really: Callable[..., Awaitable[None]] = really,
            ) -> None:
                running.append("")
                most.append(len(running))
                for _ in range(10):
                    await asyncio.sleep(0)
                running.pop()
                await really(force, keep, forget)

            device.delete = delete  # type: ignore[method-assign]
        assert await world.table.delete_all()
        assert world.kernel == [] and max(most) == 3 and len(most) == 10

    in_loop(run)


def test_a_wait_for_a_device_survives_its_replacement_by_a_takeover() -> None:
    async def run(world: World) -> None:
        second = FakeDevice(managed("vol0"), world)

        async def work(show: Show) -> bool:
            await asyncio.sleep(0)
            world.made[0].outcome.set_exception(DaemonError("the device is being deleted"))
            show(second)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            second.outcome.set_result(None)
            return True

        world.table.take_over(Record(config=managed("vol0"), device_number=3), work)
        assert await world.table.live("vol0") is second

    in_loop(run)


def test_a_device_that_cannot_be_taken_over_is_listed_with_its_reason() -> None:
    async def run(world: World) -> None:
        async def work(_show: Show) -> bool:
            raise DaemonError("vol0: GET_DEV_INFO has hung")

        await world.table.take_over(Record(config=managed("vol0"), device_number=3), work)
        device = world.table.device("vol0")
        assert device.state == "failed"
        assert device.reason == "left by an earlier daemon: GET_DEV_INFO has hung"

    in_loop(run)


def test_a_del_that_is_refused_gives_up_no_takeover() -> None:
    async def run(world: World) -> None:
        recovered = asyncio.Event()

        async def work(_show: Show) -> bool:
            await recovered.wait()
            return True

        making = world.table.take_over(Record(config=managed("vol0"), device_number=3), work)
        world.in_use = 1.0
        with pytest.raises(DaemonError, match="in use"):
            await world.table.delete("vol0", force=False)
        assert not making.done()
        recovered.set()
        await making
        assert world.table.device("vol0").state == "recovering"

    in_loop(run)


def test_a_del_that_is_refused_after_it_gave_up_a_takeover_leaves_a_failed_device_in_the_list() -> None:
    async def run(world: World) -> None:
        async def work(_show: Show) -> bool:
            await asyncio.Event().wait()
            return True

        making = world.table.take_over(Record(config=managed("vol0"), device_number=3), work)
        await asyncio.sleep(0)
        device = world.made[0]

        async def delete(force: bool, keep: bool = False, forget: bool = False) -> None:
            raise DaemonError("its disk is in use since a moment ago")

        device.delete = delete  # type: ignore[method-assign]
        with pytest.raises(DaemonError, match="in use"):
            await world.table.delete("vol0", force=False)
        assert making.cancelled() and device.state == "failed" and "given up" in device.reason

    in_loop(run)


@pytest.mark.parametrize("is_configured", [False, True])
def test_a_failed_device_that_is_still_in_the_kernel_is_replaced_only_when_it_is_gone(
    is_configured: bool,
) -> None:
    async def run(world: World) -> None:
        await world.table.add(managed("vol0"), nothing)
        world.made[0].note_failure("DEL_DEV has hung for 60 s")
        world.in_use = 1.0
        if is_configured:
            world.table.add_configured(managed("vol0"), nothing)
            await world.table.settled()
        else:
            with pytest.raises(DaemonError, match="vol0: the failed device of this name is still there"):
                await world.table.add(managed("vol0"), nothing)
        assert world.kernel == [world.made[0]]
        assert world.table.device("vol0") is world.made[0], "nothing of its successor was made"
        world.in_use = 0.0
        await world.table.add(managed("vol0"), nothing)
        assert world.kernel == [world.made[-1]]

    in_loop(run)


def test_an_add_that_is_given_up_before_its_first_step_leaves_the_failed_device() -> None:
    async def run(world: World) -> None:
        await world.table.add(managed("vol0"), nothing)
        world.made[0].note_failure("DEL_DEV has hung for 60 s")
        world.table.add_configured(managed("vol0"), nothing)
        world.table.close()
        await world.table.settled()
        assert world.kernel == [world.made[0]]
        assert world.table.device("vol0") is world.made[0]

    in_loop(run)
