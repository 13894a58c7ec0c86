"""Draining a device and resuming it, step by step, on made-up parts: each refusal, each failure, each order."""

import asyncio
import errno
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from support.fakes.device_parts import (
    SIZE_BYTES,
    FakeChild,
    FakeSession,
    FakeTeam,
    FakeWorkerProcess,
    fake_context,
    fake_device,
    turn,
)
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.daemon.backends.managed_backend import ManagedBackend
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.drain import cancel
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.records import NotRecorded, Record
from ublkpool.daemon.device.table import Show
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.left_behind import Process
from ublkpool.daemon.settings.config import DeviceConfig, Recovery
from ublkpool.daemon.supervisor import Supervisor
from ublkpool.workers import messages
from ublkpool.workers.record_gate import RecordGate

DEADLINE_S = 60
CACHED = Disk(size_bytes=SIZE_BYTES, block_bytes=512, volatile_cache=True, read_only=False)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(run())


class HeldTeam(FakeTeam):
    """Workers that note what they are told; they are quiet once the test says so, or end."""

    def __init__(self, steps: list[str], quiet: bool = True) -> None:
        super().__init__()
        self.steps, self.heard = steps, steps
        self.result = 0
        self.knows = True
        self.is_quiet = asyncio.Event()
        if quiet:
            self.is_quiet.set()

    @property
    def can_hold(self) -> bool:
        return self.knows

    async def hold(self, on: bool, gate: RecordGate | None = None) -> None:
        if self._has_ended:
            raise DaemonError("queue 0: its worker ended")
        assert (gate is not None) == on, "a hold on its way ends with its daemon"
        self.steps.append(f"hold {on}")

    async def release(self) -> None:
        self.steps.append("release")

    async def quiet(self) -> None:
        await self.is_quiet.wait()
        if self._has_ended:
            raise DaemonError("queue 0: its worker ended")

    async def flush(self) -> int:
        self.steps.append("flush")
        return self.result

    def ends(self) -> None:
        super().ends()
        self.is_quiet.set()


class LeavingSession(FakeSession):
    """A backend that ends when it is told to."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self._steps = steps

    async def detach(self, reason: str, patience_s: float, keep: bool) -> None:
        self._steps.append(f"detach, keep {keep}")
        self.dies()


class SlowSession(LeavingSession):
    """A backend that was told to leave, and writes to its store until the test says that it is dead."""

    async def detach(self, reason: str, patience_s: float, keep: bool) -> None:
        self._steps.append(f"detach, keep {keep}")
        await self.gone()


class FakeManaged(ManagedBackend):
    """The daemon's own backend, which does nothing but note it."""

    def __init__(self, steps: list[str]) -> None:
        self._steps = steps

    def adopt_to_end(self, left: Process | None, stderr: int | None) -> None:
        """Its process was the earlier daemon's."""

    def let_end(self) -> None:
        self._steps.append("not started again")

    async def end(self) -> None:
        self._steps.append("process ended")

    def start(self) -> None:
        self._steps.append("started")

    @property
    def pid(self) -> int | None:
        return None

    @property
    def trouble(self) -> str:
        return ""

    def serves(self) -> None:
        """It attached."""


class Scene:
    """A live device with workers and a backend, and what becomes of them in order."""

    def __init__(self, managed: bool = False, attached: bool = True, quiet: bool = True) -> None:
        self.steps: list[str] = []
        self.attached = attached
        self.device: Device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES))
        self.parts = self.device.parts
        self.team = HeldTeam(self.steps, quiet)
        self.parts.resources.team = self.team
        self.parts.resources.disk = CACHED
        self.parts.save = self._save  # type: ignore[method-assign]
        if managed:
            self.parts.managed = FakeManaged(self.steps)

    def _save(self) -> None:
        gate = ", gate closed" if self.parts.resources.hold_gate is not None else ""
        self.steps.append(f"record {self.parts.drain or 'no drain'}{gate}")

    async def begin(self) -> "Scene":
        self.parts.life.state = "live"
        if self.attached:
            await self.device.attach(LeavingSession(self.steps))
        self.steps.clear()
        return self


