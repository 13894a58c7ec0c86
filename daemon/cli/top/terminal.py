"""The terminal: whether it can be drawn on, what it can show, and that it is usable again however the command ends.

Owns the signal handlers.  In an ordered end the library restores the terminal.  Where that end does not come, because
the terminal accepts no output, this module restores the terminal and ends the process.
"""

import locale
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import click

from ublkpool.daemon.cli.top.text import ASCII, UNICODE, Marks

END_S = 1.0
"""How long an ordered end may take after a signal."""
HANGUP = signal.SIGHUP
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_RESTORE = b"\x1b[<u" + b"".join(
    b"\x1b[?%s" % each
    for each in (b"1000l", b"1003l", b"1015l", b"1006l", b"2004l", b"1004l", b"7h", b"1049l", b"25h")
)
"""Kitty's keyboard protocol, mouse, paste and focus reports off; line wrap, the first screen and the cursor on."""


def check_terminal() -> None:
    """Raise `click.UsageError` unless keys can be read and a screen be drawn here."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    if (
        all(each is not None and each.isatty() for each in streams)
        and os.environ.get("TERM", "dumb") != "dumb"
    ):
        return
    raise click.UsageError(
        "top needs a terminal for its input and output that can do more than TERM=dumb; "
        "elsewhere use: ublkpool stats --watch, with --json for scripts"
    )


def marks(is_ascii: bool) -> Marks:
    """The characters that this terminal can show: those of UTF-8, except on the console of Linux."""
    if is_ascii or os.environ.get("TERM") == "linux":
        return ASCII
    with suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "")
    return UNICODE if locale.nl_langinfo(locale.CODESET).upper() == "UTF-8" else ASCII


def is_gone() -> bool:
    """Whether the terminal was closed, also where SIGHUP is ignored (nohup)."""
    poll = select.poll()
    poll.register(sys.__stdin__.fileno() if sys.__stdin__ is not None else 0, select.POLLIN)
    return any(events & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))


class Ending:
    """Ends the command by a signal."""

    def __init__(self) -> None:
        self.signal = 0
        self._terminal = os.dup(0)
        self._before = termios.tcgetattr(self._terminal)
        self._end: Callable[[], None] | None = None

    def when_asked(self, end: Callable[[], None]) -> None:
        """Call `end`, which begins an ordered end and does not wait, when a signal has come."""
        self._end = end
        if self.signal:
            end()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        if is_gone():
            os._exit(128 + number)
        if not self.signal:
            self.signal = number
            timer = threading.Timer(END_S, self.force)
            timer.daemon = True
            timer.start()
            if self._end is not None:
                self._end()

    def force(self) -> None:
        """Restore the terminal and end the process at once."""
        with suppress(termios.error):
            # Output that no reader takes would be in the way.
            termios.tcflush(self._terminal, termios.TCOFLUSH)
            termios.tcsetattr(self._terminal, termios.TCSANOW, self._before)
        with suppress(OSError):
            os.set_blocking(self._terminal, False)
            os.write(self._terminal, _RESTORE)
            os.set_blocking(self._terminal, True)
        os._exit(128 + self.signal)

    def close(self) -> None:
        """Let the terminal go."""
        os.close(self._terminal)


@contextmanager
def ends_by_signals() -> Iterator[Ending]:
    """Handle the signals that end it within the block."""
    ending = Ending()
    before = {each: signal.getsignal(each) for each in _SIGNALS}
    for each in _SIGNALS:
        # A signal that the caller ignores, such as SIGHUP under nohup, stays ignored.
        if before[each] != signal.SIG_IGN:
            signal.signal(each, ending.on_signal)
    try:
        yield ending
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        ending.close()
