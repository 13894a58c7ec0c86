"""Making a device that no client sees yet: kernel device, pool, workers.

Owns their order, and that the next daemon finds whatever this one had made when it ended.  Runs on the supervisor's
asyncio loop.
"""

from ublkpool.bufpool import wire
from ublkpool.daemon.device.disk import disk_of
from ublkpool.daemon.device.opening import connect
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.records import FIRST_EPOCH
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.kernel.device_commands import new_mark


async def build(parts: DeviceParts, attach: wire.Attach) -> Team:
    """The first team of the disk that this backend makes; the caller has the turn.

    Raises `DaemonError`, `PoolError`, `OSError`; what was made by then stays.
    """
    resources = parts.resources
    resources.disk = disk_of(parts.config, attach, parts.binding.resized_bytes)
    parts.tell_size()
    # A device that an earlier attempt could not remove must go before its mark is replaced.
    await resources.remove_kernel()
    resources.mark = new_mark(parts.context.instance)
    # With the mark on record the next daemon finds what ADD_DEV makes, even if this one dies in it.
    parts.save()
    await resources.add_kernel(attach)
    parts.save()
    await resources.equip()
    team = await parts.fork(FIRST_EPOCH)
    await team.ready()
    await connect(parts, team)
    return team
