"""While the machine goes down: a device without a backend fails its requests, since no backend will come, and no
request waits for limits.

Owns that decision.  Otherwise the umount of a file system on such a device, and with it the shutdown, would wait for
ever, or for as long as the limits make the last dirty data take.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Protocol

from ublkpool.daemon.events.kinds import RequestsFail
from ublkpool.daemon.events.tell import DeviceEvents

PATIENCE_S = 3.0
"""How long a device may lack its backend, so that one which is just restarted loses no request."""
LOOK_S = 0.5
_log = logging.getLogger("ublkpool.supervisor")


class Absentable(Protocol):
    """A device that may lack its backend."""

    @property
    def name(self) -> str:
        """The device's name."""

    @property
    def lacks_backend(self) -> bool:
        """Whether requests wait for a backend to attach."""

    @property
    def events(self) -> DeviceEvents:
        """Takes what happens to the device."""

    def lift_limits(self) -> None:
        """From now on no request waits for the device's limits."""

    def give_up(self) -> None:
        """Fail the requests that wait for a backend, and new ones, until one attaches."""


class GoingDown:
    """The watch over all devices from the announcement of the shutdown on."""

    def __init__(self, devices: Callable[[], Collection[Absentable]], clock: Callable[[], float]) -> None:
        """`devices` gives the daemon's present devices; `clock` is in seconds."""
        self._devices = devices
        self._clock = clock
        self._absent_since_s: dict[str, float] = {}
        self._said: set[str] = set()

    def look(self) -> None:
        """Lift the limits of all devices, and give up each that has lacked its backend for `PATIENCE_S`."""
        for device in self._devices():
            # At each look: a change of the device's settings may have set them again.
            device.lift_limits()
            if not device.lacks_backend:
                self._absent_since_s.pop(device.name, None)
                self._said.discard(device.name)
                continue
            since_s = self._absent_since_s.setdefault(device.name, self._clock())
            if self._clock() - since_s >= PATIENCE_S:
                self._say_once(device)
                # At each look: a recovery may have replaced the workers that were told.
                device.give_up()

    def _say_once(self, device: Absentable) -> None:
        if device.name not in self._said:
            self._said.add(device.name)
            text = "no backend, and the machine goes down: requests fail"
            device.events.tell(_log, RequestsFail(why="machine-goes-down", after_s=PATIENCE_S), text)

    async def watch(self) -> None:
        """Look every `LOOK_S`, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)
