"""A command in a terminal of its own: what the terminal shows, its modes, and its end.

Owns the pseudo terminal and the process.  An emulator (pyte) has the terminal's screen; the test's own thread feeds it
while the test waits for something.
"""

import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyte

DEADLINE_S = 120.0
_BYTES = 1 << 16


class PtyTerminal:
    """The terminal and the process that has it as its controlling terminal."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], columns: int, lines: int
    ) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.received = b""
        self.master, self.slave = os.openpty()
        self.resize(columns, lines, is_new=True)
        self.before = termios.tcgetattr(self.slave)
        # setsid makes the command the leader of a session with this terminal, as a shell's is.  Under nohup these tests
        # ignore SIGHUP, and what they start would, too.
        self.process = subprocess.Popen(
            ["env", "--default-signal=HUP", "setsid", "--ctty", *command],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=environment,
        )

    def resize(self, columns: int, lines: int, is_new: bool = False) -> None:
        """Give the terminal another size, of which the kernel tells the process."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        if not is_new:
            self.screen.resize(lines, columns)

    def text(self) -> list[str]:
        """The lines on the screen, without spaces at their ends."""
        return [line.rstrip() for line in self.screen.display]

    def type(self, text: str) -> None:
        """Type this."""
        os.write(self.master, text.encode())

    def until(self, condition: Callable[[], object]) -> None:
        """Show what comes until the condition holds."""
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end_s, "\n".join(self.text())
            self._feed(0.05)

    def until_shown(self, text: str) -> None:
        """Show what comes until a line contains the text."""
        self.until(lambda: any(text in line for line in self.text()))

    def end(self) -> int:
        """The process's exit status, once it has ended.

        What it wrote last may come later, since the kernel hands it over in a worker of its own: wait with `until`.
        """
        self.until(lambda: self.process.poll() is not None)
        return self.process.returncode

    def state(self) -> str:
        """The process's state as /proc has it, such as T for stopped."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rpartition(") ")[2][:1]

    def wait_until_full(self) -> None:
        """Return when the kernel takes no more output, which this test does not read."""
        end_s = time.monotonic() + DEADLINE_S
        poll = select.poll()
        poll.register(self.slave, select.POLLOUT)
        while poll.poll(0):
            assert time.monotonic() < end_s
            time.sleep(0.01)

    def modes(self) -> list[Any]:
        """The terminal's modes now, as termios has them."""
        return termios.tcgetattr(self.slave)

    def hang_up(self) -> None:
        """Close the terminal, as a window manager or a lost connection does."""
        for each in (self.slave, self.master):
            os.close(each)
        self.slave = self.master = -1

    def close(self) -> None:
        """End the process if it still runs, and close the terminal."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for each in (self.slave, self.master):
            if each >= 0:
                os.close(each)

    def _feed(self, wait_s: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], wait_s)
        if ready:
            found = os.read(self.master, _BYTES)
            self.received += found
            self._stream.feed(found)
        return bool(ready)


@contextmanager
def pty_terminal(
    command: Sequence[str], columns: int = 80, lines: int = 24, **environment: str
) -> Iterator[PtyTerminal]:
    """The command in a terminal of this size; in the end it does not run any more."""
    names = ("COLUMNS", "LINES", "NO_COLOR", "LC_ALL")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    terminal = PtyTerminal(
        command, {**inherited, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment}, columns, lines
    )
    try:
        yield terminal
    finally:
        terminal.close()
