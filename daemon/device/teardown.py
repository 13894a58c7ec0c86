"""The end of one device: refused while the disk is in use, else in the order that cannot wedge the host.

Owns that order: the disk stops while workers serve, workers end, the backend leaves, the kernel's device is deleted.
The caller has the device's turn, but for `check_unused` and `describe_use`.  Runs on the supervisor's asyncio loop.
"""

import logging

from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.records import Record, end_left
from ublkpool.daemon.device.resources import STOP_DEADLINE_S
from ublkpool.daemon.errors import DaemonError, one_line, without_name
from ublkpool.daemon.kernel import disk_users
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import ControlFailed
from ublkpool.daemon.processes.background import logged

_log = logging.getLogger("ublkpool.device")


async def check_unused(parts: DeviceParts) -> None:
    """Return if nothing shows a user of the disk.  Raises `DaemonError` that names the users, or why none can be seen.

    A disk that an earlier daemon left is asked as well, whether its takeover is under way or failed.  A device that
    this daemon had and that failed has no disk any more.
    """
    name, kernel, state = parts.config.name, parts.resources.kernel, parts.life.state
    if parts.left is not None:
        kernel = await _left_disk(parts, parts.left)
    elif state == "failed":
        return
    if kernel is None:
        return
    await disk_users.check_unused(name, kernel, may_open=state != "waiting")
    # Clients are asked last: one that ended meanwhile has given its slice back by now.
    if clients := parts.clients.names():
        raise DaemonError(
            f"{name}: its client buffers are in use: {', '.join(clients)}: end these clients, or use --force",
            code="in-use",
        )


def is_idle(parts: DeviceParts) -> bool:
    """Whether only an open disk can stand in the way of a deletion, and the driver counts opens itself (TRY_STOP_DEV).

    `delete` may then do without `check_unused`, which reads the descriptors of every process: each device adds some.
    """
    kernel, drains = parts.resources.kernel, parts.draining is not None and not parts.draining.done()
    if kernel is None or not kernel.can_try_stop or parts.life.state != "live":
        return False
    # `_end_checked` ends a drain, which a refusal must leave alone.  A request in flight shows a user of the disk.
    is_held = parts.drain or drains or parts.clients.names()
    return not is_held and parts.resources.counted("in_flight") == 0


async def is_claimed(parts: DeviceParts) -> bool:
    """Whether a mount or the like has the disk of an idle device.  Raises `DaemonError` if it does not answer.

    TRY_STOP_DEV takes the disk's `open_mutex`.  Whatever keeps the mutex for ever keeps this open waiting as well, in a
    helper that changes nothing.
    """
    kernel = parts.resources.kernel
    assert kernel is not None
    try:
        return await kernel.is_claimed()
    except ControlFailed as error:
        raise disk_users.cannot_tell(parts.config.name, error) from error


async def stop_idle(parts: DeviceParts) -> bool:
    """Stop the disk of an idle device; False if it is open.  Raises `DaemonError`: the driver does not answer."""
    try:
        return await parts.resources.try_stop()
    except ControlFailed as error:
        raise disk_users.cannot_tell(parts.config.name, error) from error


async def _left_disk(parts: DeviceParts, left: Record) -> BlockDevice | None:
    """The kernel's device that an earlier daemon left, None if it has no disk.  Raises `DaemonError`."""
    # Not kept in the parts: the next record would say that this daemon has taken the device over.
    kernel = parts.resources.kernel
    if kernel is None and left.device_number is not None:
        name = parts.config.name
        try:
            kernel = await BlockDevice.find(parts.context.runner, name, left.device_number, left.device_mark)
        except ControlFailed as error:
            raise disk_users.cannot_tell(name, error) from error
    return kernel if kernel is not None and kernel.is_started else None


async def describe_use(parts: DeviceParts) -> str:
    """The users of the disk in words, empty if none is seen."""
    kernel = parts.resources.kernel
    return await disk_users.describe_use(kernel) if kernel is not None and parts.life.state == "live" else ""


async def stop_unused(parts: DeviceParts, look_again: bool) -> None:
    """Stop a disk where the driver can refuse that to openers; `look_again` if it changed since `check_unused`.

    A live disk is stopped, and one that an earlier daemon left.  Raises `DaemonError` that names the users; then
    nothing has changed.
    """
    resources = parts.resources
    if look_again:
        await check_unused(parts)
    if parts.left is not None:
        kernel = await _left_disk(parts, parts.left)
        if kernel is not None and kernel.can_try_stop:
            await disk_users.stop_unused(parts.config.name, kernel, lambda: kernel.try_stop(STOP_DEADLINE_S))
    elif parts.life.state == "live" and resources.kernel is not None and resources.kernel.can_try_stop:
        await disk_users.stop_unused(parts.config.name, resources.kernel, resources.try_stop)


async def tear_down(parts: DeviceParts, keep: bool) -> None:
    """End and remove everything of the device; with `keep` the backend leaves what it keeps to its successor.

    Raises `DaemonError` if the kernel's device stays: then it stays on record, too, and a retry may succeed.
    """
    name = parts.config.name
    parts.clients.close()
    if parts.left is not None:
        await _end_left(parts, parts.left)
    with logged(name):
        await parts.resources.stop()
    await end_backend(parts, keep)
    if parts.inside is not None:
        with logged(name):
            await parts.inside.settle()
    await parts.resources.remove()
    # The record goes last: it is what leads the next daemon to what the holder has.
    parts.context.holder.drop(name)
    parts.forget()


async def end_binding(parts: DeviceParts, keep: bool, forget: bool) -> None:
    """Forget a store that never served the device; also one that did, with `forget` or if it ends with the device."""
    await parts.binding.undo()
    if forget:
        await parts.binding.forget()
    elif not keep:
        await parts.binding.end()


async def tear_down_failed(parts: DeviceParts) -> bool:
    """Tear down a device that failed; whether the kernel's device is gone, else the reason says why it is not."""
    try:
        await tear_down(parts, keep=True)
    except (DaemonError, OSError) as error:
        stays = without_name(parts.config.name, one_line(error))
        _log.error("%s: %s", parts.config.name, stays)
        parts.life.reason += f"; its device is still there, `del` tries again: {stays}"
        return False
    return True


async def end_backend(parts: DeviceParts, keep: bool) -> None:
    """Have the attached backend leave, and start the daemon's own no more."""
    if parts.managed is not None:
        parts.managed.let_end()
    with logged(parts.config.name):
        await parts.backend.end(keep)
    if parts.managed is not None:
        await parts.managed.end()


async def _end_left(parts: DeviceParts, left: Record) -> None:
    """End the processes that an earlier daemon left, then the kernel's device if no team of this daemon serves it."""
    resources = parts.resources
    await end_left([left], [each for each in left.processes if each.role == "broker"])
    if resources.kernel is None and left.device_number is not None:
        resources.kernel = await BlockDevice.find(
            parts.context.runner, parts.config.name, left.device_number, left.device_mark
        )
    elif resources.kernel is None:
        resources.mark = left.device_mark
    if resources.team is None:
        await resources.discard()
    parts.left = None
