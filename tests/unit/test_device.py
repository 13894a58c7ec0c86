"""A device's life in order: attach, farewell, recovery, failure, start and takeover, on made-up parts."""

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest

from support.fakes.device_parts import DISK, SIZE_BYTES, FakeKernel, FakeSession, FakeTeam, fake_device, turn
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused, PoolError
from ublkpool.daemon.admin.measure import device_stats
from ublkpool.daemon.backends.managed_backend import ManagedBackend
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device import adoption, teardown
from ublkpool.daemon.device import device as module
from ublkpool.daemon.device.device import IO_TIMEOUT_MS, Device
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.device.recovery import RESTARTS_MAX
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import CannotStart
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.settings.config import DeviceConfig

DEADLINE_S = 60


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(run())


def with_team(team: FakeTeam, **config: object) -> Device:
    """A device that these workers serve."""
    device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES, **config))  # type: ignore[arg-type]
    device.parts.resources.team = team
    return device


# Attach


def test_a_backend_that_dies_at_once_is_taken_leave_of_before_its_successor_is_introduced() -> None:
    """Both wait for the turn while the device is recovered; LOST after the second EXPECT would cut the second."""

    async def run() -> None:
        team = FakeTeam()
        team.kills_at_once = "first"
        device = with_team(team)
        sessions = [FakeSession("first"), FakeSession("second")]
        async with asyncio.TaskGroup() as attaching, device.parts.life.turn:
            for session in sessions:
                attaching.create_task(device.attach(session))
            await turn()
        assert team.heard == ["expect first", "lost", "expect second"]
        assert device.session is sessions[1]

    in_loop(run)


@pytest.mark.parametrize("begun", [False, True])
def test_a_backend_that_ends_before_the_disk_starts_leaves_no_store_behind(begun: bool) -> None:
    async def run() -> None:
        device = fake_device()
        device.parts.resources.team = FakeTeam()
        first = FakeSession("first")
        await device.attach(first)
        if begun:
            device.parts.binding.starting()
        assert device.parts.binding.store is not None
        first.dies()
        await turn()
        assert device.session is None
        assert (device.parts.binding.store is not None) is begun

    in_loop(run)


def test_a_backend_that_cannot_be_introduced_leaves_the_store_before_it_bound() -> None:
    class Broken(FakeTeam):
        async def expect(self, session: Session, fence: bool) -> None:
            raise DaemonError("queue 0: its worker ended")

    async def run() -> None:
        device = fake_device()
        device.parts.resources.team = Broken()
        device.parts.life.state = "live"
        await device.parts.binding.learn(None, SIZE_BYTES, "other", 4)
        await device.rebind()
        with pytest.raises(DaemonError, match="its worker ended"):
            await device.attach(FakeSession("file"))
        assert device.parts.binding.takes_next()
        assert device.parts.binding.store is not None and device.parts.binding.store.kind == "other"

    in_loop(run)


def test_the_successor_of_a_backend_that_is_leaving_waits_for_its_death() -> None:
    """A backend that has closed its connection may still touch the memory that it was given."""

    async def run() -> None:
        team = FakeTeam()
        device = with_team(team)
        first, second = FakeSession("first"), FakeSession("second")
        await device.attach(first)
        with pytest.raises(AttachRefused, match=r"has a backend already \(first, process 1\)"):
            await device.attach(second)
        first.leaving = True
        waiting = asyncio.ensure_future(device.attach(second))
        await turn()
        assert not waiting.done() and team.heard == ["expect first"]
        first.dies()
        await waiting
        assert team.heard == ["expect first", "lost", "expect second"]

    in_loop(run)


def test_workers_that_answer_take_no_backend() -> None:
    async def run() -> None:
        device = with_team(FakeTeam(), answers="worker")
        with pytest.raises(AttachRefused, match=r"^device vol: its workers answer: add it without --answers"):
            await device.attach(FakeSession("null"))

    in_loop(run)


# What clients are told


