"""The block layer's timer is set by a process that may hang, and only where it is not set yet."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.kernel.device_commands import Created
from ublkpool.ublk.abi import DeviceInfo, Feature


class FakeRunner:
    """Notes what would run in a process of its own, and does not run it."""

    def __init__(self) -> None:
        self.commands: list[Callable[[], None]] = []

    async def run_beside(self, _what: str, command: Callable[[], None], *_: object) -> None:
        self.commands.append(command)


@pytest.mark.parametrize(("before", "written"), [("30000\n", ["1000"]), ("1000\n", [])])
def test_nothing_is_written_here_and_nothing_at_all_if_it_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, written: list[str]
) -> None:
    setting = tmp_path / "io_timeout"
    monkeypatch.setattr(BlockDevice, "_io_timeout_file", setting)
    runner = FakeRunner()
    created = Created(DeviceInfo(queues=1, device_number=3), [[0]], Feature(0))
    kernel = BlockDevice(cast(ControlRunner, runner), "vol", created)
    asyncio.run(kernel.set_io_timeout(1000))
    (command,) = runner.commands
    setting.write_text(before)
    said: list[str] = []
    monkeypatch.setattr(Path, "write_text", lambda _, text: said.append(text))
    command()
    assert said == written
