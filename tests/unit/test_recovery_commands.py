"""The control commands of a start and of a recovery, and what the supervisor checks before each."""

import asyncio
import errno
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from ublkpool.bufpool import wire
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import ControlFailed, ControlRunner
from ublkpool.daemon.kernel.device_commands import Created
from ublkpool.daemon.kernel.disk_parameters import parameters
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk import control
from ublkpool.ublk.abi import DeviceInfo, Feature
from ublkpool.ublk.errors import UblkError

T = TypeVar("T")


class FakeRunner(ControlRunner):
    """Notes control commands and runs none."""

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[str] = []

    async def run_beside(
        self,
        what: str,
        command: Callable[[], Any],
        result: type[T],
        deadline_s: float = 0.0,
        begun: asyncio.Event | None = None,
        owner: str = "",
    ) -> T:
        self.commands.append(what)
        return result()


@pytest.mark.parametrize("offered", [Feature(0), Feature.QUIESCE])
def test_every_queue_has_had_a_task_before_an_old_driver_starts_recovery(offered: Feature) -> None:
    async def run() -> None:
        runner = FakeRunner()
        info = DeviceInfo(
            queues=1, depth=1, max_io_bytes=4096, device_number=3, server_pid=1, flags=Feature(0)
        )
        kernel = BlockDevice(runner, "vol", Created(info, [[0]], offered))
        await kernel.start_recovery(1.0)
        before = [] if offered else ["vol: FETCH_REQ"]
        assert runner.commands == [*before, "vol: START_USER_RECOVERY"]

    asyncio.run(run())


class DoingRunner(ControlRunner):
    """Runs control commands in this process, and counts the calls."""

    calls = 0

    async def run_beside(
        self,
        what: str,
        command: Callable[[], Any],
        result: type[T],
        deadline_s: float = 0.0,
        begun: asyncio.Event | None = None,
        owner: str = "",
    ) -> T:
        self.calls += 1
        try:
            command()
        except UblkError as error:
            raise ControlFailed(str(error), error.errno) from error
        return result()


@pytest.mark.parametrize("is_start", [True, False])
def test_a_team_that_is_not_whole_gets_no_request(is_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(control, "expect_mark", lambda *_: None)
    monkeypatch.setattr(control, "start_device", lambda *_: sent.append("START_DEV"))
    monkeypatch.setattr(control, "end_recovery", lambda *_: sent.append("END_USER_RECOVERY"))
    info = DeviceInfo(queues=2, depth=1, max_io_bytes=4096, device_number=3, server_pid=1, flags=Feature(0))
    kernel = BlockDevice(DoingRunner(), "vol", Created(info, [[0]], Feature(0)))

    def torn(_: int) -> None:
        raise UblkError("queue 1: its worker or its tags have gone", errno.EOWNERDEAD)

    async def let_through(check: Callable[[int], None]) -> None:
        if is_start:
            await kernel.start(1.0, Call(check, fds=[-1]))
        else:
            await kernel.end_recovery(1.0, asyncio.Event(), Call(check, fds=[-1]))

    with pytest.raises(ControlFailed, match="queue 1"):
        asyncio.run(let_through(torn))
    assert sent == []
    asyncio.run(let_through(lambda _: None))
    assert sent == ["START_DEV" if is_start else "END_USER_RECOVERY"]


def test_the_disk_of_a_prepared_device_is_described_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    monkeypatch.setattr(control, "expect_mark", lambda *_: None)
    monkeypatch.setattr(control, "set_parameters", lambda number, disk: sent.append((number, disk)))
    monkeypatch.setattr(control, "start_device", lambda *_: sent.append("START_DEV"))
    info = DeviceInfo(queues=1, depth=1, max_io_bytes=4096, device_number=3, server_pid=1, flags=Feature(0))
    runner = DoingRunner()
    kernel = BlockDevice(runner, "_prepared.1", Created(info, [[0]], Feature(0)))
    asked = parameters(
        DeviceConfig(name="vol", max_io_bytes=8192), 1 << 20, wire.Attach(v=1, device="vol", kind="x")
    )
    kernel.take("vol", asked)
    assert kernel.size_bytes == 1 << 20
    asyncio.run(kernel.start(1.0, Call(lambda _: None, fds=[-1])))
    # The driver may have granted smaller requests.
    assert sent == [(3, asked._replace(max_io_bytes=4096)), "START_DEV"]
    assert runner.calls == 1, "a call of a process of its own for each command"


@pytest.mark.parametrize(("queues", "offered"), [(1, Feature(0)), (2, Feature.QUIESCE)])
def test_where_no_death_tears_tags_end_user_recovery_waits_for_the_fetches(
    queues: int, offered: Feature
) -> None:
    info = DeviceInfo(
        queues=queues, depth=1, max_io_bytes=4096, device_number=3, server_pid=1, flags=Feature(0)
    )
    created = Created(info, [[0]] * queues, offered)
    assert not BlockDevice(FakeRunner(), "vol", created).tears_siblings
