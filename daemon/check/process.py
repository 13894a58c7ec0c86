"""The backend's process as a user starts it, and its log."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ublkpool.daemon.processes.children import describe_exit

_LOG_LINES = 6
_LOG_BYTES = 4096


Options = Mapping[str, str | list[str]]


RUN_DIR, DEVICE = "{run_dir}", "{device}"
"""In the command line of a backend in another language, the places of the run directory and the device's name."""


class Command(NamedTuple):
    """`ublkpool backend KIND KEY=VALUE ...`, or the whole command line of a program in another language."""

    kind: str
    options: Options
    arguments: tuple[str, ...] = ()
    """More options of `ublkpool backend`."""

    def line(self, device: str, run_dir: Path, transport: str) -> list[str]:
        """The command line.  Raises `ValueError` for a program's whose quotes do not match."""
        if RUN_DIR in self.kind:
            words = shlex.split(self.kind)
            return [
                each.replace(RUN_DIR, str(run_dir)).replace(DEVICE, device) for each in words
            ] + self.pairs()
        return [
            *(sys.executable, "-m", "ublkpool.daemon", "backend", self.kind, "--device", device),
            *("--run-dir", str(run_dir), "--transport", transport, "--log-format", "human"),
            *self.arguments,
            "--",
            *self.pairs(),
        ]

    def pairs(self) -> list[str]:
        """The options as KEY=VALUE; one that was given several times comes several times."""
        several = {key: [each] if isinstance(each, str) else each for key, each in self.options.items()}
        return [f"{key}={value}" for key, values in several.items() for value in values]


class BackendProcess:
    """One life of the backend; its stderr is appended to a file."""

    def __init__(self, line: list[str], log: Path) -> None:
        """Starts it.  Raises `OSError`."""
        self._log = log
        with log.open("ab") as stderr:
            self._from = stderr.tell()
            self._child = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._child.poll()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._child.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Kill it if it runs, and reap it."""
        self._child.kill()
        self._child.wait()

    def obituary(self) -> str:
        """How it ended, with its last line."""
        words = last_words(self._log, self._from)
        status = self.status
        how = "still runs" if status is None else describe_exit(status if status >= 0 else 128 - status)
        return f"{how}: {words[-1]}" if words else how


def last_words(log: Path, start: int = 0) -> list[str]:
    """The last lines of a log, none from before the byte `start`."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _LOG_BYTES))
        return file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
