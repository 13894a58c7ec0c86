"""What an earlier daemon left of one device: read back into its parts, to go on with or to recover.

Owns that workers and backend know the same before the device goes on.  `takeover.py` chooses between the two, and has
ended the processes of a device that is recovered.  The caller has the device's turn.
"""

from collections.abc import Mapping, Sequence

from ublkpool.daemon.device.attached_backend import why_data_is_lost
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.records import Record, end_left
from ublkpool.daemon.device.resize import follow_growth
from ublkpool.daemon.device.succession import AdoptedDevice
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.workers import messages


async def go_on(parts: DeviceParts, record: Record, held: Mapping[str, int]) -> Team:
    """The team of what was left running, with its backend.  Raises `DaemonError`, `PoolError`, `OSError`."""
    adopted = await AdoptedDevice.of(record, held, parts.context.runner)
    parts.backend.segments = record.segments
    if parts.inside is not None:
        parts.inside.resume(held)
    team = await parts.resources.adopt(adopted, _disk_of(parts, record))
    parts.backend.session = session = adopted.session()
    if session is not None:
        parts.backend.watch(session)
        parts.resources.pool.had_by(session.uid)
        parts.resources.segment_bytes = session.attach.segment_bytes
    standings = await team.report()
    if record.drain_is_open and any(each.has_let_go for each in standings):
        # The earlier daemon ended before its workers knew that the device was drained.
        parts.hold("")
    if parts.inside is not None and parts.inside.connects and team.unlinked():
        raise DaemonError(f"{parts.config.name}: its worker has not served its store yet")
    await _agree_on_backend(parts, record, team, standings)
    if session is None:
        follow_growth(parts)
    if team.can_hold:
        # The same of a drain or a resume.
        await team.hold(parts.resources.holds)
    if team.can_set_deadlines:
        # The earlier daemon may have died between the record of new ones and the workers.
        await team.set_deadlines(parts.config)
    return team


async def _agree_on_backend(
    parts: DeviceParts, record: Record, team: Team, standings: Sequence[messages.Standing]
) -> None:
    """End a backend that some workers know and others do not: the earlier daemon died while it introduced it."""
    tokens = {each.token for each in standings}
    session = parts.backend.session
    if session is not None:
        parts.backend.hold(session)
        parts.backend.await_greetings(team)
        if tokens != {session.token.hex()}:
            parts.backend.cut_off_soon()
    elif tokens != {""}:
        await end_left([record], spare=[each for each in record.processes if each.role != "backend"])
        await team.lost()


def _disk_of(parts: DeviceParts, record: Record) -> Disk | None:
    """The disk on record, with the size that a resize has put into the state directory before anything else."""
    return record.disk.grown(parts.binding.resized_bytes) if record.disk else None


async def find(parts: DeviceParts, record: Record, held: Mapping[str, int]) -> bool:
    """Whether the kernel has a device to be recovered; else what it has is removed.  Raises `DaemonError`."""
    resources = parts.resources
    assert record.device_number is not None
    name, number = record.config.name, record.device_number
    kernel = await BlockDevice.find(parts.context.runner, name, number, record.device_mark)
    resources.kernel, resources.disk, resources.epoch = kernel, _disk_of(parts, record), record.epoch
    parts.backend.segments = record.segments
    if parts.inside is not None:
        parts.inside.resume(held)
    wanted = record.config.recovery != "none" and not record.going
    if kernel is not None and wanted and kernel.is_started:
        await resources.find_area(record, held)
        return True
    await resources.discard()
    return False


def data_lost(parts: DeviceParts, record: Record) -> str:
    """Why no backend can serve the device any more: the data ended with the one on record; else empty."""
    if record.data_lost or record.served is None or parts.backend.session is not None:
        return record.data_lost
    return why_data_is_lost(record.served.attach)


async def learn(parts: DeviceParts, record: Record) -> None:
    """Remember the store that the earlier daemon served the device from, if none is remembered."""
    served, backend = record.served, parts.config.backend
    await parts.binding.learn(
        served.attach if served else None,
        record.disk.size_bytes if record.disk else 0,
        backend.kind if backend else "",
        served.generation if served else 0,
        record.disk.resized_bytes if record.disk else 0,
    )
