"""Creating, finding and deleting a ublk device: sequences of control commands.

Every device has a mark, a random number that the driver keeps with it: it tells the device from a later one with the
same device number.  Every function that sends a command runs in a disposable process (`ControlRunner`).
"""

import errno
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ublkpool.daemon.kernel.disk_parameters import wanted_flags
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk import abi, control
from ublkpool.ublk.abi import DeviceInfo, Feature, Parameters
from ublkpool.ublk.errors import UblkError, UnsupportedError

DELETE_PATIENCE_S = 5.0
MARK_BITS = 63
_POLL_S = 0.02


class Created(NamedTuple):
    """The device as ADD_DEV made it, the CPUs that each queue serves, and the features that the driver offers."""

    info: DeviceInfo
    queue_cpus: list[list[int]]
    features: Feature


def new_mark() -> int:
    """A mark for one ADD_DEV; it is recorded before the command, so that the device is found after a crash."""
    return secrets.randbits(MARK_BITS)


def create(config: DeviceConfig, disk: Parameters, server_pid: int, mark: int) -> Created:
    """ADD_DEV and SET_PARAMS; if a step fails, the device is deleted.  Raises `UblkError`."""
    offered = control.get_features()
    flags = wanted_flags(config, offered)
    asked = DeviceInfo(
        queues=config.queues,
        depth=config.depth,
        max_io_bytes=config.max_io_bytes,
        device_number=abi.DEVICE_ANY if config.id is None else config.id,
        server_pid=server_pid,
        flags=flags,
        server_flags=mark,
    )
    info = control.add_device(asked)
    try:
        _check_granted(config, info, flags)
        control.set_parameters(info.device_number, disk._replace(max_io_bytes=info.max_io_bytes))
        cpus = [control.queue_cpus(info.device_number, queue) for queue in range(info.queues)]
    except BaseException:
        control.delete_device(info.device_number)
        raise
    return Created(info, cpus, Feature(offered))


def _check_granted(config: DeviceConfig, info: DeviceInfo, flags: Feature) -> None:
    refused = abi.feature_names(flags & ~info.flags)
    if refused:
        raise UnsupportedError(f"{config.name}: the driver took away {', '.join(refused)}")
    if info.depth != config.depth or info.max_io_bytes > config.max_io_bytes:
        raise UnsupportedError(
            f"{config.name}: asked for depth {config.depth} and {config.max_io_bytes} bytes a request, "
            f"the driver gives {info.depth} and {info.max_io_bytes}"
        )


def find(number: int) -> Created:
    """The device with this number, any server's.  Raises `UblkError`, ENODEV if the number is free."""
    info = control.device_info(number)
    cpus = [control.queue_cpus(number, queue) for queue in range(info.queues)]
    return Created(info, cpus, Feature(control.get_features()))


def find_marked(mark: int) -> int:
    """The number of the device with this mark; -1 if the driver has no such device."""
    for path in Path("/dev").glob("ublkc*"):
        number = path.name.removeprefix("ublkc")
        # Another program may delete its device just now.
        with suppress(UblkError):
            if number.isdecimal() and control.device_info(int(number)).server_flags == mark:
                return int(number)
    return -1


def delete(number: int, mark: int) -> bool:
    """DEL_DEV_ASYNC; whether the number is free after `DELETE_PATIENCE_S` at most.  Raises `UblkError`."""
    control.expect_mark(number, mark)
    control.delete_device_later(number)
    deadline_s = time.monotonic() + DELETE_PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            control.expect_mark(number, mark)
        except UblkError as error:
            if error.errno == errno.ENODEV:
                return True
            raise
        time.sleep(_POLL_S)
    return False
