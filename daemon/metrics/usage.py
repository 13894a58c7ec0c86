"""CPU time and memory of the daemon's processes, from /proc/PID/stat.

Owns that no other process's numbers are shown: a process that has ended is left out, and so is one that got the number
of a process of the daemon later.  Whether it did is judged by its start (proc_pid_stat(5)): after the daemon was asked,
or another one than before.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ublkpool.daemon.status import DaemonStatus, DeviceStatus

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_USER, _SYSTEM, _START, _PAGES = 11, 12, 19, 21
"""Positions in /proc/PID/stat, counted from the field after the name, which is field 3."""


class Owner(NamedTuple):
    """What a process is to the daemon; without `device` and `queue` where it belongs to none."""

    role: str
    device: str = ""
    queue: str = ""


class ProcessUsage(NamedTuple):
    """One process: CPU time of all its threads in seconds, resident memory, start in seconds since the epoch."""

    owner: Owner
    cpu_s: float
    resident_bytes: int
    start_s: float


class Usages:
    """Reads the processes' usage; remembers their starts."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._starts: dict[tuple[Owner, int], int] = {}
        self._booted_s = _boot(proc)

    def ticks(self) -> int:
        """Now, in the unit of a process's start."""
        return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S)

    def of(
        self, devices: Sequence[DeviceStatus], daemon: DaemonStatus | None, asked_ticks: int
    ) -> list[ProcessUsage]:
        """The usage of all of these that live; the daemon was asked for them at `asked_ticks`."""
        starts: dict[tuple[Owner, int], int] = {}
        found: list[ProcessUsage] = []
        for owner, pid in _owners(devices, daemon):
            if (fields := self._read(pid)) is None:
                continue
            start = int(fields[_START])
            known = starts[owner, pid] = self._starts.get((owner, pid), start)
            if start != known or start > asked_ticks:
                continue
            cpu_s = (int(fields[_USER]) + int(fields[_SYSTEM])) / TICKS_PER_S
            resident_bytes = int(fields[_PAGES]) * PAGE_BYTES
            found.append(ProcessUsage(owner, cpu_s, resident_bytes, self._booted_s + start / TICKS_PER_S))
        self._starts = starts
        return found

    def _read(self, pid: int) -> list[str] | None:
        try:
            text = (self._proc / f"{pid}/stat").read_text(errors="replace")
        except OSError:
            return None
        fields = text.rpartition(") ")[2].split()
        return fields if len(fields) > _PAGES else None


def _boot(proc: Path) -> float:
    """When the machine was booted, in seconds since the epoch, by the kernel's btime (proc_stat(5)).

    Each exporter must find the same: a start that changed in its last digits would look like another process's.
    """
    with suppress(OSError):
        for line in (proc / "stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "btime":
                return float(value)
    # A /proc that shows processes only.
    return round(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))


def _owners(devices: Sequence[DeviceStatus], daemon: DaemonStatus | None) -> Iterator[tuple[Owner, int]]:
    for device in devices:
        for worker in device.workers:
            yield Owner("worker", device.name, str(worker.queue)), worker.pid
        if device.backend.pid is not None:
            yield Owner("backend", device.name), device.backend.pid
    for process in daemon.processes if daemon is not None else ():
        yield Owner(process.role), process.pid
