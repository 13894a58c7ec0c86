"""`ublkpool top` in a real terminal: what it shows, and that the terminal is usable however the command ends."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakes.daemon import FakeDaemon, running_daemon
from support.fakes.top_readings import reading
from support.pty_terminal import DEADLINE_S, PtyTerminal, pty_terminal
from ublkpool.daemon.admin.wire import admin_socket
from ublkpool.daemon.cli.commands import INTERRUPTED

# Tests that run in the background of a script inherit that SIGINT is ignored.
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
{more}
from ublkpool.daemon.cli.commands import main
main()
"""
FIRST_SCREEN_AGAIN, CURSOR_ON, MOUSE_OFF, WRAP_ON = b"\x1b[?1049l", b"\x1b[?25h", b"\x1b[?1000l", b"\x1b[?7h"
REPORTS_OFF = (b"\x1b[?1016l", b"\x1b[?2048l", b"\x1b[?2026l")


def command(run_dir: Path, *args: str, more: str = "") -> list[str]:
    return [sys.executable, "-c", START.format(more=more), "top", "--run-dir", str(run_dir), *args]


def serve(daemon: FakeDaemon) -> None:
    """Have the daemon tell of the believable devices, a reading further at each question."""
    readings = reading(12)
    asked = iter([*range(12), *[11] * 10_000])

    def stats(name: str | None) -> list[object]:
        return [each.stats for each in readings[next(asked)].interval.devices]

    daemon.service.stats = stats  # type: ignore[assignment, method-assign]
    daemon.service.list = lambda: readings[0].statuses  # type: ignore[method-assign]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running_daemon(tmp_path) as made:
        serve(made)
        yield made


def is_usable(terminal: PtyTerminal) -> bool:
    """Whether its modes are the old ones, and what the screen needed was switched off, in the end."""
    last = terminal.received.rpartition(FIRST_SCREEN_AGAIN)[2]
    switched = all(each in terminal.received for each in (MOUSE_OFF, WRAP_ON)) and CURSOR_ON in last
    return terminal.modes() == terminal.before and switched and FIRST_SCREEN_AGAIN in terminal.received


