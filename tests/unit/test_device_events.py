"""Each deed of a device is one event, with what an operator needs of it."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from support.fakes.device_parts import (
    SIZE_BYTES,
    FakeChild,
    FakeSession,
    FakeTeam,
    FakeWorkerProcess,
    fake_device,
    turn,
)
from ublkpool.daemon.backends.managed_backend import ManagedBackend
from ublkpool.daemon.device import device as module
from ublkpool.daemon.device import teardown
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.recovery import RESTARTS_MAX
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events.event import Event, decode
from ublkpool.daemon.events.kinds import (
    BackendAttached,
    BackendCutOff,
    BackendDetached,
    BackendDied,
    BackendRefused,
    BackendReplaced,
    DeviceFailed,
    DeviceLive,
    RecoveryBegun,
    RecoveryEnded,
    RequestLate,
    RequestsFail,
    SettingsChanged,
    WorkerDied,
)
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.workers import messages


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(run())


def served(team: FakeTeam, **config: object) -> Device:
    device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES, **config))  # type: ignore[arg-type]
    device.parts.resources.team = team
    return device


def events(device: Device) -> list[Event]:
    lines = device.parts.context.events.after(0, most=1000).lines
    found = [event for line in lines if (event := decode(line.rstrip())) is not None]
    assert all(each.device == "vol" and each.text for each in found)
    return found


def told(device: Device) -> list[object]:
    return [each.typed() for each in events(device)]


def test_a_backend_attaches_dies_and_is_replaced_once_the_next_has_greeted_every_queue() -> None:
    async def run() -> None:
        team = FakeTeam()
        device = served(team)
        counted = [3]
        device.parts.backend.replays = lambda: counted[0]
        first, second = FakeSession("file"), FakeSession("memory")
        second.pid = 2
        await device.attach(first)
        first.dies()
        await turn()
        team.missing = [0, 1]
        await device.attach(second)
        await turn()
        counted[0] = 8
        assert told(device) == [
            BackendAttached(kind="file", pid=1, generation=1),
            BackendDied(kind="file", pid=1, was_cut_off=False),
            BackendAttached(kind="memory", pid=2, generation=2),
        ]
        team.greeted(0, 1)
        await turn()
        *_, found = told(device)
        assert isinstance(found, BackendReplaced) and 0 <= found.seconds < 60
        assert (found.kind, found.pid, found.earlier_pid, found.replayed) == ("memory", 2, 1, 5)
        assert len(told(device)) == 4

    in_loop(run)


def test_a_backend_that_was_asked_to_leave_has_not_died() -> None:
    async def run() -> None:
        device = served(FakeTeam())
        session = FakeSession("file")
        await device.attach(session)
        session.is_detaching = True
        session.dies()
        await turn()
        assert told(device)[-1] == BackendDetached(kind="file", pid=1)

    in_loop(run)


class Managed(ManagedBackend):
    """The daemon's own backend, a process whose session the test ends with it."""

    def __init__(self, pid: int, session: FakeSession) -> None:
        self._pid, self._session = pid, session

    @property
    def pid(self) -> int:
        return self._pid

    def serves(self) -> None:
        """It has attached."""

    async def replace(self) -> None:
        self._session.dies()


@pytest.mark.parametrize(("pid", "code"), [(1, "backend-detached"), (9, "backend-died")])
def test_the_daemons_own_backend_that_an_upgrade_replaces_is_no_reason_to_warn(
    monkeypatch: pytest.MonkeyPatch, pid: int, code: str
) -> None:
    """That of another process, which dies meanwhile, is one."""

    async def retire(_team: Team, _name: str) -> None:
        """The workers end."""

    async def next_epoch() -> str:
        return ""

    async def run() -> None:
        device = served(FakeTeam())
        device.parts.life.state = "live"
        session, successor = FakeSession("file"), FakeSession("file")
        successor.pid = 2
        device.parts.managed = Managed(pid, session)
        await device.attach(session)
        monkeypatch.setattr(device, "_try_next_epoch", next_epoch)
        monkeypatch.setattr(module, "retire", retire)
        await device.renew()
        await turn()
        await device.attach(successor)
        await turn()
        (ended,) = (each for each in events(device) if each.code.startswith("backend-d"))
        assert (ended.code, ended.severity) == (code, "info" if pid == 1 else "warning")
        replaced = next(each for each in told(device) if isinstance(each, BackendReplaced))
        assert (replaced.pid, replaced.earlier_pid) == (2, 1)

    in_loop(run)


@pytest.mark.parametrize(("said", "killed"), [(False, False), (True, False), (True, True)])
def test_a_backend_that_was_stopped_and_said_so_is_no_reason_to_warn(said: bool, killed: bool) -> None:
    async def run() -> None:
        device = served(FakeTeam())
        session = FakeSession("file")
        await device.attach(session)
        session.has_said_end, session.was_cut_off = said, killed
        session.dies()
        await turn()
        assert told(device)[-1] == BackendDied(
            kind="file", pid=1, was_cut_off=killed, was_told=said and not killed
        )
        assert events(device)[-1].severity == ("info" if said and not killed else "warning")

    in_loop(run)