def test_a_device_is_drained_in_an_order_that_any_death_may_interrupt() -> None:
    async def run() -> None:
        scene = await Scene(managed=True).begin()
        await scene.device.drain(True, None)
        assert scene.steps == [
            "hold True",
            "flush",
            "record drained, gate closed",
            "record drained",
            "not started again",
            "detach, keep True",
            "lost",
            "process ended",
        ]
        assert scene.device.session is None and scene.parts.resources.holds
        status = scene.device.status()
        assert (status.state, status.drain, status.backend.pid) == ("live", "drained", None)
        assert status.reason == "drained: requests wait for: ublkpool resume vol"

    in_loop(run)


def test_a_drained_device_takes_no_backend_until_it_is_resumed() -> None:
    async def run() -> None:
        scene = await Scene(managed=True).begin()
        await scene.device.drain(True, None)
        await scene.device.drain(True, None)
        with pytest.raises(AttachRefused, match=r"^device vol is drained: ublkpool resume vol first$"):
            await scene.device.attach(FakeSession())
        scene.steps.clear()
        await scene.device.resume()
        assert scene.steps == ["record no drain", "release", "started"]
        await scene.device.attach(FakeSession())
        assert scene.device.status().drain == "" and not scene.parts.resources.holds

    in_loop(run)


def test_a_disk_that_caches_nothing_and_a_caller_that_wants_none_need_no_flush() -> None:
    async def run() -> None:
        for flush, disk in ((False, CACHED), (True, msgspec.structs.replace(CACHED, volatile_cache=False))):
            scene = await Scene().begin()
            scene.parts.resources.disk = disk
            await scene.device.drain(flush, None)
            assert "flush" not in scene.steps and scene.parts.drain == "drained"

    in_loop(run)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (-errno.EIO, "vol: not drained: its backend answered the FLUSH with Input/output error"),
        (-errno.ENOTCONN, "vol: not drained: its backend ended before it confirmed a FLUSH; try again"),
    ],
)
def test_a_device_whose_store_may_not_be_whole_goes_on(result: int, reason: str) -> None:
    async def run() -> None:
        scene = await Scene().begin()
        scene.team.result = result
        with pytest.raises(DaemonError, match=f"^{reason}$"):
            await scene.device.drain(True, None)
        assert scene.steps == ["hold True", "flush", "release"]
        assert scene.parts.drain == "" and not scene.parts.resources.holds

    in_loop(run)


def test_without_a_backend_only_a_drain_without_a_flush_is_possible() -> None:
    async def run() -> None:
        scene = await Scene(attached=False).begin()
        with pytest.raises(DaemonError, match="no backend is attached that could confirm a FLUSH"):
            await scene.device.drain(True, None)
        await scene.device.drain(False, None)
        assert scene.parts.drain == "drained"

    in_loop(run)


def test_a_drain_that_takes_too_long_is_given_up() -> None:
    async def run() -> None:
        scene = await Scene(quiet=False).begin()
        with pytest.raises(DaemonError, match=r"not finished its requests after 0.01 s$"):
            await scene.device.drain(True, 0.01)
        assert scene.steps == ["hold True", "release"] and scene.parts.drain == ""
        assert scene.device.session is not None

    in_loop(run)


def test_a_drain_whose_client_has_gone_is_given_up() -> None:
    async def run() -> None:
        scene = await Scene(quiet=False).begin()
        draining = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        assert scene.device.status().drain == "draining"
        with pytest.raises(DaemonError, match="being drained already"):
            await scene.device.drain(True, None)
        with pytest.raises(DaemonError, match="interrupt that command instead"):
            await scene.device.resume()
        draining.cancel()
        await asyncio.wait({draining})
        assert draining.cancelled() and scene.steps == ["hold True", "release"]

    in_loop(run)


def test_a_deletion_ends_a_drain_and_says_so_to_its_client() -> None:
    async def run() -> None:
        scene = await Scene(quiet=False).begin()
        draining = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        await cancel(scene.parts)
        with pytest.raises(DaemonError, match="it is being deleted, or the machine goes down"):
            await draining
        assert scene.steps == ["hold True", "release"]

    in_loop(run)


