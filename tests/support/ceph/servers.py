"""The processes of a test's cluster: started, killed and found again by a record in the cluster's directory.

Owns the record there: names, pids and start times, so that another command ends exactly the recorded processes.
"""

import json
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from support.ceph.programs import program
from support.stopping import wait_until_stopped

_END_S = 60.0


class NoServer(Exception):
    """No server of this name runs, or one that should not run does."""


class Servers:
    """What runs for the cluster in `directory`; `prefix` is put before each command."""

    def __init__(self, directory: Path, prefix: Sequence[str], *, outlive_us: bool) -> None:
        """With `outlive_us` the servers go on when this process ends; else the kernel kills them then."""
        self._directory = directory
        self._prefix = [*prefix] if outlive_us else [*prefix, "setpriv", "--pdeathsig", "KILL", "--"]
        self._record = directory / "processes.json"
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        """Start `mon.a` or `osd.0`, which must not run."""
        if name in self.alive():
            raise NoServer(f"{name} runs already")
        kind, _, number = name.partition(".")
        command = [*self._prefix, program(f"ceph-{kind}"), "-i", number, "-f", *arguments]
        with (self._directory / f"{name}.out").open("ab") as out:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        if former := self._children.pop(name, None):
            former.wait()
        self._children[name] = child
        self._write({**self.recorded(), name: [child.pid, _started_at(child.pid)]})

    def recorded(self) -> dict[str, list[int]]:
        """Pid and start time of each server, dead ones as well until `kill`."""
        try:
            found: dict[str, list[int]] = json.loads(self._record.read_text())
        except FileNotFoundError:
            return {}
        return found

    def alive(self) -> list[str]:
        """The names of those that run."""
        return [name for name, (pid, at) in self.recorded().items() if _is_alive(pid, at)]

    def pid(self, name: str) -> int:
        """The process of a server."""
        return self._found(name)[0]

    def end(self) -> None:
        """`kill -9` of all of them."""
        self.kill(*self.recorded())
        # Those that another process has killed.
        for child in self._children.values():
            child.wait()
        self._children.clear()

    def kill(self, *names: str) -> None:
        """`kill -9`, and wait until they have ended."""
        for name in names:
            _signal(*self._found(name), signal.SIGKILL)
        for name in names:
            _wait_for_end(*self._found(name))
            if child := self._children.pop(name, None):
                child.wait()
        self._write({name: each for name, each in self.recorded().items() if name not in names})

    def pause(self, name: str) -> None:
        """Let it do nothing, with its connections open, until `resume`."""
        pid, started_at = self._found(name)
        _signal(pid, started_at, signal.SIGSTOP)
        wait_until_stopped(pid)

    def resume(self, name: str) -> None:
        """Let it go on."""
        _signal(*self._found(name), signal.SIGCONT)

    def _found(self, name: str) -> tuple[int, int]:
        if name not in (recorded := self.recorded()):
            raise NoServer(f"{name} was not started; these were: {' '.join(recorded)}")
        pid, started_at = recorded[name]
        return pid, started_at

    def _write(self, recorded: dict[str, list[int]]) -> None:
        self._record.write_text(json.dumps(recorded))


def _started_at(pid: int) -> int:
    """The start time, in clock ticks since the boot: with the pid it names one process only."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19])


def _is_alive(pid: int, started_at: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return False
    return int(text[19]) == started_at and text[0] not in "ZX"


def _signal(pid: int, started_at: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if _is_alive(pid, started_at):
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def _wait_for_end(pid: int, started_at: int) -> None:
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if _is_alive(pid, started_at) and not select.select([pidfd], [], [], _END_S)[0]:
                raise TimeoutError(f"process {pid} does not end after SIGKILL")
        finally:
            os.close(pidfd)
