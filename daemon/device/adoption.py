"""What an earlier daemon left of one device: go on with it as it is, or recover it in a new epoch.

Owns reading a device's record back into its parts, and trying until that is hopeless.  Which of the two is to be done,
and ending who is not to go on, is `takeover.py`'s.  The device has the turn while this runs.
"""

import asyncio
import logging
from collections.abc import Mapping

from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon.device.attachment import Attachment
from ublkpool.daemon.device.records import Record, end_left
from ublkpool.daemon.device.recovery import RETRY_PAUSE_S, RestartLimit
from ublkpool.daemon.device.resources import DeviceResources
from ublkpool.daemon.device.succession import AdoptedDevice
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError, one_line
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import ControlRunner

_log = logging.getLogger("ublkpool.device")


class Adoption:
    """One record, and the parts of a new device that are to be what it says."""

    def __init__(self, record: Record, resources: DeviceResources, attachment: Attachment) -> None:
        self._record = record
        self._resources = resources
        self._attachment = attachment

    async def go_on(self, adopted: AdoptedDevice) -> Team:
        """The team of what was left running, with its backend.  Raises `DaemonError`, `PoolError`, `OSError`."""
        self._attachment.segments = self._record.segments
        team = await self._resources.adopt(adopted)
        self._attachment.session = session = adopted.session()
        if session is not None:
            self._resources.pool.had_by(session.uid)
        await self._settle_backend(team)
        return team

    async def _settle_backend(self, team: Team) -> None:
        """Bring workers and backend, who may have been told different things, to the same."""
        tokens = {each.token for each in await team.report()}
        session = self._attachment.session
        if session is not None:
            self._attachment.adopt(session, team)
            if tokens != {session.token.hex()}:
                self._attachment.cut_off_soon()
        elif tokens != {""}:
            record = self._record
            await end_left([record], spare=[each for each in record.processes if each.role != "backend"])
            await team.lost()

    async def find(self, runner: ControlRunner, held: Mapping[str, int]) -> bool:
        """Whether the kernel has a device to be recovered; else what it has is removed.  Raises `DaemonError`."""
        record, resources = self._record, self._resources
        assert record.device_number is not None
        name, number = record.config.name, record.device_number
        kernel = await BlockDevice.find(runner, name, number, record.device_mark)
        resources.kernel, resources.disk = kernel, record.disk
        self._attachment.segments = record.segments
        wanted = record.config.recovery != "none" and not record.going
        if kernel is not None and wanted and kernel.is_started:
            await resources.find_area(record, held)
            return True
        await resources.discard()
        return False

    async def recover(self, limit: RestartLimit) -> Team:
        """The first team of this daemon's.  Raises `DaemonError` if the device is to be given up."""
        name, reason = self._record.config.name, ""
        while not limit.died():
            try:
                return await self._resources.begin_again(self._record.epoch)
            except (DaemonError, PoolError, OSError) as error:
                reason = one_line(error)
                _log.error("%s: left by an earlier daemon: %s; trying again", name, reason)
                await asyncio.sleep(RETRY_PAUSE_S)
        raise DaemonError(f"left by an earlier daemon, and not to be recovered: {reason}")
