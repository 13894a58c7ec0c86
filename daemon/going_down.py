"""While the machine goes down: a device without a backend does not wait for the next one, for none will come.

Owns that decision only.  A file system whose data cannot be written any more would otherwise keep its umount, and with
it the whole shutdown, waiting for ever.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Protocol

PATIENCE_S = 3.0
"""How long a device may lack its backend: one that is started again in the meantime goes on as ever."""
LOOK_S = 0.5
_log = logging.getLogger("ublkpool.supervisor")


class Absentable(Protocol):
    """A device, as far as it matters here."""

    @property
    def name(self) -> str:
        """The device's name."""

    @property
    def lacks_backend(self) -> bool:
        """Whether requests wait for a backend to attach."""

    def give_up(self) -> None:
        """Fail what waits for a backend, and what comes, until one attaches."""


class GoingDown:
    """The watch over all devices, from the moment that the machine's shutdown is known."""

    def __init__(self, devices: Callable[[], Collection[Absentable]], clock: Callable[[], float]) -> None:
        """`devices` are those of the moment; `clock` is in seconds."""
        self._devices = devices
        self._clock = clock
        self._absent_since_s: dict[str, float] = {}
        self._said: set[str] = set()

    def look(self) -> None:
        """Give up each device that has lacked its backend for `PATIENCE_S`."""
        for device in self._devices():
            if not device.lacks_backend:
                self._absent_since_s.pop(device.name, None)
                self._said.discard(device.name)
                continue
            since_s = self._absent_since_s.setdefault(device.name, self._clock())
            if self._clock() - since_s >= PATIENCE_S:
                self._say_once(device.name)
                # Each time: the workers may be others than those that were told before.
                device.give_up()

    def _say_once(self, name: str) -> None:
        if name not in self._said:
            self._said.add(name)
            _log.error("%s: no backend, and the machine goes down: requests fail", name)

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)