class FakeManaged(ManagedBackend):
    """The daemon's own backend, process 77, and why it does not serve."""

    pid = 77

    def __init__(self, steps: list[str]) -> None:
        self.said = ""
        self._steps = steps

    @property
    def trouble(self) -> str:
        return self.said

    def serves(self) -> None:
        self.said = ""

    def let_end(self) -> None:
        self._steps.append("not started again")

    async def end(self) -> None:
        self._steps.append("backend ended")


def test_a_device_without_its_backend_says_why_until_one_is_attached() -> None:
    async def run() -> None:
        device, managed = with_team(FakeTeam()), FakeManaged([])
        device.parts.managed = managed
        device.parts.enter("live")
        assert device.status().reason == "no backend is attached, requests wait"
        managed.said = "backend file ended: exit status 2: path=/x: has 4096 bytes"
        assert device.status().reason == f"no backend is attached, requests wait: {managed.said}"
        assert device_stats(device).reason == device.status().reason
        first = FakeSession("file")
        await device.attach(first)
        assert (device.status().reason, device_stats(device).reason) == ("", "")
        first.dies()
        while device.session is not None:
            await asyncio.sleep(0)
        assert device.status().reason == "no backend is attached, requests wait", "an old reason is shown"

    in_loop(run)


def test_why_the_last_backend_was_refused_is_shown_until_one_is_taken() -> None:
    async def run() -> None:
        device = with_team(FakeTeam())
        device.note_refusal("backend file, process 9, was refused: too small")
        assert device.status().reason == "backend file, process 9, was refused: too small"
        device.parts.enter("live")
        assert device.status().reason.endswith(
            "requests wait: backend file, process 9, was refused: too small"
        )
        await device.attach(FakeSession("file"))
        device.note_refusal("backend file, process 10, was refused: the device has a backend")
        assert device.status().reason == ""

    in_loop(run)


# Recovery and failure


class Recoveries:
    """Takes the place of `next_epoch`: the first `failures` attempts fail."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        device: Device,
        failures: int = 0,
        failure: Exception | None = None,
    ) -> None:
        self.reasons: list[str] = []
        """What `list` showed at each attempt."""
        self._device, self._failures = device, failures
        self._failure = failure or DaemonError("the pool broker is gone")
        monkeypatch.setattr(module, "next_epoch", self._next_epoch)
        monkeypatch.setattr(module, "RETRY_PAUSE_S", 0.0)

    async def _next_epoch(self, parts: DeviceParts) -> Team:
        self.reasons.append(self._device.status().reason)
        if len(self.reasons) <= self._failures:
            raise self._failure
        parts.resources.team = FakeTeam(epoch=parts.resources.epoch + 1)
        return parts.resources.team


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM])
def test_a_recovery_waits_for_descriptors_processes_and_memory_however_long(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The disk's requests wait meanwhile; a device that fails instead would lose its disk to a passing shortage."""

    async def run() -> None:
        dead = FakeTeam()
        device = with_team(dead)
        await device._end_start("")
        attempts = 3 * RESTARTS_MAX
        recoveries = Recoveries(monkeypatch, device, attempts, CannotStart("fork", OSError(number, "short")))
        monkeypatch.setattr(module, "SHORTAGE_PAUSE_MAX_S", 0.0)
        await device._recover_or_fail(dead, "queue 0: its worker ended")
        assert device.state == "live" and len(recoveries.reasons) == attempts + 1
        assert "no process for it" in recoveries.reasons[-1], "list does not say what it waits for"

    in_loop(run)


def test_a_recovery_that_waits_for_descriptors_ends_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        dead = FakeTeam()
        device = with_team(dead)
        await device._end_start("")
        recoveries = Recoveries(monkeypatch, device, 1 << 30, OSError(errno.EMFILE, "short"))
        monkeypatch.setattr(module, "SHORTAGE_PAUSE_MAX_S", 0.0)
        monkeypatch.setattr(teardown, "tear_down", no_tear_down)
        recovering = asyncio.ensure_future(device._recover_or_fail(dead, "queue 0: its worker ended"))
        while len(recoveries.reasons) < 2 * RESTARTS_MAX:
            await asyncio.sleep(0)
        device.parts.life.is_stopping = True
        await recovering

    in_loop(run)


