"""Runs the screen on this terminal until the user or a signal ends it."""

import os
import sys
from pathlib import Path

from ublkpool.daemon.cli.top import terminal
from ublkpool.daemon.cli.top.app import Handed, Said, Top
from ublkpool.daemon.cli.top.pump import Pump
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.top.source import Source

GONE_CHECK_S = 1.0
"""How often it looks whether the terminal was closed without a signal."""


def run(run_dir: Path, interval_s: float, sort_by: str, is_ascii: bool) -> int:
    """Show the screen; returns the exit status.  Raises `DaemonError` if the daemon does not answer the first time."""
    screen: _Screen | None = None

    def say(text: str) -> None:
        if screen is None:
            print(text, file=sys.stderr)
        else:
            screen.app.post_message(Said(text))

    def check() -> None:
        if screen is not None:
            screen.pump.check()

    source = Source(run_dir, on_wait=say, on_idle=check)
    session = Session(str(run_dir), interval_s, terminal.marks(is_ascii), sort_by)
    session.take(source.read(""))
    with terminal.ends_by_signals() as ending:
        screen = _Screen(session, source, ending)
        return screen.run()


class _Screen:
    """The application, its pump, and the signals that end it."""

    def __init__(self, session: Session, source: Source, ending: terminal.Ending) -> None:
        self._ending = ending
        self.app = Top(session, self._choose, lambda: self.pump.taken(), self._begin)
        self.pump = Pump(source.read, lambda found: self.app.post_message(Handed(found)), session.interval_s)

    def run(self) -> int:
        """Until the end; the exit status.  Raises what ended the pump."""
        try:
            failure = self.app.run()
        finally:
            self.pump.end()
            # The library's threads may fail on a closed terminal before SIGHUP comes.
            self._check_terminal()
        if failure is not None:
            raise failure
        return 128 + self._ending.signal if self._ending.signal else self.app.return_code or 0

    def _begin(self) -> None:
        """On the application's loop, once it can be ended."""
        self._ending.when_asked(self.app.end_soon)
        self.app.set_interval(GONE_CHECK_S, self._check_terminal)
        self.pump.start()

    def _check_terminal(self) -> None:
        if terminal.is_gone():
            # Nothing is left to restore, and the library would wait for a terminal that takes no output.
            os._exit(128 + terminal.HANGUP)

    def _choose(self, session: Session) -> None:
        self.pump.set(session.interval_s, session.is_paused, session.looked_at)
