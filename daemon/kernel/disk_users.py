"""Whether a disk may be taken away, and the stop of one without users.

A refusal names the users.  Where the driver has TRY_STOP_DEV (Linux 7.0) the kernel decides, at the moment of the stop;
before that an exclusive open and what /sys and /proc show decide, and what these do not show is not seen.  Runs on the
supervisor's asyncio loop; whatever may wait runs in helper processes.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import CallHung, ControlFailed
from ublkpool.daemon.kernel.disk_use import Users

PATIENCE_S = 2.0
"""How long an opener may take that looks at the disk and lets go, as udev and blkid do."""
WARNING_DEADLINE_S = 5.0
_POLL_S = 0.1
_WAY_OUT = "end that use, or use --force"
_UNSEEN = "a user that neither /proc nor /sys shows"


async def check_unused(name: str, kernel: BlockDevice, *, may_open: bool) -> None:
    """Return if nothing shows a user of the disk.  Raises `DaemonError` that names the users, or what cannot be told.

    With `may_open` false the disk is not opened: before it is live its partition scan may be waiting.
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
    """Whether the kernel says that the disk is claimed, asked only if no user is seen, and the users."""
    try:
        users = await kernel.users()
        if users.words or not may_open:
            return False, users
        claimed = await kernel.is_claimed()
        if not claimed and not kernel.can_try_stop:
            users = await kernel.mappers()
    except ControlFailed as error:
        raise DaemonError(
            f"{name}: it cannot be told whether its disk is in use: {error}: {_WAY_OUT}"
        ) from error
    return claimed, users


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
    """The users in words for a warning, empty if none is seen; that it cannot be told is said as well."""
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
    """Those that can be seen."""
    users = Users()
    with suppress(ControlFailed):
        users = await kernel.users()
        if not users.words:
            users = await kernel.mappers()
    return users


def _refusal(name: str, kernel: BlockDevice, users: Users) -> DaemonError:
    return DaemonError(f"{name}: its disk {kernel.node} is in use: {users.words or _UNSEEN}: {_WAY_OUT}")
