"""A device number that another server has freed and taken: no command of ours reaches a stranger's device."""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import device_commands
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import ControlFailed, ControlRunner
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk import control
from ublkpool.ublk.abi import DEVICE_INFO_BYTES, Control, DeviceInfo, DeviceState, Feature, Parameters
from ublkpool.ublk.errors import UblkError

NUMBER = 3
STRANGER = DeviceInfo(
    queues=1,
    depth=128,
    state=DeviceState.LIVE,
    max_io_bytes=524288,
    device_number=NUMBER,
    server_pid=4711,
    server_flags=0,
)
HARMLESS = {Control.GET_DEV_INFO, Control.GET_FEATURES, Control.GET_QUEUE_AFFINITY}

T = TypeVar("T")


class Driver:
    """The driver's table of devices, and the commands that it was sent."""

    def __init__(self) -> None:
        self.device: DeviceInfo | None = None
        self.sent: list[Control] = []

    def send(
        self, command: Control, device: int, buffer: bytearray | None = None, data: int = 0, queue: int = 0
    ) -> int:
        if command not in HARMLESS:
            self.sent.append(command)
        if command is Control.GET_FEATURES and buffer is not None:
            buffer[:] = int(Feature.SAFE_STOP_DEV | Feature.QUIESCE | Feature(511)).to_bytes(8, "little")
        elif command is Control.ADD_DEV and buffer is not None:
            self.device = DeviceInfo.unpack(bytes(buffer))._replace(device_number=NUMBER)
            buffer[:] = self.device.pack()
        elif self.device is None:
            raise UblkError(f"{command.name} of device {device}", errno.ENODEV)
        elif command is Control.GET_DEV_INFO and buffer is not None:
            assert len(buffer) == DEVICE_INFO_BYTES
            buffer[:] = self.device.pack()
        elif command in (Control.DEL_DEV, Control.DEL_DEV_ASYNC):
            self.device = None
        return 0


class Runner(ControlRunner):
    """Runs the commands where their answer can be looked at."""

    async def run_beside(
        self,
        what: str,
        command: Callable[[], Any],
        result: type[T],
        deadline_s: float = 0.0,
        begun: asyncio.Event | None = None,
        owner: str = "",
    ) -> T:
        try:
            found: T = command()
        except UblkError as error:
            raise ControlFailed(str(error), error.errno) from error
        return found


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(control, "_send", made.send)
    monkeypatch.setattr(device_commands, "is_privileged", lambda: True)
    # `Runner` runs commands in this process; the disk's size is for a control process to read.
    monkeypatch.setattr(device_commands, "_disk_bytes", lambda number: 0)
    yield made


def create() -> BlockDevice:
    config = DeviceConfig(name="vol0", queues=1)
    disk = Parameters(size_bytes=1 << 20, max_io_bytes=524288)
    return asyncio.run(BlockDevice.create(Runner(), config, disk, device_commands.new_mark("unit")))


COMMANDS: dict[str, Callable[[BlockDevice], Awaitable[object]]] = {
    "START_DEV": lambda device: device.start(1.0, Call(lambda _: None, fds=[-1])),
    "STOP_DEV": lambda device: device.stop(1.0),
    "DEL_DEV": lambda device: device.delete(),
    "QUIESCE_DEV": lambda device: device.quiesce(1.0),
    "START_USER_RECOVERY": lambda device: device.start_recovery(1.0),
    "UPDATE_SIZE": lambda device: device.update_size(2 << 20, 1.0),
    "END_USER_RECOVERY": lambda device: device.end_recovery(1.0, asyncio.Event()),
}


async def _call(command: Callable[[BlockDevice], Awaitable[object]], device: BlockDevice) -> None:
    await command(device)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reaches_our_device(driver: Driver, command: str) -> None:
    device = create()
    assert driver.device is not None
    driver.device = driver.device._replace(state=DeviceState.LIVE)
    driver.sent.clear()
    asyncio.run(_call(COMMANDS[command], device))
    assert driver.sent and driver.sent[-1].name.startswith(command)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mark", ["no mark", "another mark"])
def test_a_command_does_not_reach_the_device_of_another_server(
    driver: Driver, command: str, mark: str
) -> None:
    device = create()
    driver.device = STRANGER._replace(server_flags=0 if mark == "no mark" else device.mark ^ 1)
    driver.sent.clear()
    with pytest.raises(ControlFailed, match=r"device 3 is another server's now \(process 4711\)") as failed:
        asyncio.run(_call(COMMANDS[command], device))
    assert failed.value.errno == errno.ENODEV
    assert driver.sent == [] and driver.device is not None


def test_another_servers_device_under_the_number_is_no_disk_in_use(driver: Driver) -> None:
    device = create()
    driver.device = STRANGER
    driver.sent.clear()
    assert asyncio.run(device.try_stop(1.0)) and driver.sent == []


def test_a_number_that_another_server_takes_at_once_counts_as_free(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = create()

    def delete_and_another_adds(_number: int) -> None:
        driver.device = STRANGER

    monkeypatch.setattr(control, "delete_device_later", delete_and_another_adds)
    assert device_commands.delete(NUMBER, device.mark)


def test_a_successor_of_the_daemon_does_not_take_up_another_servers_device(driver: Driver) -> None:
    device = create()
    found = asyncio.run(BlockDevice.find(Runner(), "vol0", NUMBER, device.mark))
    assert found is not None and found.mark == device.mark
    driver.device = STRANGER
    assert asyncio.run(BlockDevice.find(Runner(), "vol0", NUMBER, device.mark)) is None
    driver.device = None
    assert asyncio.run(BlockDevice.find(Runner(), "vol0", NUMBER, device.mark)) is None


def test_a_device_that_an_earlier_version_added_without_a_mark_is_taken_up(driver: Driver) -> None:
    driver.device = STRANGER
    found = asyncio.run(BlockDevice.find(Runner(), "vol0", NUMBER, 0))
    assert found is not None and found.mark == 0
    asyncio.run(found.stop(1.0))
    assert driver.sent == [Control.STOP_DEV]


def test_the_wait_for_quiesced_ends_when_the_number_is_another_servers(driver: Driver) -> None:
    device = create()
    driver.device = STRANGER
    with pytest.raises(DaemonError, match="another server's"):
        asyncio.run(device.wait_quiesced(60.0))


def test_each_device_has_a_mark_of_its_own(driver: Driver) -> None:
    marks = {create().mark for _ in range(8)}
    assert len(marks) == 8 and all(0 < mark < 1 << device_commands.MARK_BITS for mark in marks)
