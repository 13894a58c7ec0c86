"""`ublkpool stats --watch`: reads the counters at each interval's end, also of the next daemon.

Owns the loop; `rates.py` computes, `watch_views.py` shows.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ublkpool.client import Client
from ublkpool.daemon.cli.reader import check_reader, ends_with_reader, wait_while_read
from ublkpool.daemon.cli.watch_views import View, make_view
from ublkpool.daemon.errors import DaemonError, DaemonUnreachable, RemoteError
from ublkpool.daemon.events.event import shown_time
from ublkpool.daemon.rates import Meter, following
from ublkpool.daemon.status import DeviceStats

RETRY_S_MAX = 1.0
"""Seconds after which an absent daemon is asked again, if the interval is not shorter."""


def watch(name: str | None, interval_s: float, as_json: bool, run_dir: Path) -> None:
    """Show the rates of the device, or of all, until SIGINT or until no process reads them.

    Raises `DaemonError` if the daemon does not answer the first time.
    """
    view = make_view(as_json)
    client = Client(run_dir, on_wait=view.say, on_idle=check_reader)
    with ends_with_reader():
        Watch(lambda: client.stats(name), view, interval_s).run()


class Watch:
    """Asks, shows and waits; tests bring their own clock."""

    def __init__(
        self,
        ask: Callable[[], Sequence[DeviceStats]],
        view: View,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = wait_while_read,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._ask = ask
        self._view = view
        self._interval_s = interval_s
        self._clock = clock
        self._wait = wait
        self._wall_clock = wall_clock
        self._meter = Meter()
        self._has_begun = False
        self._trouble: type[DaemonError] | None = None

    def run(self) -> None:
        """Never returns; ends with an exception of `wait`, of the view, or of the first question."""
        due_s = self._clock()
        while True:
            answered = self._read()
            now_s = self._clock()
            if answered:
                due_s = following(due_s, now_s, self._interval_s)
            else:
                due_s = now_s + min(self._interval_s, RETRY_S_MAX)
            self._wait(due_s - now_s)

    def _read(self) -> bool:
        """Ask once and show the answer; False if there is none."""
        try:
            devices = self._ask()
        except (DaemonUnreachable, RemoteError) as error:
            if not self._has_begun:
                raise
            self._meter.forget()
            self._say_once(error)
            return False
        self._has_begun, self._trouble = True, None
        self._view.show(self._meter.read(devices, self._clock(), shown_time(self._wall_clock())))
        return True

    def _say_once(self, error: DaemonError) -> None:
        """Tell the user of an absence in one line, however its text changes meanwhile."""
        if type(error) is not self._trouble:
            self._trouble = type(error)
            self._view.say(f"{error}; waiting for it")
