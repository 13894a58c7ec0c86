"""What a daemon leaves for the next one: a record per device in the run directory, and the processes it started.

Owns the files `RUN_DIR/devices/NAME.json` and telling a recorded process from a later one with the same number.  A
record is written before it is needed and replaced as a whole, so that a daemon killed at any moment leaves a true one.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from ublkpool.daemon.config import DeviceConfig
from ublkpool.daemon.disk import Disk

Role = Literal["worker", "backend", "broker"]
_log = logging.getLogger("ublkpool.records")
PATIENCE_S = 10.0
_START_TIME_FIELD = 19
"""Of /proc/PID/stat, counted from the field after the name (proc_pid_stat(5): field 22)."""


class Process(msgspec.Struct, frozen=True):
    """A process, told from all others by when it started (clock ticks since boot)."""

    role: Role
    pid: int
    start_ticks: int


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A device that exists in the kernel."""

    config: DeviceConfig
    device_number: int
    disk: Disk
    epoch: int
    processes: tuple[Process, ...] = ()


class Records:
    """The records of one run directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, record: Record) -> None:
        """Write or replace the device's record."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        path = self._path(record.config.name)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(record))
        fresh.replace(path)

    def forget(self, name: str) -> None:
        """The device is no more."""
        self._path(name).unlink(missing_ok=True)

    def load(self) -> list[Record]:
        """All records; one that cannot be read is logged and left out."""
        found = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Record))
            except (msgspec.DecodeError, OSError) as error:
                _log.error("%s: not a record: %s", path, error)
        return found

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def identify(role: Role, pid: int) -> Process | None:
    """The process with this number now; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return Process(role, pid, int(fields[_START_TIME_FIELD]))


async def end_left(records: Sequence[Record]) -> None:
    """End every process that these records know: workers at once, the others with time to finish what they do."""
    processes = {each for record in records for each in record.processes}
    await asyncio.gather(*(_end(each) for each in processes))


async def _end(process: Process) -> None:
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(process.pid)
        try:
            # Asked after the pidfd was opened: from here on the number cannot change hands unnoticed.
            if identify(process.role, process.pid) != process:
                return
            if process.role != "worker":
                signal.pidfd_send_signal(fd, signal.SIGTERM)
                if await _exits(fd, PATIENCE_S):
                    return
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            await _exits(fd, None)
        finally:
            os.close(fd)


async def _exits(pidfd: int, timeout_s: float | None) -> bool:
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await asyncio.wait_for(gone.wait(), timeout_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True