def test_a_client_that_goes_once_the_backend_leaves_does_not_stop_it() -> None:
    async def run() -> None:
        scene = await Scene().begin()

        def save() -> None:
            scene.steps.append("record")
            draining.cancel()

        scene.parts.save = save  # type: ignore[method-assign]
        draining = asyncio.ensure_future(scene.device.drain(True, None))
        await asyncio.wait({draining})
        await turn()
        assert scene.parts.drain == "drained" and scene.device.session is None
        assert scene.steps == ["hold True", "flush", "record", "record", "detach, keep True", "lost"]

    in_loop(run)


async def _leaving(scene: Scene) -> SlowSession:
    """The device's backend, which leaves for a drain whose client has gone."""
    session = SlowSession(scene.steps)
    await scene.device.attach(session)
    scene.steps.clear()
    draining = asyncio.ensure_future(scene.device.drain(True, None))
    await turn()
    assert scene.parts.drain == "drained" and scene.steps[-1] == "detach, keep True"
    draining.cancel()
    await asyncio.wait({draining})
    return session


def test_a_device_whose_backend_still_leaves_is_not_said_to_be_drained() -> None:
    """The store may be copied only after the backend's last write."""

    async def run() -> None:
        scene = await Scene(managed=True, attached=False).begin()
        session = await _leaving(scene)
        again = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        assert not again.done() and scene.device.session is session
        session.dies()
        await again
        assert scene.steps[-2:] == ["lost", "process ended"] and scene.device.session is None

    in_loop(run)


def test_a_resume_starts_the_next_backend_only_after_the_earlier_one_has_left() -> None:
    async def run() -> None:
        scene = await Scene(managed=True, attached=False).begin()
        session = await _leaving(scene)
        resuming = asyncio.ensure_future(scene.device.resume())
        ending = asyncio.ensure_future(scene.device.end_drain())
        again = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        assert scene.parts.drain == "drained" and not (resuming.done() or ending.done() or again.done())
        session.dies()
        await asyncio.wait({resuming, ending, again})
        assert scene.steps[-5:] == ["lost", "process ended", "record no drain", "release", "started"]
        with pytest.raises(DaemonError, match=r"^vol: not drained: it was resumed meanwhile$"):
            await again

    in_loop(run)


def test_a_deletion_while_the_backend_leaves_is_told_to_the_next_drain() -> None:
    async def run() -> None:
        scene = await Scene(attached=False).begin()
        await _leaving(scene)
        again = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        scene.parts.life.is_stopping = True
        scene.parts.background.cancel()
        with pytest.raises(DaemonError, match="not drained: it is being deleted"):
            await again

    in_loop(run)


def test_the_next_daemon_says_drained_only_once_the_earlier_ones_backend_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        scene = Scene(managed=True, attached=False)
        session = SlowSession(scene.steps)
        record = Record(config=scene.device.config, device_number=3, drained=True)

        async def go_on(parts: DeviceParts, *_: object) -> Team:
            parts.backend.session = session
            return scene.team

        async def learn(*_: object) -> None:
            """No store is known."""

        monkeypatch.setattr("ublkpool.daemon.device.adoption.go_on", go_on)
        monkeypatch.setattr("ublkpool.daemon.device.adoption.learn", learn)
        scene.device.await_takeover(record)
        with pytest.raises(
            DaemonError, match=r"^vol: it is being taken over from an earlier daemon: try again$"
        ):
            await scene.device.drain(True, None)
        await scene.device.go_on(record, {})
        again = asyncio.ensure_future(scene.device.drain(True, None))
        resuming = asyncio.ensure_future(scene.device.resume())
        await turn()
        assert not again.done() and not resuming.done() and scene.parts.drain == "drained"
        session.dies()
        await again
        await resuming
        assert scene.steps.index("process ended") < scene.steps.index("started")

    in_loop(run)


def test_a_drain_that_cannot_be_recorded_leaves_the_backend_there() -> None:
    async def run() -> None:
        scene = await Scene().begin()

        def save() -> None:
            raise NotRecorded("no room")

        scene.parts.save = save  # type: ignore[method-assign]
        with pytest.raises(NotRecorded, match="no room"):
            await scene.device.drain(True, None)
        assert scene.steps == ["hold True", "flush", "release"]
        assert scene.parts.drain == "" and scene.device.session is not None

    in_loop(run)