@pytest.mark.parametrize("step", ["record", "holder"])
def test_an_attach_of_which_a_step_fails_keeps_no_later_backend_out(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async def run() -> None:
        team = FakeTeam()
        device = with_team(team)
        first, second = FakeSession("first"), FakeSession("second")

        def fails(*_: object) -> None:
            raise OSError(errno.EMFILE, "no descriptor")

        with monkeypatch.context() as patched:
            if step == "record":
                patched.setattr(device.parts, "save", fails)
                with pytest.raises(OSError, match="no descriptor"):
                    await device.attach(first)
                assert team.heard == ["expect first", "lost"], "the workers wait for a refused backend"
            else:
                # By then the backend has its memory: it is attached, and only the next daemon cannot adopt it.
                patched.setattr(device.parts.context.holder, "hold", fails)
                await device.attach(first)
                assert device.session is first
                first.dies()
        await turn()
        await device.attach(second)
        assert device.session is second

    in_loop(run)


def test_a_device_shows_why_it_is_recovered_until_it_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        dead = FakeTeam()
        device = with_team(dead)
        device.parts.backend.session = FakeSession("file")
        await device._end_start("")
        recoveries = Recoveries(monkeypatch, device, failures=1)
        await device._recover_or_fail(dead, "vol: queue 0: its worker ended: killed by SIGKILL")
        assert recoveries.reasons == [
            "queue 0: its worker ended: killed by SIGKILL",
            "the pool broker is gone",
        ]
        assert device.status().reason == ""

    in_loop(run)


def test_a_device_whose_store_another_client_has_taken_is_not_recovered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        dead = FakeTeam()
        device = with_team(dead)
        await device._end_start("")
        recoveries = Recoveries(monkeypatch, device)
        monkeypatch.setattr(teardown, "tear_down", no_tear_down)
        await device._recover_or_fail(dead, "another client has taken it", may_recover=False)
        assert device.state == "failed" and recoveries.reasons == []
        assert device.status().reason == "another client has taken it"

    in_loop(run)


@pytest.mark.parametrize("is_started", [False, True])
def test_a_worker_that_dies_in_the_partition_scan_is_recovered_and_the_start_goes_on(
    is_started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """START_DEV has returned and the disk has not been opened yet; before START_DEV the device fails."""

    states: list[str] = []

    async def run() -> None:
        kernel = FakeKernel()
        kernel.is_started = is_started
        dead = FakeTeam(kernel)
        device = with_team(dead)
        device.parts.resources.kernel = kernel
        device.on_change(lambda: states.append(device.state))
        Recoveries(monkeypatch, device)
        monkeypatch.setattr(teardown, "tear_down", no_tear_down)
        await device._recover_or_fail(dead, "queue 0: its worker ended")
        await device._end_start("")

    in_loop(run)
    assert list(dict.fromkeys(states)) == (["recovering", "waiting", "live"] if is_started else ["failed"])


async def no_tear_down(_parts: DeviceParts, keep: bool) -> None:
    assert keep


def test_a_device_that_fails_ends_its_backend_before_it_waits_for_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """STOP_DEV may wait for a dead worker's requests: no process is to serve or to be started meanwhile."""

    steps: list[str] = []

    class Dying(FakeTeam):
        async def kill(self) -> None:
            steps.append("workers killed")

    class Leaving(FakeSession):
        async def detach(self, reason: str, patience_s: float, keep: bool) -> None:
            assert keep
            steps.append("backend told to leave")

    async def tear_down(_parts: DeviceParts, keep: bool) -> None:
        steps.append("kernel")

    async def run() -> None:
        device = with_team(Dying())
        device.parts.managed = FakeManaged(steps)
        device.parts.backend.session = Leaving()
        monkeypatch.setattr(teardown, "tear_down", tear_down)
        await device._fail("queue 0: its worker ended")

    in_loop(run)
    assert steps == [
        "workers killed",
        "not started again",
        "backend told to leave",
        "backend ended",
        "kernel",
    ]


def test_a_device_that_fails_is_on_record_as_failed_before_its_end_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A daemon that dies meanwhile must not leave a record by which the next one goes on with killed workers."""

    recorded: list[str] = []

    class Dying(FakeTeam):
        async def kill(self) -> None:
            recorded.append("workers killed")

    async def run() -> None:
        device = with_team(Dying())
        device.parts.enter("live")
        device.parts.save = lambda: recorded.append(device.state)  # type: ignore[method-assign]
        monkeypatch.setattr(teardown, "tear_down", no_tear_down)
        await device._fail("queue 0: its worker ended")

    in_loop(run)
    assert recorded == ["failed", "workers killed"]


@pytest.mark.parametrize("recovery", ["reissue", "none"])
def test_the_driver_is_to_notice_a_dead_worker_soon_whatever_the_recovery(recovery: str) -> None:
    """Older drivers notice the end of a worker that holds all of its tags by the block layer's timer alone."""

    async def run() -> None:
        kernel = FakeKernel()
        device = with_team(FakeTeam(kernel), recovery=recovery)
        await device._end_start("")
        while not kernel.io_timeouts_ms:
            await asyncio.sleep(0)
        assert kernel.io_timeouts_ms == [IO_TIMEOUT_MS]

    in_loop(run)


# Start without a backend


def test_a_device_whose_workers_answer_goes_live_without_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """It promises the kernel the disk that was configured, and every operation that costs it nothing."""
    built: list[wire.Attach] = []

    class Started(FakeKernel):
        async def start(self, deadline_s: float, check: Call) -> None:
            """START_DEV succeeds."""

        async def wait_for_node(self) -> None:
            """The node exists."""

    async def build(parts: DeviceParts, attach: wire.Attach, take: object) -> Team:
        built.append(attach)
        parts.resources.team = FakeTeam(Started())
        return parts.resources.team

    async def run() -> None:
        device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES, answers="worker"))
        monkeypatch.setattr(module, "build", build)
        await device.run()
        assert device.state == "live" and device.session is None
        assert device.status().answers == "worker"

    in_loop(run)
    assert built[0].size_bytes == 0 and built[0].discard_max_bytes > 0 and not built[0].volatile_cache