def test_it_shows_the_devices_and_outlives_the_daemon(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as first:
        serve(first)
        with pty_terminal(command(tmp_path, "--interval", "0.1")) as terminal:
            terminal.until_shown("db-journal live")
            assert terminal.modes() != terminal.before
            terminal.type("/vm\r")
            terminal.until_shown("filter: vm  4 of 10 devices")
            terminal.type("\x1b[B\r")
            terminal.until_shown(" vm-build  live  /dev/ublkb6")
            terminal.resize(140, 40)
            terminal.until_shown("BACK P99")
            # A server that is closed while a client connects leaves that connection open (asyncio of Python 3.11).
            admin_socket(tmp_path).rename(tmp_path / "gone")
            terminal.until_shown("waiting for the daemon:")
            with running_daemon(tmp_path) as second:
                serve(second)
                terminal.until(lambda: not any("waiting for the daemon" in line for line in terminal.text()))
                terminal.type("\x1b")
                terminal.until_shown("vm-alpine  live")
                stop_and_go_on(terminal)
                terminal.type("q")
                assert terminal.end() == 0
                terminal.until(lambda: is_usable(terminal))
                assert b"Traceback" not in terminal.received


def stop_and_go_on(terminal: PtyTerminal) -> None:
    """Ctrl-Z gives the terminal back, and fg takes it again."""
    terminal.type("\x1a")
    terminal.until(lambda: terminal.state() == "T")
    terminal.until(lambda: is_usable(terminal))
    terminal.received = b""
    terminal.process.send_signal(signal.SIGCONT)
    terminal.until_shown("vm-alpine  live")
    terminal.until(lambda: terminal.modes() != terminal.before)


@pytest.mark.parametrize(
    ("number", "status", "term"),
    [
        (signal.SIGTERM, 128 + signal.SIGTERM, "xterm"),
        (signal.SIGINT, INTERRUPTED, "linux"),
        (signal.SIGHUP, 128 + signal.SIGHUP, "xterm-256color"),
    ],
)
def test_a_signal_leaves_the_terminal_usable(daemon: FakeDaemon, number: int, status: int, term: str) -> None:
    with pty_terminal(command(daemon.run_dir), TERM=term) as terminal:
        terminal.until_shown("db-journal live")
        assert all(line.isascii() for line in terminal.text()) == (term == "linux")
        terminal.process.send_signal(number)
        assert terminal.end() == status
        terminal.until(lambda: is_usable(terminal))
        assert b"Traceback" not in terminal.received


NOHUP = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"


@pytest.mark.parametrize("more", ["", NOHUP], ids=["", "nohup"])
def test_it_ends_with_its_terminal(daemon: FakeDaemon, more: str) -> None:
    with pty_terminal(command(daemon.run_dir, more=more)) as terminal:
        terminal.until_shown("db-journal live")
        terminal.hang_up()
        assert terminal.process.wait(DEADLINE_S) == 128 + signal.SIGHUP


FAILS = f"""
{NOHUP}
import time
from ublkpool.daemon.cli.top import app, terminal
def run(self):
    print("drawn", flush=True)
    while not terminal.is_gone():
        time.sleep(0.01)
    raise OSError(5, "the terminal is closed")
app.Top.run = run
"""


def test_a_library_that_fails_on_the_closed_terminal_changes_nothing(daemon: FakeDaemon) -> None:
    with pty_terminal(command(daemon.run_dir, more=FAILS)) as terminal:
        terminal.until_shown("drawn")
        terminal.hang_up()
        assert terminal.process.wait(DEADLINE_S) == 128 + signal.SIGHUP


def test_a_terminal_that_takes_no_output_is_left_usable_too(daemon: FakeDaemon) -> None:
    with pty_terminal(command(daemon.run_dir, "--interval", "0.1"), columns=400, lines=100) as terminal:
        # The screen is larger than what the kernel keeps for a terminal whose reader is slow.
        terminal.until(lambda: terminal.modes() != terminal.before)
        terminal.wait_until_full()
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(DEADLINE_S) == 128 + signal.SIGTERM
        assert terminal.modes() == terminal.before
        assert os.get_blocking(terminal.slave), "the shell has the same open file"
        terminal.until(lambda: is_usable(terminal))


HANGS = """
import sys, time, tty
from ublkpool.daemon.cli.top.terminal import ends_by_signals
with ends_by_signals() as ending:
    ending.when_asked(lambda: None)
    tty.setraw(0)
    print("raw", flush=True)
    time.sleep(600)
"""


def test_an_ordered_end_that_does_not_come_is_not_waited_for() -> None:
    with pty_terminal([sys.executable, "-c", HANGS]) as terminal:
        terminal.until_shown("raw")
        assert terminal.modes() != terminal.before
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM
        terminal.until(lambda: is_usable(terminal) and all(each in terminal.received for each in REPORTS_OFF))


ENDS = """
import os, signal, threading, tty
from ublkpool.daemon.cli.top import terminal
terminal.END_S = 100_000
with terminal.ends_by_signals() as ending:
    ending.when_asked(lambda: None)
    tty.setraw(0)
    os.kill(os.getpid(), signal.SIGTERM)
    [timer] = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
timer.join()
ending.force()
print("goes on", flush=True)
"""


def test_an_ordered_end_restores_the_modes_and_ends_the_wait_for_it() -> None:
    with pty_terminal([sys.executable, "-c", ENDS]) as terminal:
        assert terminal.end() == 0
        terminal.until_shown("goes on")
        assert terminal.modes() == terminal.before


def test_a_dumb_terminal_and_an_absent_daemon_are_one_line(tmp_path: Path) -> None:
    with pty_terminal(command(tmp_path), columns=300, TERM="dumb") as terminal:
        assert terminal.end() == 2
        terminal.until(lambda: terminal.text()[0].startswith("ublkpool: top needs a terminal"))
        assert terminal.text()[1] == ""
    with pty_terminal(command(tmp_path), columns=300) as terminal:
        assert terminal.end() == 1
        terminal.until(lambda: "the daemon is not running; start it with" in terminal.text()[0])
        assert terminal.text()[1] == ""
        assert FIRST_SCREEN_AGAIN not in terminal.received
