"""Taking over what an earlier daemon left, with made-up devices and broker."""

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from support.fakes.descriptors import is_readable
from support.fakes.device_parts import FakeBroker, FakeHolder, fake_context
from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon import takeover
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.broker_process import EARLIER_HELD, HELD, HELD_PROCESS
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.left_behind import Process, identify
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.takeover import TakeOver
from ublkpool.workers.privileges import Account

RECORD = Record(config=DeviceConfig(name="vol", size_bytes=4096), device_number=3)


class LeftDevice(Device):
    """A device that cannot go on, and can be recovered; `steps` is what was done to all of them."""

    steps: list[str]

    def save(self) -> None:
        """There is no record."""

    async def go_on(self, record: Record, held: Mapping[str, int]) -> None:
        self.steps.append("go on")
        raise DaemonError("a worker has ended")

    def abandon(self) -> None:
        self.steps.append("abandon")

    async def recover_left(self, record: Record, held: Mapping[str, int]) -> bool:
        self.steps.append(f"recover {record.config.name}")
        return True


class DeadBroker(FakeBroker):
    """A broker that has just died."""

    async def forget(self, device: int | None) -> None:
        raise PoolError("the pool broker is gone")


class NotingHolder(FakeHolder):
    """Notes the names that are dropped."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self._steps = steps

    def drop(self, name: str) -> None:
        self._steps.append(f"drop {name}")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    LeftDevice.steps = found
    monkeypatch.setattr(takeover, "Device", LeftDevice)
    return found


def context(queue_dir: Path, holder: Holder | None = None) -> DaemonContext:
    made = fake_context(holder)
    made.queue_dir = queue_dir
    return made


def take_over(made: DaemonContext) -> list[Device]:
    """Take over the one device on record; every `Device` that stood for it."""
    shown: list[Device] = []

    async def run() -> None:
        assert await TakeOver(made, [RECORD], {}, []).device(RECORD, shown.append)

    asyncio.run(run())
    return shown


def test_a_device_is_recovered_although_the_broker_dies_just_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: list[str]
) -> None:
    made = context(tmp_path)
    made.broker = DeadBroker()
    monkeypatch.setattr(takeover, "may_go_on", lambda *_: True)
    first, second = take_over(made)
    assert first is not second
    assert steps == ["go on", "abandon", "recover vol"]


def test_workers_that_serve_are_not_ended_for_want_of_descriptors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Their recovery would need more descriptors than going on with them: the disk would be lost."""

    async def go_on(_device: Device, _record: Record, _held: Mapping[str, int]) -> None:
        steps.append("go on")
        if len(steps) < 6:
            raise DaemonError("no pidfd") from OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(LeftDevice, "go_on", go_on)
    monkeypatch.setattr(takeover, "SHORTAGE_PAUSE_S", 0.0)
    alive: list[bool] = []

    def serves(*_: object) -> bool:
        alive.append(True)
        if len(alive) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return True

    monkeypatch.setattr(takeover, "may_go_on", serves)
    shown = take_over(context(tmp_path))
    assert steps == ["go on", "abandon"] * 3 + ["go on"] and len(shown) == 4
    assert caplog.text.count("cannot be taken over yet") == 1


def test_a_device_whose_workers_ended_while_descriptors_were_short_is_recovered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: list[str]
) -> None:
    async def go_on(_device: Device, _record: Record, _held: Mapping[str, int]) -> None:
        steps.append("go on")
        raise OSError(errno.ENFILE, "Too many open files in system")

    monkeypatch.setattr(LeftDevice, "go_on", go_on)
    monkeypatch.setattr(takeover, "SHORTAGE_PAUSE_S", 0.0)
    monkeypatch.setattr(takeover, "may_go_on", lambda *_: steps.count("go on") < 3)
    made = context(tmp_path)
    made.broker = DeadBroker()
    take_over(made)
    assert steps == ["go on", "abandon"] * 3 + ["recover vol"]


def test_the_sockets_of_dead_processes_are_dropped_before_the_device_is_recovered(
    tmp_path: Path, steps: list[str]
) -> None:
    take_over(context(tmp_path, NotingHolder(steps)))
    assert steps == ["drop vol", "recover vol"]


def test_a_device_is_not_recovered_before_a_process_that_waits_in_the_kernel_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def end_left(_records: Sequence[Record], _spare: Collection[Process]) -> None:
        steps.append("end")
        if len(steps) < 4:
            raise DaemonError("backend process 7 has not ended 60 s after SIGKILL")

    monkeypatch.setattr(takeover, "end_left", end_left)
    take_over(context(tmp_path))
    assert steps == ["end"] * 4 + ["recover vol"]
    assert caplog.text.count("process 7 has not ended") == 1