def test_a_resume_that_cannot_be_recorded_leaves_the_device_drained() -> None:
    async def run() -> None:
        scene = await Scene(managed=True).begin()
        await scene.device.drain(True, None)
        scene.steps.clear()

        def save() -> None:
            raise NotRecorded("no room")

        scene.parts.save = save  # type: ignore[method-assign]
        with pytest.raises(NotRecorded, match="no room"):
            await scene.device.resume()
        assert scene.steps == [] and scene.parts.drain == "drained" and scene.parts.resources.holds

    in_loop(run)


def test_a_drain_goes_on_with_the_workers_that_follow_dead_ones() -> None:
    async def run() -> None:
        scene = await Scene(quiet=False).begin()
        draining = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        async with scene.parts.life.turn:
            scene.parts.enter("recovering")
            scene.team.ends()
            await turn()
            assert not draining.done()
            scene.parts.resources.team = HeldTeam(scene.steps)
            scene.parts.enter("live")
        await draining
        assert scene.parts.drain == "drained"
        assert scene.steps.count("flush") == 1 and scene.steps.count("hold True") == 2

    in_loop(run)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: setattr(s.parts.life, "is_stopping", True), "it is being deleted"),
        (lambda s: setattr(s.parts.life, "state", "failed"), "it has failed and has no disk"),
        (lambda s: setattr(s.parts.life, "state", "recovering"), "it is recovering, not live"),
        (lambda s: setattr(s.parts.life, "state", "waiting"), "it is waiting, not live"),
        (lambda s: setattr(s.team, "knows", False), "its workers run an earlier version"),
        (
            lambda s: setattr(
                s.device.session, "attach", wire.Attach(v=1, device="vol", kind="x", survives_death=False)
            ),
            "its data ends with the process of its backend",
        ),
    ],
)
def test_a_device_that_cannot_be_drained_says_why(change: Callable[[Scene], None], reason: str) -> None:
    async def run() -> None:
        scene = await Scene().begin()
        change(scene)
        with pytest.raises(DaemonError, match=f"^vol: {reason}"):
            await scene.device.drain(True, None)
        assert scene.steps == [] and scene.parts.drain == ""

    in_loop(run)


def test_workers_that_answer_have_no_backend_to_exchange() -> None:
    async def run() -> None:
        device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES, answers="worker"))
        with pytest.raises(DaemonError, match="its workers answer requests"):
            await device.drain(True, None)

    in_loop(run)


def test_a_device_that_is_not_drained_is_not_resumed() -> None:
    async def run() -> None:
        scene = await Scene().begin()
        with pytest.raises(DaemonError, match=r"^vol: it is not drained$"):
            await scene.device.resume()
        assert scene.steps == []

    in_loop(run)


def test_a_drained_device_that_has_failed_is_neither_drained_nor_resumed() -> None:
    """Its backend would be refused, and started again until the device is deleted."""

    async def run() -> None:
        scene = await Scene(managed=True).begin()
        await scene.device.drain(True, None)
        scene.device.note_failure("no disk")
        scene.steps.clear()
        with pytest.raises(DaemonError, match=r"^vol: it has failed: no disk$"):
            await scene.device.resume()
        with pytest.raises(DaemonError, match=r"^vol: not drained: no disk$"):
            await scene.device.drain(True, None)
        await scene.device.end_drain()
        assert scene.steps == []

    in_loop(run)


def test_a_resumed_devices_requests_wait_until_a_backend_is_absent_for_long_again() -> None:
    async def run() -> None:
        device = (await Scene(attached=False).begin()).device
        worker = FakeWorkerProcess(0, FakeChild())
        for _ in range(2):
            device.parts.backend.hear(worker, messages.Absent())
            assert device.trouble == "no backend is attached, requests fail"
            await device.drain(False, None)
            await device.resume()
            assert device.trouble == "no backend is attached, requests wait"
        lines = device.parts.context.events.after(0, most=1000).lines
        assert sum(b"requests-fail" in line for line in lines) == 2

    in_loop(run)


