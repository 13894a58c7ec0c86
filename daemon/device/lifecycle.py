"""Where one device is in its life, why, and whose turn it is to change it.

Owns nothing else of the device: its parts look here, `device.py` says what comes next.  Runs on the supervisor's
asyncio loop.
"""

import asyncio
from collections.abc import Callable

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.background import logged
from ublkpool.daemon.status import State


class Lifecycle:
    """A device's state, and the turn to change it."""

    def __init__(self, name: str, save: Callable[[], None]) -> None:
        """`save` writes down what the next daemon must know if this one is killed."""
        self._name = name
        self.state: State = "waiting"
        self.reason = ""
        """Why it failed, or could not be started."""
        self.trouble = ""
        """Why it is being recovered."""
        self.is_served = True
        """False after a takeover until a backend serves, and while an attached one has not greeted every queue."""
        self.is_stopping = False
        # Attach, farewell, recovery and deletion each find a device that none of the others is changing.
        self.turn = asyncio.Lock()
        self.save = save
        self.on_change: Callable[[], None] = lambda: None
        """Called after every change of the state."""
        self._changed = asyncio.Event()

    def enter(self, state: State) -> None:
        """The device is in this state now; it is on record before anybody is told.

        Without room for the record the device goes on: the next daemon then recovers it, where it could have gone on.
        """
        self.state = state
        with logged(self._name):
            self.save()
        self._changed.set()
        self.on_change()

    def give_up(self) -> None:
        """Another `Device` takes the place of this one."""
        self.is_stopping = True
        self._changed.set()

    @property
    def shown(self) -> State:
        """The state that users are told: a device that the kernel has live, and no backend serves, is recovering."""
        return "recovering" if self.state == "live" and not self.is_served else self.state

    def serve(self, is_served: bool) -> None:
        """See `is_served`."""
        self.is_served = is_served
        self._changed.set()
        self.on_change()

    async def live(self) -> None:
        """Return when the device is live and served.  Raises `DaemonError` with the reason if it fails first."""
        while self.shown in ("waiting", "recovering", "quiesced") and not self.is_stopping:
            self._changed.clear()
            await self._changed.wait()
        if self.state != "live":
            raise DaemonError(f"{self._name}: {self.reason or 'the device is being deleted'}")

    async def settled(self) -> None:
        """Return when nothing changes the device."""
        async with self.turn:
            return
