"""Kernel devices that a daemon of this run directory made and no record tells of.

A record can be removed, or be damaged.  Then the kernel still has the device, perhaps mounted, and no daemon knows its
name or its backend.  It is named in the log, and an operator deletes it as `lost-N`.  The daemon itself deletes none:
another daemon, in another mount namespace, may have the same path as its run directory.  Runs on the supervisor's
asyncio loop; the look at the driver is a control command.
"""

import logging
import re
from collections.abc import Callable, Collection

from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.device_commands import Owned, find_owned
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk.abi import DeviceState

_NAME = re.compile(r"lost-(\d+)\Z")
_log = logging.getLogger("ublkpool.takeover")


class LostDevices:
    """The lost devices of one daemon."""

    def __init__(self, context: DaemonContext, known: Callable[[], Collection[int]]) -> None:
        """`known` tells the marks of this daemon's devices."""
        self._runner, self._instance = context.runner, context.instance
        self._known = known

    async def report(self) -> None:
        """Name each in the log, with what can be done."""
        try:
            # A device that this daemon has just removed is not there at the second look.
            first = await self._find()
            lost = [each for each in await self._find() if each in first] if first else []
        except DaemonError as error:
            _log.warning("whether the kernel has lost devices is not known: %s", error)
            return
        for each in lost:
            _log.error("%s", _words(each))

    async def record(self, name: str) -> Record | None:
        """A record with which the device of this name, `lost-N`, can be deleted; None for any other name.

        Raises `DaemonError`.
        """
        match = _NAME.match(name)
        if match is None:
            return None
        for each in await self._find():
            if each.number == int(match[1]):
                return Record(
                    config=DeviceConfig(name=name),
                    device_number=each.number,
                    device_mark=each.mark,
                    going=True,
                )
        return None

    async def _find(self) -> list[Owned]:
        found = await self._runner.run(
            "the look for lost devices", Call(find_owned, self._instance), list[Owned]
        )
        known = self._known()
        return [each for each in found if each.mark not in known]


def _words(lost: Owned) -> str:
    number, way_out = lost.number, f"delete it with: ublkpool del lost-{lost.number}"
    about = f"kernel device {number} is of a daemon of this run directory (process {lost.server_pid}) and on no record"
    if lost.state == DeviceState.DEAD:
        return f"{about}: it has no disk: {way_out}"
    return (
        f"{about}: requests to /dev/ublkb{number} may wait for ever, its store is untouched: unmount it, {way_out}, "
        f"then add the device again"
    )
