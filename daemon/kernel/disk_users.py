"""The check that a disk is unused, and the stop of an unused disk.

A refusal names the users.  Where the driver has TRY_STOP_DEV (Linux 7.0) the kernel decides, at the moment of the stop;
before that an exclusive open, /sys and /proc decide, and a user that they do not show is missed.  Runs on the
supervisor's asyncio loop; every call that may wait runs in a disposable process.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import CallHung, ControlFailed
from ublkpool.daemon.kernel.disk_use import Users

PATIENCE_S = 2.0
"""A process that has the disk open for less than this, as udev and blkid do, is no user."""
WARNING_DEADLINE_S = 5.0
_POLL_S = 0.1
_WAY_OUT = "end that use, or use --force"
_UNSEEN = "a user that neither /proc nor /sys shows"


async def check_unused(name: str, kernel: BlockDevice, *, may_open: bool) -> None:
    """Return if no user of the disk is seen.  Raises `DaemonError` that names the users, or why they cannot be seen.

    With `may_open` false the disk is not opened: before the device is live, an open may wait for the partition scan.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + PATIENCE_S
    while True:
        claimed, users = await _look(name, kernel, may_open)
        if not claimed and not users.words:
            return
        if users.lasting or loop.time() > until_s:
            raise _refusal(name, kernel, users)
        await asyncio.sleep(_POLL_S)


async def _look(name: str, kernel: BlockDevice, may_open: bool) -> tuple[bool, Users]:
    """Whether the disk is claimed, which is asked only if no user is seen, and the users."""
    try:
        users = await kernel.users()
        if users.words or not may_open:
            return False, users
        claimed = await kernel.is_claimed()
        if not claimed and not kernel.can_try_stop:
            users = await kernel.mappers()
    except ControlFailed as error:
        raise cannot_tell(name, error) from error
    return claimed, users


def cannot_tell(name: str, error: ControlFailed) -> DaemonError:
    """The refusal of a disk whose users cannot be seen."""
    return DaemonError(f"{name}: it cannot be told whether its disk is in use: {error}: {_WAY_OUT}")


async def stop_unused(name: str, kernel: BlockDevice, try_stop: Callable[[], Awaitable[bool]]) -> None:
    """Stop the disk by `try_stop`, which the kernel refuses while it is open.  Raises `DaemonError` with the users."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + PATIENCE_S
    while not await try_stop():
        if loop.time() > until_s:
            users = await _users(kernel)
            raise _refusal(name, kernel, users)
        await asyncio.sleep(_POLL_S)


async def describe_use(kernel: BlockDevice) -> str:
    """The users in words for a warning, or why they cannot be seen; empty if no user is seen."""
    try:
        users = await kernel.users(WARNING_DEADLINE_S)
        if users.words:
            return users.words
        return _UNSEEN if await kernel.is_claimed(WARNING_DEADLINE_S) else ""
    except CallHung:
        return f"it cannot be told by whom: the look at its disk took longer than {WARNING_DEADLINE_S:.0f} s"
    except ControlFailed as error:
        return str(error)


async def _users(kernel: BlockDevice) -> Users:
    """The users that can be seen."""
    users = Users()
    with suppress(ControlFailed):
        users = await kernel.users()
        if not users.words:
            users = await kernel.mappers()
    return users


def _refusal(name: str, kernel: BlockDevice, users: Users) -> DaemonError:
    text = f"{name}: its disk {kernel.node} is in use: {users.words or _UNSEEN}: {_WAY_OUT}"
    return DaemonError(text, code="in-use")
