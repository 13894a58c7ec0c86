"""Asks the daemon for everything that one reading shows: four questions, however many devices there are.

Runs on the pump's thread, or before it starts.
"""

import time
from collections.abc import Callable
from pathlib import Path

from ublkpool import __version__
from ublkpool.client import Client
from ublkpool.daemon.cli.top.reading import Reading, Shares
from ublkpool.daemon.errors import DaemonError, DaemonUnreachable, RemoteError
from ublkpool.daemon.events.event import Event, shown_time
from ublkpool.daemon.metrics.usage import Usages
from ublkpool.daemon.rates import Meter
from ublkpool.daemon.status import DaemonStatus


class Source:
    """The daemon of one run directory, over the lives of several daemons."""

    def __init__(
        self,
        run_dir: Path,
        on_wait: Callable[[str], None] = lambda text: None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_wait` and `on_idle` are those of `Client`."""
        self._client = Client(run_dir, on_wait=on_wait, on_idle=on_idle)
        self._meter = Meter()
        self._usages = Usages()
        self._shares = Shares()
        self._last_seq = 0

    def read(self, looked_at: str) -> Reading:
        """Everything now; `looked_at` names the device whose processes are measured, empty for none.

        Raises `DaemonError`: the next reading begins anew then.
        """
        try:
            return self._read(looked_at)
        except (DaemonUnreachable, RemoteError):
            self._meter.forget()
            raise
        except DaemonError as error:
            # The daemon answers, and what it says cannot be decoded.
            raise DaemonError(
                f"{error}; this is the `ublkpool top` of version {__version__}: if the daemon is of another one, "
                "start the `ublkpool top` of its installation"
            ) from error

    def _read(self, looked_at: str) -> Reading:
        asked_ticks = self._usages.ticks()
        statuses = self._client.devices()
        stats = self._client.stats()
        at_s = time.monotonic()
        interval = self._meter.read(stats, at_s, shown_time(time.time()))
        daemon = self._daemon()
        shown = [each for each in statuses if each.name == looked_at]
        shares = self._shares.read(self._usages.of(shown, daemon, asked_ticks), time.monotonic())
        return Reading(interval, statuses, daemon, shares, self._events())

    def _daemon(self) -> DaemonStatus | None:
        """None from a daemon of an earlier version."""
        try:
            return self._client.daemon()
        except RemoteError:
            return None

    def _events(self) -> list[Event]:
        """Those since the last call; none from a daemon that tells none, such as one whose clients are too many."""
        try:
            fresh = list(self._client.events(after=self._last_seq))
        except RemoteError:
            return []
        self._last_seq = max((each.seq for each in fresh), default=self._last_seq)
        return fresh
