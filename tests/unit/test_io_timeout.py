"""A disposable process, which may hang, sets the block layer's timer, and only if it is not set yet."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.kernel.device_commands import Created
from ublkpool.ublk.abi import DeviceInfo, Feature

T = TypeVar("T")


class FakeRunner(ControlRunner):
    """Records commands for a disposable process without running them."""

    def __init__(self) -> None:
        self.commands: list[Callable[[], None]] = []

    async def run_beside(
        self,
        what: str,
        command: Callable[[], Any],
        result: type[T],
        deadline_s: float = 0.0,
        begun: asyncio.Event | None = None,
        owner: str = "",
    ) -> T:
        self.commands.append(command)
        return result()


@pytest.mark.parametrize(("before", "written"), [("30000\n", ["1000"]), ("1000\n", [])])
def test_a_disposable_process_writes_the_timer_unless_it_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, written: list[str]
) -> None:
    setting = tmp_path / "io_timeout"
    monkeypatch.setattr(BlockDevice, "_io_timeout_file", setting)
    runner = FakeRunner()
    created = Created(DeviceInfo(queues=1, device_number=3), [[0]], Feature(0))
    kernel = BlockDevice(runner, "vol", created)
    asyncio.run(kernel.set_io_timeout(1000))
    (command,) = runner.commands
    setting.write_text(before)
    said: list[str] = []
    monkeypatch.setattr(Path, "write_text", lambda _, text: said.append(text))
    command()
    assert said == written