@pytest.mark.parametrize(("recovery", "waits"), [("reissue", False), ("abort", True), ("fail", True)])
def test_an_upgrade_replaces_a_drained_devices_workers_only_if_the_driver_keeps_their_requests(
    monkeypatch: pytest.MonkeyPatch, recovery: Recovery, waits: bool
) -> None:
    async def run() -> None:
        scene = await Scene().begin()
        scene.parts.use(msgspec.structs.replace(scene.parts.config, recovery=recovery))

        async def retire(*_: object) -> None:
            scene.steps.append("retired")

        async def next_epoch() -> str:
            return ""

        monkeypatch.setattr("ublkpool.daemon.device.device.retire", retire)
        monkeypatch.setattr(scene.device, "_try_next_epoch", next_epoch)
        await scene.device.drain(True, None)
        await scene.device.renew()
        await turn()
        assert ("retired" in scene.steps) != waits and scene.device.state == ("live" if waits else "quiesced")
        scene.parts.enter("live")
        await scene.device.resume()
        await turn()
        assert scene.steps.count("retired") == (not waits), "its requests wait for the next backend"
        await scene.device.attach(FakeSession())
        await turn()
        assert scene.steps.count("retired") == 1

    in_loop(run)


def test_the_machines_shutdown_resumes_a_drained_device_and_ends_a_drain() -> None:
    """Dirty data of a mounted file system must still find a backend."""

    async def run() -> None:
        drained = await Scene(managed=True).begin()
        await drained.device.drain(True, None)
        await drained.device.end_drain()
        assert drained.parts.drain == "" and drained.steps[-2:] == ["release", "started"]
        draining = await Scene(quiet=False).begin()
        asking = asyncio.ensure_future(draining.device.drain(True, None))
        await turn()
        await draining.device.end_drain()
        await asyncio.wait({asking})
        assert draining.parts.drain == "" and draining.steps == ["hold True", "release"]

    in_loop(run)


def test_the_machines_shutdown_resumes_a_device_whose_takeover_ends_later() -> None:
    async def run() -> None:
        supervisor = Supervisor(fake_context(), Background("the daemon"))
        is_taken = asyncio.Event()
        scene = await Scene(managed=True, attached=False).begin()
        scene.parts.hold("drained")

        async def work(show: Show) -> bool:
            await is_taken.wait()
            # As after a `go_on` that failed: another `Device` stands for the name from now on.
            show(scene.device)
            return True

        record = Record(config=scene.device.config, device_number=3, drained=True)
        taking = supervisor._table.take_over(record, work)
        left = supervisor._table.device("vol")
        await supervisor.shut_down(final=False)
        await turn()
        assert scene.device.status().drain == "drained" and scene.steps == []
        assert not left.lacks_backend, "its dirty data fails before it was resumed"
        is_taken.set()
        await taking
        await turn()
        assert scene.device.status().drain == "" and scene.steps == ["record no drain", "release", "started"]
        assert scene.device.lacks_backend
        supervisor._background.cancel()

    in_loop(run)


def test_the_machines_shutdown_waits_for_no_device_that_is_gone() -> None:
    async def run() -> None:
        supervisor = Supervisor(fake_context(), Background("the daemon"))

        async def work(_show: Show) -> bool:
            await turn()
            return False

        record = Record(config=fake_device().config, device_number=3, drained=True)
        taking = supervisor._table.take_over(record, work)
        await supervisor.shut_down(final=False)
        await taking
        await turn()
        assert await supervisor._table.at_rest("vol") is None
        supervisor._background.cancel()

    in_loop(run)


def test_the_next_daemon_finds_a_drained_device_drained_and_resumes_none_during_its_takeover() -> None:
    async def run() -> None:
        device = fake_device()
        device.await_takeover(Record(config=device.config, device_number=3, drained=True))
        assert device.parts.drain == "drained" and device.parts.resources.holds
        with pytest.raises(AttachRefused, match="is drained"):
            await device.attach(FakeSession())
        with pytest.raises(DaemonError, match="taken over"):
            await device.resume()

    in_loop(run)
