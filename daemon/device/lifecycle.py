"""The state of one device, the reason for it, and the turn to change it.

Owns these and the calls that wait for a change; `device.py` decides the next state, `parts.py` puts it on record.  Runs
on the supervisor's asyncio loop.
"""

import asyncio
from collections.abc import Callable

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.status import State


class Lifecycle:
    """A device's state, and the turn to change it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.state: State = "waiting"
        self.reason = ""
        """Why the device failed, or could not be started."""
        self.trouble = ""
        """Why the device is being recovered."""
        self.is_served = True
        """False after a takeover until a backend serves, and while the attached one has queues left to greet."""
        self.is_stopping = False
        # Attach, farewell, recovery and deletion each hold this lock, so that each finds a device at rest.
        self.turn = asyncio.Lock()
        self.on_change: Callable[[], None] = lambda: None
        """Called after every change of the state."""
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Wake the calls of `live`, and tell the observer."""
        self._changed.set()
        self.on_change()

    def give_up(self) -> None:
        """Another `Device` takes the place of this one: the calls of `live` end."""
        self.is_stopping = True
        self._changed.set()

    @property
    def shown(self) -> State:
        """The state that users are told: a device that the kernel has live and no backend serves is recovering."""
        return "recovering" if self.state == "live" and not self.is_served else self.state

    def serve(self, is_served: bool) -> None:
        """See `is_served`."""
        self.is_served = is_served
        self.changed()

    async def live(self) -> None:
        """Return when the device is live and served.  Raises `DaemonError` with the reason if it fails first."""
        while self.shown in ("waiting", "recovering", "quiesced") and not self.is_stopping:
            self._changed.clear()
            await self._changed.wait()
        if self.state != "live":
            raise DaemonError(f"{self._name}: {self.reason or 'the device is being deleted'}")

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Return when this holds, which only a change of the state makes it."""
        while not is_so():
            self._changed.clear()
            await self._changed.wait()

    async def settled(self) -> None:
        """Return when no task changes the device."""
        async with self.turn:
            return
