"""What an earlier daemon left of one device: go on with it as it is, or recover it in a new epoch.

Owns reading a device's record back into its parts, and trying until that is hopeless.  Which of the two is to be done,
and ending who is not to go on, is `takeover.py`'s.  The device has the turn while this runs.
"""

import asyncio
import logging
from collections.abc import Mapping

from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon.attachment import Attachment
from ublkpool.daemon.block_device import BlockDevice
from ublkpool.daemon.control_process import ControlRunner
from ublkpool.daemon.errors import DaemonError, one_line
from ublkpool.daemon.machinery import Machinery
from ublkpool.daemon.records import Record, end_left
from ublkpool.daemon.recovery import RETRY_PAUSE_S, Strikes
from ublkpool.daemon.succession import Heir
from ublkpool.daemon.team import Team

_log = logging.getLogger("ublkpool.device")


class Adoption:
    """One record, and the parts of a new device that are to be what it says."""

    def __init__(self, record: Record, machinery: Machinery, attachment: Attachment) -> None:
        self._record = record
        self._machinery = machinery
        self._attachment = attachment

    async def go_on(self, heir: Heir) -> Team:
        """The team of what was left running, with its backend.  Raises `DaemonError`, `PoolError`, `OSError`."""
        self._attachment.segments = self._record.segments
        team = await self._machinery.adopt(heir)
        self._attachment.session = session = heir.session()
        if session is not None:
            self._machinery.pool.had_by(session.uid)
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
        record, machinery = self._record, self._machinery
        assert record.device_number is not None
        name, number = record.config.name, record.device_number
        kernel = await BlockDevice.find(runner, name, number, record.device_mark)
        machinery.kernel, machinery.disk = kernel, record.disk
        self._attachment.segments = record.segments
        wanted = record.config.recovery != "none" and not record.going
        if kernel is not None and wanted and kernel.is_started:
            await machinery.find_area(record, held)
            return True
        await machinery.discard()
        return False

    async def recover(self, strikes: Strikes) -> Team:
        """The first team of this daemon's.  Raises `DaemonError` if the device is to be given up."""
        name, reason = self._record.config.name, ""
        while not strikes.died():
            try:
                return await self._machinery.begin_again(self._record.epoch)
            except (DaemonError, PoolError, OSError) as error:
                reason = one_line(error)
                _log.error("%s: left by an earlier daemon: %s; trying again", name, reason)
                await asyncio.sleep(RETRY_PAUSE_S)
        raise DaemonError(f"left by an earlier daemon, and not to be recovered: {reason}")
