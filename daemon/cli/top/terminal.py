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
import time
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
    for each in (
        *(b"1000l", b"1003l", b"1015l", b"1006l", b"1016l", b"2004l", b"1004l", b"2048l", b"2026l"),
        *(b"7h", b"1049l", b"25h"),
    )
)
"""Kitty's keyboard protocol, reports of mouse, paste, focus and size, and held-back output off.

Line wrap, the first screen and the cursor on.
"""
_WRITE_TRIES, _WRITE_PAUSE_S = 25, 0.02


def check_terminal() -> None:
    """Raise `click.UsageError` unless keys can be read and a screen be drawn here."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    if (
        all(each is not None and each.isatty() for each in streams)
        and os.environ.get("TERM", "dumb") != "dumb"
    ):
        return
    raise click.UsageError(
        "top needs a terminal that can do more than TERM=dumb as its stdin, stdout and stderr; "
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
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        """Held by a thread that uses the terminal, so that another does not close it meanwhile."""
        self._is_closed = False

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
            self._timer = threading.Timer(END_S, self.force)
            self._timer.daemon = True
            self._timer.start()
            if self._end is not None:
                self._end()

    def force(self) -> None:
        """Restore the terminal and end the process at once; nothing if `close` was called before."""
        with self._lock:
            if self._is_closed:
                return
            try:
                with suppress(OSError):
                    self._write_restore()
                self._restore_modes()
            finally:
                os._exit(128 + self.signal)

    def close(self) -> None:
        """Restore the terminal's modes, which the library does not know after SIGSTOP and SIGCONT; let it go."""
        with self._lock:
            self._is_closed = True
            self._restore_modes()
            os.close(self._terminal)
        if self._timer is not None:
            self._timer.cancel()

    def _write_restore(self) -> None:
        # A thread that waits in a write holds the kernel's lock for writers.  When it is woken it leaves the write only
        # if there is room, or if the terminal does not block.
        os.set_blocking(self._terminal, False)
        try:
            for _ in range(_WRITE_TRIES):
                self._make_room()
                with suppress(BlockingIOError):
                    if os.write(self._terminal, _RESTORE) == len(_RESTORE):
                        return
                time.sleep(_WRITE_PAUSE_S)
        finally:
            # Others, such as the shell, have the same open file.
            os.set_blocking(self._terminal, True)

    def _make_room(self) -> None:
        """Drop output that no reader takes, and wake the thread that waits in a write."""
        if self._is_in_front():
            with suppress(termios.error):
                termios.tcflush(self._terminal, termios.TCOFLUSH)
                # The flush wakes no writer (tty_buffer_flush), the end of a stop does (__start_tty).
                termios.tcflow(self._terminal, termios.TCOOFF)
                termios.tcflow(self._terminal, termios.TCOON)

    def _restore_modes(self) -> None:
        """Restore the modes from before the start; another job that has the terminal by now has modes of its own."""
        if self._is_in_front():
            with suppress(termios.error):
                termios.tcsetattr(self._terminal, termios.TCSANOW, self._before)

    def _is_in_front(self) -> bool:
        """Whether this job has the terminal; the kernel stops another that changes it (SIGTTOU)."""
        try:
            return os.tcgetpgrp(self._terminal) == os.getpgrp()
        except OSError:
            return True


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
        ending.close()
        for each, handler in before.items():
            signal.signal(each, handler)
