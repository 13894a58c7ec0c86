"""Creating, finding and deleting a ublk device: sequences of control commands.

Every device has a mark, a number that the driver keeps with it: half of it says which daemon added the device, the
other half is random and tells the device from a later one with the same device number.  Every function that sends a
command runs in a disposable process (`ControlRunner`).
"""

import errno
import hashlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ublkpool.daemon.kernel.disk_names import DiskNames
from ublkpool.daemon.kernel.disk_parameters import wanted_flags
from ublkpool.daemon.kernel.own_node import await_own_node
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk import abi, control
from ublkpool.ublk.abi import DeviceInfo, Feature, Parameters
from ublkpool.ublk.errors import UblkError, UnsupportedError
from ublkpool.ublk.privilege import is_privileged
from ublkpool.workers.process import fork_child

T = TypeVar("T")
DELETE_PATIENCE_S = 5.0
MARK_BITS = 63
_RANDOM_BITS = 32
_OWNER_BITS = MARK_BITS - _RANDOM_BITS
_POLL_S = 0.02
_USERS_DEVICES_MAX = Path("/sys/module/ublk_drv/parameters/ublks_max")


class Created(NamedTuple):
    """The device as ADD_DEV made it, the CPUs that each queue serves, the features that the driver offers, the disk's
    size."""

    info: DeviceInfo
    queue_cpus: list[list[int]]
    features: Feature
    size_bytes: int = 0


class Owned(NamedTuple):
    """A device that a daemon of this instance added; `state` is `abi.DeviceState`."""

    number: int
    mark: int
    server_pid: int
    state: int


def new_mark(instance: str) -> int:
    """A mark for one ADD_DEV; it is recorded before the command, so that the device is found after a crash."""
    return _owner(instance) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)