def test_a_directory_among_the_queues_sockets_stays_and_stops_no_start(tmp_path: Path) -> None:
    (tmp_path / "7.old").mkdir()
    (tmp_path / "7.0").touch()
    left = TakeOver.__new__(TakeOver)
    left._context = SimpleNamespace(queue_dir=tmp_path)  # type: ignore[assignment]
    left._remove_sockets(lambda number: number == 7)
    assert [each.name for each in tmp_path.iterdir()] == ["7.old"]


def test_a_broker_that_is_on_no_record_ends_before_another_begins(tmp_path: Path) -> None:
    """The daemon that had started it was killed before it had written that down: two would grant the same buffers."""
    ended: list[bool] = []

    async def run() -> None:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as unknown:
            pidfd = os.pidfd_open(unknown.pid)

            class Next(FakeBroker):
                """Notes whether the unknown one has ended."""

                def start(self) -> None:
                    ended.append(is_readable(pidfd))

            made = context(tmp_path)
            made.broker = Next()
            left = TakeOver(made, [RECORD], {HELD_PROCESS: pidfd}, [])
            await left.clear()
            left.close()
            unknown.terminate()
        assert unknown.returncode == -signal.SIGKILL

    asyncio.run(run())
    assert ended == [True]


@pytest.mark.parametrize("held", [(HELD,), (EARLIER_HELD,), (EARLIER_HELD, HELD)])
def test_a_broker_is_adopted_by_the_socket_that_is_held_for_it_also_under_its_earlier_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, held: Sequence[str]
) -> None:
    adopted: list[tuple[int, bool]] = []

    class Adopting(FakeBroker):
        async def adopt(self, pid: int, sock: socket.socket) -> bool:
            with sock:
                adopted.append((pid, os.path.sameopenfile(sock.fileno(), sockets[held[-1]])))
            return True

        async def forget_all_but(self, devices: Collection[int]) -> None:
            assert list(devices) == [3]

    monkeypatch.setattr(takeover, "may_go_on", lambda *_: True)
    own = identify("broker", os.getpid())
    assert own is not None
    made = context(tmp_path)
    made.broker = Adopting()
    sockets = {name: socket.socket(socket.AF_UNIX).detach() for name in held}

    async def run() -> None:
        left = TakeOver(made, [msgspec.structs.replace(RECORD, processes=(own,))], sockets, [])
        await left.clear()
        left.close()

    asyncio.run(run())
    assert adopted == [(os.getpid(), True)]


def test_a_broker_that_one_device_does_not_know_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its daemon died before it had told that broker of the device, whose requests for buffers would wait for ever."""
    monkeypatch.setattr(takeover, "may_go_on", lambda *_: True)
    own = identify("broker", os.getpid())
    assert own is not None
    started: list[bool] = []

    class Next(FakeBroker):
        async def adopt(self, pid: int, sock: socket.socket) -> bool:
            raise AssertionError("it does not know of the other device")

        def start(self) -> None:
            started.append(True)

    async def end_brokers(_records: Sequence[Record], spared: Sequence[Process]) -> None:
        assert not spared

    monkeypatch.setattr(takeover, "end_brokers", end_brokers)
    made = context(tmp_path)
    made.broker = Next()
    records = [msgspec.structs.replace(RECORD, processes=(own,)), RECORD]

    async def run() -> None:
        left = TakeOver(made, records, {HELD: socket.socket(socket.AF_UNIX).detach()}, [])
        await left.clear()
        left.close()

    asyncio.run(run())
    assert started == [True]


@pytest.mark.parametrize(
    ("account", "is_outdated"),
    [(None, False), (Account("me", os.geteuid(), 0, ()), False), (Account("other", 4711, 0, ()), True)],
)
def test_a_device_whose_workers_have_another_user_is_to_be_renewed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    steps: list[str],
    account: Account | None,
    is_outdated: bool,
) -> None:
    async def go_on(_device: Device, _record: Record, _held: Mapping[str, int]) -> None:
        steps.append("go on")

    monkeypatch.setattr(LeftDevice, "go_on", go_on)
    monkeypatch.setattr(takeover, "may_go_on", lambda *_: True)
    made = context(tmp_path)
    made.account = account
    # A backend's user does not count, nor a worker that has ended: it is about to be replaced.
    workers = (Process("worker", os.getpid(), 0), Process("backend", 1, 0), Process("worker", 2**30, 0))
    record = msgspec.structs.replace(RECORD, build=made.build, processes=workers)

    async def run() -> None:
        left = TakeOver(made, [record], {}, [])
        assert await left.device(record, lambda _: None)
        assert left.outdated == (["vol"] if is_outdated else [])

    asyncio.run(run())
    assert steps == ["go on"]
