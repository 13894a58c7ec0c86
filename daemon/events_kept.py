"""The events of one daemon with its file, from the daemon's start to its end.

Owns the events that tell of that start and end, and the task that writes.  Runs on the supervisor's asyncio loop.
"""

import os
from pathlib import Path

from ublkpool import __version__
from ublkpool.daemon.events.keeper import EventKeeper, Runner, earlier_events, has_died
from ublkpool.daemon.events.kinds import DaemonStarted, DaemonStopped
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.processes.background import Background


class EventsKept:
    """The daemon's events, which are written from now on."""

    def __init__(self, directory: Path, runner: Runner, bytes_max: int) -> None:
        """Read the events of the daemons before from the state directory; a failure is logged."""
        earlier = earlier_events(directory, bytes_max)
        self.events = Events(bytes_max, earlier)
        self._keeper = EventKeeper(self.events, directory, runner, bytes_max)
        self._background = Background("events")
        self._background.spawn(self._keeper.keep())
        died = has_died(earlier)
        pid = os.getpid()
        started = DaemonStarted(version=__version__, pid=pid, after_death=died)
        after = ", after one that has told no end" if died else ""
        self.events.record(started, f"daemon started, process {pid}, version {__version__}{after}")

    async def end(self, leaves: bool) -> None:
        """The daemon ends, with or without its devices: write what is left, if that is possible."""
        text = "daemon stopped; its devices are left to the next one" if leaves else "daemon stopped"
        self.events.record(DaemonStopped(leaves=leaves), text)
        self._background.cancel()
        await self._keeper.flush()