def _owner(instance: str) -> int:
    digest = hashlib.sha256(instance.encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 32 - _OWNER_BITS


def create(config: DeviceConfig, disk: Parameters | None, server_pid: int, mark: int) -> Created:
    """ADD_DEV and, if the disk is known, SET_PARAMS; if a step fails, the device is deleted.  Raises `UblkError`."""
    offered = control.get_features()
    flags = wanted_flags(config, offered, is_privileged())
    asked = DeviceInfo(
        queues=config.queues,
        depth=config.depth,
        max_io_bytes=config.max_io_bytes,
        device_number=abi.DEVICE_ANY if config.id is None else config.id,
        server_pid=server_pid,
        flags=flags,
        server_flags=mark,
    )
    info = _added(asked)
    if not is_privileged():
        # Before that the driver takes no command for it, not even DEL_DEV.
        await_own_node(info.device_number)
    try:
        _check_granted(config, info, flags)
        if disk is not None:
            control.set_parameters(info.device_number, disk._replace(max_io_bytes=info.max_io_bytes))
        cpus = [control.queue_cpus(info.device_number, queue) for queue in range(info.queues)]
    except BaseException:
        control.delete_device(info.device_number)
        raise
    return Created(info, cpus, Feature(offered), 0 if disk is None else disk.size_bytes)


def _added(asked: DeviceInfo) -> DeviceInfo:
    """ADD_DEV.  Raises `UblkError`."""
    try:
        return control.add_device(asked)
    except UblkError as error:
        # Not of an open: the control node has just been opened for GET_FEATURES.
        if error.errno == errno.EACCES and not is_privileged():
            most = _USERS_DEVICES_MAX.read_text().strip()
            raise UnsupportedError(
                f"ordinary users have as many ublk devices as they may ({most}): as root raise {_USERS_DEVICES_MAX}"
            ) from error
        raise


def _check_granted(config: DeviceConfig, info: DeviceInfo, flags: Feature) -> None:
    refused = abi.feature_names(flags & ~info.flags)
    if refused:
        raise UnsupportedError(f"{config.name}: the driver took away {', '.join(refused)}")
    if info.depth != config.depth or info.max_io_bytes > config.max_io_bytes:
        raise UnsupportedError(
            f"{config.name}: asked for depth {config.depth} and {config.max_io_bytes} bytes a request, "
            f"the driver gives {info.depth} and {info.max_io_bytes}"
        )


def ours(number: int, mark: int, command: Callable[..., T], *arguments: Any) -> T:
    """The command's result; `UblkError` ENODEV if the device number is another server's by now."""
    control.expect_mark(number, mark)
    return command(*arguments)


def ours_checked(
    fd: int, number: int, mark: int, check: Call, command: Callable[..., T], *arguments: Any
) -> T:
    """The same, unless `check` raises right before the command; it is given `fd`."""
    control.expect_mark(number, mark)
    check.function(fd, *check.arguments)
    return command(*arguments)


def start(fd: int, number: int, mark: int, disk: Parameters | None, check: Call, server_pid: int) -> None:
    """START_DEV, and before it SET_PARAMS if a disk is given, unless `check` raises, which is given `fd`."""
    control.expect_mark(number, mark)
    if disk is not None:
        control.set_parameters(number, disk)
    check.function(fd, *check.arguments)
    control.start_device(number, server_pid)


def publish_name(name: str, disk: str, number: int, mark: int) -> str:
    """See `DiskNames.publish`; `mark` is that of the device of this number."""
    return DiskNames().publish(name, disk, partial(control.expect_mark, number, mark))


def withdraw_name(name: str, disk: str) -> bool:
    """See `DiskNames.withdraw`."""
    return DiskNames().withdraw(name, disk)


def find(number: int) -> Created:
    """The device with this number, any server's.  Raises `UblkError`, ENODEV if the number is free."""
    info = control.device_info(number)
    cpus = [control.queue_cpus(number, queue) for queue in range(info.queues)]
    return Created(info, cpus, Feature(control.get_features()), _disk_bytes(number))


def _disk_bytes(number: int) -> int:
    """The disk's size, 0 if there is none.  Not by GET_PARAMS, which waits for a START_DEV or STOP_DEV that hangs."""
    with suppress(OSError, ValueError):
        return int(Path(f"/sys/block/ublkb{number}/size").read_text()) << abi.SECTOR_SHIFT
    return 0


def grow(number: int, size_bytes: int) -> None:
    """UPDATE_SIZE, unless the disk is as large: a command that was late must not undo a later one.

    Raises `UblkError`, ENODEV for a device without a disk, for which an old driver crashes (`control.update_size`).
    """
    if control.disk_bytes(number) >= size_bytes:
        return
    # GET_PARAMS waits for a STOP_DEV that has begun.
    if control.device_info(number).state == abi.DeviceState.DEAD:
        raise UblkError(f"UPDATE_SIZE of device {number}: it has no disk any more", errno.ENODEV)
    control.update_size(number, size_bytes)


def find_marked(mark: int) -> int:
    """The number of the device with this mark; -1 if the driver has no such device."""
    return next((info.device_number for info in _devices() if info.server_flags == mark), -1)


def find_owned(instance: str) -> list[Owned]:
    """The devices that a daemon of this instance added, of this version or a later one."""
    return [
        Owned(info.device_number, info.server_flags, info.server_pid, info.state)
        for info in _devices()
        if info.server_flags >> _RANDOM_BITS == _owner(instance)
    ]


def _devices() -> Iterator[DeviceInfo]:
    for path in sorted(Path("/dev").glob("ublkc*")):
        number = path.name.removeprefix("ublkc")
        # Another program may delete its device just now.
        with suppress(UblkError):
            if number.isdecimal():
                yield control.device_info(int(number))


def delete(number: int, mark: int) -> bool:
    """DEL_DEV_ASYNC; whether the number is free after `DELETE_PATIENCE_S` at most.  Raises `UblkError`."""
    control.expect_mark(number, mark)
    deadline_s = time.monotonic() + DELETE_PATIENCE_S
    if not is_privileged():
        return _delete_in_child(number, deadline_s)
    control.delete_device_later(number)
    while time.monotonic() < deadline_s:
        try:
            control.expect_mark(number, mark)
        except UblkError as error:
            if error.errno == errno.ENODEV:
                return True
            raise
        time.sleep(_POLL_S)
    return False


def _delete_in_child(number: int, deadline_s: float) -> bool:
    """DEL_DEV, which a user must send instead, and which waits for the last holder of the number; whether it is free.

    A child sends it: the device has gone before the wait, so that an end of the child changes nothing.
    """
    pid = fork_child(lambda: _errno_of(lambda: control.delete_device(number)), [], "ublkpool-ctl")
    while time.monotonic() < deadline_s:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if code := os.waitstatus_to_exitcode(status):
                raise UblkError(f"DEL_DEV of device {number}", code)
            return True
        time.sleep(_POLL_S)
    os.kill(pid, signal.SIGKILL)
    return False


def _errno_of(command: Callable[[], None]) -> int:
    try:
        command()
    except UblkError as error:
        return error.errno
    return 0