def test_what_a_worker_reports_of_a_backend_is_told() -> None:
    async def run() -> None:
        device = served(FakeTeam(), io_timeout_s=5.0, absent_timeout_s=7.0)
        worker = FakeWorkerProcess(1, FakeChild())
        backend, session = device.parts.backend, FakeSession("file")
        await device.attach(session)
        backend.hear(worker, messages.Silent())
        backend.hear(worker, messages.Cut("answers twice"))
        session.blame("backend cut off: it talks on its attach connection")
        await turn()
        backend.hear(worker, messages.Absent())
        backend.hear(worker, messages.Absent())
        device.note_refusal("backend file, process 9, was refused: too small")
        await device.set({"io_timeout": 6.0})
        assert told(device)[1:] == [
            RequestLate(queue=1, io_timeout_s=5.0),
            BackendCutOff(reason="answers twice", pid=1, queue=1),
            BackendCutOff(reason="it talks on its attach connection", pid=1),
            BackendDied(kind="file", pid=1, was_cut_off=True),
            RequestsFail(why="no-backend", after_s=7.0),
            BackendRefused(reason="backend file, process 9, was refused: too small"),
            SettingsChanged(values={"io_timeout": "6"}),
        ]

    in_loop(run)


def test_a_backend_that_every_worker_reports_is_cut_off_once() -> None:
    async def run() -> None:
        device = served(FakeTeam())
        backend = device.parts.backend
        for pid in (1, 2):
            session = FakeSession("file")
            session.pid = pid
            await device.attach(session)
            # The second report comes before the loop has turned, the third after the kill.
            for queue in (0, 1):
                backend.hear(FakeWorkerProcess(queue, FakeChild()), messages.Cut("answers twice"))
            session.was_cut_off = True
            backend.hear(FakeWorkerProcess(2, FakeChild()), messages.Cut("answers twice"))
            await turn()
        found = [each for each in told(device) if isinstance(each, BackendCutOff)]
        assert found == [BackendCutOff(reason="answers twice", pid=pid, queue=0) for pid in (1, 2)]
        assert sum(backend.cut_offs.counts().values()) == 2

    in_loop(run)


class Attempts:
    """Takes the place of `next_epoch`: the first `failures` attempts fail; dead workers held 3 requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
        self._left = failures
        monkeypatch.setattr(module, "next_epoch", self._next_epoch)
        monkeypatch.setattr(module, "RETRY_PAUSE_S", 0.0)

    async def _next_epoch(self, parts: DeviceParts) -> Team:
        parts.resources.left_requests = 3
        if self._left:
            self._left -= 1
            raise DaemonError("the pool broker is gone")
        parts.resources.epoch += 1
        parts.resources.team = FakeTeam(epoch=parts.resources.epoch)
        return parts.resources.team


class Dying(FakeTeam):
    """Its worker of queue 1, process 17, ends."""

    async def ended(self) -> WorkerProcess:
        status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        status.set_result(-9)
        worker = FakeWorkerProcess(1, FakeChild(17, status))
        worker.fault = "queue 1: its worker ended: killed by SIGKILL"
        return worker


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_recovery_has_one_beginning_and_one_end_however_often_it_is_tried(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    async def run() -> None:
        dead = Dying()
        device = served(dead)
        await device._end_start("")
        Attempts(monkeypatch, failures)
        await device._until_worker_dies(dead)
        reason = "queue 1: its worker ended: killed by SIGKILL"
        live, died, begun, ended = told(device)
        assert live == DeviceLive(path="/dev/null", size_bytes=SIZE_BYTES)
        assert died == WorkerDied(queue=1, pid=17, reason=reason)
        assert begun == RecoveryBegun(reason=reason, epoch=1)
        assert isinstance(ended, RecoveryEnded) and 0 <= ended.seconds < 60
        assert (ended.served, ended.epoch, ended.replayed) == (True, 2, 3)
        assert "3 requests are sent again" in events(device)[-1].text

    in_loop(run)


def test_a_recovery_that_is_given_up_has_an_end_and_the_device_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def no_tear_down(parts: DeviceParts, keep: bool) -> None:
        return

    async def run() -> None:
        dead = FakeTeam()
        device = served(dead)
        await device._end_start("")
        Attempts(monkeypatch, RESTARTS_MAX)
        monkeypatch.setattr(teardown, "tear_down", no_tear_down)
        monkeypatch.setattr(FakeTeam, "kill", lambda self: asyncio.sleep(0))
        await device._recover_or_fail(dead, "queue 0: its worker ended")
        _, begun, ended, failed = told(device)
        assert isinstance(begun, RecoveryBegun) and isinstance(ended, RecoveryEnded)
        assert not ended.served and events(device)[2].severity == "error"
        assert failed == DeviceFailed(reason="the pool broker is gone")

    in_loop(run)


def test_a_worker_of_a_device_that_is_being_deleted_has_not_died() -> None:
    async def run() -> None:
        dead = Dying()
        device = served(dead)
        device.parts.life.is_stopping = True
        await device._until_worker_dies(dead)
        assert events(device) == []

    in_loop(run)
