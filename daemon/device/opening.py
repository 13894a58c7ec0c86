"""Opening the store of a device whose workers run its engine themselves: first for its start, then for each recovery.

Owns that a later epoch serves the same store, with at least the disk's size, or waits.  The caller has the device's
turn.  Runs on the supervisor's asyncio loop.
"""

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.bufpool.sdk.properties import Hint
from ublkpool.daemon.device.disk import check_fits, wanted_bytes
from ublkpool.daemon.device.inside import InsideStore, StoreAway
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.resize import follow_growth
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError, one_line, without_name


async def open_store(parts: DeviceParts, store: InsideStore) -> wire.Attach:
    """Open the store; what a backend would attach with.  Raises `DaemonError`, `AttachRefused`."""
    attach = await store.open(hint_of(parts))
    check_fits(parts.config, parts.resources.disk, attach, parts.binding.resized_for(attach))
    return attach


async def reopen_store(parts: DeviceParts, store: InsideStore) -> None:
    """Open the store of a disk that exists, once nothing of the last workers can write to it any more.

    Raises `StoreAway` if that cannot be now: the disk's requests wait.
    """
    disk = parts.resources.disk
    assert disk is not None
    try:
        attach = await open_store(parts, store)
        await parts.binding.bind(attach, disk.size_bytes, disk.resized_bytes)
    except (AttachRefused, DaemonError) as error:
        store.forked()
        name = parts.config.name
        raise StoreAway(
            f"{name}: its store cannot be opened: {without_name(name, one_line(error))}"
        ) from error
    parts.resources.segment_bytes = attach.segment_bytes


async def connect(parts: DeviceParts, team: Team) -> None:
    """Have the worker connect to a store that is a connection; it serves once the lock's owner is on record.

    Raises `StoreAway` if a disk has to wait for it, otherwise `DaemonError`.
    """
    if parts.inside is None or not parts.inside.connects:
        return
    name = parts.config.name
    try:
        await parts.binding.locked_as(await team.connect())
        await team.serve()
        follow_growth(parts)
    except DaemonError as error:
        kernel = parts.resources.kernel
        if kernel is None or not kernel.is_started:
            raise
        reason = without_name(name, one_line(error))
        raise StoreAway(f"{name}: its store cannot be served: {reason}") from error


def hint_of(parts: DeviceParts) -> Hint:
    """What a backend may know before it attaches."""
    config, kernel = parts.config, parts.resources.kernel
    return Hint(
        device=config.name,
        run_dir=parts.context.run_dir,
        size_bytes=described_bytes(parts),
        max_io_bytes=config.max_io_bytes,
        placement=config.placement,
        read_only=config.read_only,
        node=kernel.node if kernel else None,
        may_create=may_create(parts),
        takes_next=parts.binding.takes_next(),
        resized_bytes=parts.resized_bytes,
        former_owner=parts.binding.owner,
        takes_over=parts.binding.takes_over(),
    )


def described_bytes(parts: DeviceParts) -> int:
    """The bytes that a backend must serve at least; 0: its own size."""
    if parts.resources.disk is None and parts.binding.takes_next():
        # The operator accepted the next store, also one that a resize has not reached.
        return parts.config.size_bytes or 0
    return size_bytes(parts) or 0


def size_bytes(parts: DeviceParts) -> int | None:
    """The disk's size, or the one that it is to be made with; None: the backend's."""
    disk = parts.resources.disk
    return disk.size_bytes if disk else wanted_bytes(parts.config, parts.binding.resized_bytes) or None


def may_create(parts: DeviceParts) -> bool:
    """Whether an empty store may be made; not for a disk that an earlier daemon served from an unknown store."""
    has_disk = parts.life.state not in ("waiting", "failed")
    return parts.binding.may_create() and not (has_disk and parts.binding.store is None)
