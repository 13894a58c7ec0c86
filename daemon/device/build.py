"""Making a device that no client sees yet: kernel device, pool, workers; or taking one that was prepared.

Owns their order, and that the next daemon finds whatever this one had made when it ended.  Runs on the supervisor's
asyncio loop.
"""

import logging
from collections.abc import Callable

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon.device.disk import Disk, disk_of
from ublkpool.daemon.device.opening import connect
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.prepared import PreparedParts
from ublkpool.daemon.device.records import FIRST_EPOCH
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError, one_line, without_name
from ublkpool.daemon.kernel.device_commands import new_mark
from ublkpool.daemon.settings.config import DeviceConfig

_log = logging.getLogger("ublkpool.device")
Take = Callable[[DeviceConfig, Disk], PreparedParts | None]
"""Takes a prepared device that fits this one, which is the caller's then; None: there is none."""


def nothing_prepared(config: DeviceConfig, disk: Disk) -> None:
    """A daemon without prepared devices."""


async def build(parts: DeviceParts, attach: wire.Attach, take: Take = nothing_prepared) -> Team:
    """The first team of the disk that this backend makes; the caller has the turn.

    Raises `DaemonError`, `PoolError`, `OSError`; what was made by then stays.
    """
    resources = parts.resources
    resources.disk = disk = disk_of(parts.config, attach, parts.binding.resized_bytes)
    parts.tell_size()
    # A device that an earlier attempt could not remove must go before its mark is replaced.
    await resources.remove_kernel()
    prepared = take(parts.config, disk)
    if prepared is not None and (team := await _begin(parts, prepared, attach)) is not None:
        return team
    team = await _make(parts, attach)
    await connect(parts, team)
    return team


async def prepare(parts: PreparedParts) -> None:
    """Make all that is not told later.  Raises and leaves what `build` does."""
    await _make(parts, None)


async def discard(parts: DeviceParts) -> None:
    """Remove a device that has no disk yet.  Raises `DaemonError` if the kernel's device stays, which is on record."""
    resources, segment_bytes = parts.resources, parts.resources.segment_bytes
    if resources.team is not None:
        await resources.team.kill()
    await resources.remove()
    # Its store, if it has one, is still open for the next attempt.
    resources.segment_bytes = segment_bytes
    parts.forget()


async def _make(parts: DeviceParts, attach: wire.Attach | None) -> Team:
    resources = parts.resources
    resources.mark = new_mark(parts.context.instance)
    # With the mark on record the next daemon finds what ADD_DEV makes, even if this one dies in it.
    parts.save()
    await resources.add_kernel(attach)
    parts.save()
    await resources.equip()
    team = await parts.fork(FIRST_EPOCH)
    await team.ready()
    return team


async def _begin(parts: DeviceParts, prepared: PreparedParts, attach: wire.Attach) -> Team | None:
    """The prepared team, which serves this device's store now; None if it cannot, and has been removed.

    Raises `DaemonError` if its kernel device stays.
    """
    name = parts.config.name
    team = parts.resources.take(prepared.resources, attach, parts.engine())
    try:
        # The record is what leads the next daemon to all that the holder has by this name.
        parts.save()
        parts.resources.pool.hold()
        prepared.forget()
        parts.entrust(team)
        await team.become()
    except (DaemonError, PoolError, OSError) as error:
        _log.warning(
            "%s: a prepared device did not serve it, and one is made: %s",
            name,
            without_name(name, one_line(error)),
        )
        await discard(parts)
        prepared.forget()
        return None
    if parts.inside is not None:
        parts.inside.forked()
    return team