def test_workers_that_answer_and_cannot_start_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def build(*_: object) -> Team:
        raise PoolError("/dev/shm is full")

    async def run() -> None:
        device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES, answers="worker"))
        monkeypatch.setattr(module, "build", build)
        monkeypatch.setattr(teardown, "tear_down", no_tear_down)
        with pytest.raises(DaemonError, match=r"^vol: /dev/shm is full$"):
            await device.run()
        assert device.state == "failed"

    in_loop(run)


# Takeover


async def recover_left(device: Device, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Recover device 3, which an earlier daemon left in epoch 7."""

    class Found(BlockDevice):
        @classmethod
        async def find(cls, *_: object) -> BlockDevice:
            return FakeKernel()

    monkeypatch.setattr(adoption, "BlockDevice", Found)
    monkeypatch.setattr(teardown, "tear_down", no_tear_down)
    return await device.recover_left(Record(config=device.config, device_number=3, disk=DISK, epoch=7), {})


def test_a_left_device_whose_recovery_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        device = fake_device()
        recoveries = Recoveries(monkeypatch, device, failures=2)
        assert await recover_left(device, monkeypatch)
        assert device.state == "live" and len(recoveries.reasons) == 3
        assert device.parts.resources.team is not None and device.parts.resources.team.epoch == 8

    in_loop(run)


def test_a_left_device_that_is_never_recovered_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        device = fake_device()
        recoveries = Recoveries(monkeypatch, device, failures=100)
        assert await recover_left(device, monkeypatch)
        assert device.state == "failed" and len(recoveries.reasons) == RESTARTS_MAX
        assert device.reason == (
            "left by an earlier daemon, and not to be recovered: the pool broker is gone"
        )

    in_loop(run)


def test_a_left_device_gets_no_new_store_before_its_store_is_known() -> None:
    async def run() -> None:
        device = fake_device()
        assert device.describe().may_create
        device.await_takeover(Record(config=device.config, device_number=3))
        assert device.describe().may_create is False
        waiting = fake_device()
        waiting.await_takeover(Record(config=waiting.config))
        assert waiting.describe().may_create

    in_loop(run)
