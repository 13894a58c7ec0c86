"""What a daemon leaves for the next one: a record of each device in the run directory, and the processes on record.

Owns the files `RUN_DIR/devices/NAME.json`.  A record is written before the step that it describes and replaced as a
whole, so that a daemon killed at any moment leaves a true one.
"""

import asyncio
import ctypes
import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

import ublkpool
from ublkpool.bufpool import wire
from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.client_area import AreaRecord
from ublkpool.daemon.processes.left_behind import Process, end_process
from ublkpool.daemon.settings.config import DeviceConfig

_log = logging.getLogger("ublkpool.records")
FIRST_EPOCH = 1
ROOM_BYTES = 16384
"""A record's file is padded to a multiple of this, mostly one."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)
NO_RECORD = (ValueError, RecursionError)
"""What msgspec raises for content that is no record: no JSON, no text, nested without end, or of another structure."""
_NOT_KNOWN = re.compile(
    r"Object contains unknown field (?P<field>`[^`]*`)|Invalid enum value (?P<value>'[^']*')"
)


class Worker(msgspec.Struct, frozen=True):
    """A queue's worker; `cpu` is the CPU that it is pinned to."""

    process: Process
    cpu: int | None


class Served(msgspec.Struct, frozen=True):
    """The backend that the workers know."""

    attach: wire.Attach
    token: str
    segment: int
    generation: int = 0
    resizes: bool = False
    """See `wire.Attach`."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A device, and whether it exists in the kernel (`device_number`)."""

    config: DeviceConfig
    device_number: int | None = None
    device_mark: int = 0
    """Tells the device from another server's with the same number; 0 if an earlier version added it."""
    disk: Disk | None = None
    epoch: int = FIRST_EPOCH
    processes: tuple[Process, ...] = ()
    """All processes that may touch the device's buffers."""
    going: bool = False
    """The device was being deleted."""
    live: bool = False
    """Whether `workers`, in the order of their queues, serve the device, so that it can go on as it is."""
    workers: tuple[Worker, ...] = ()
    served: Served | None = None
    managed: Process | None = None
    """The backend that the daemon runs itself."""
    clients: AreaRecord | None = None
    segments: int = 0
    """The highest segment number that a backend was given."""
    data_lost: str = ""
    """Why no backend can serve the device any more; it is to be removed, and listed as failed with this reason."""
    build: str = ""
    """The code that the workers run."""
    drained: bool = False
    """Requests wait, and no backend may attach, until `resume`."""
    drain_is_open: bool = False
    """With `drained`: the workers may not know it yet, and let their requests go on if the daemon ended meanwhile."""
    added: DeviceConfig | None = None
    """What the device was added with; `config` has what was set since.  None in the record of an earlier version."""


class NotRecorded(DaemonError):
    """A record could not be written: a step that must be on record waits until it can."""

    may_pass = True


class WrittenByLater(DaemonError):
    """A record uses what only a later version knows; a daemon without that record would lose the device."""

    def __init__(self, path: Path, unknown: str) -> None:
        super().__init__(
            f"{path}: a later version of ublkpool wrote it, and this one does not know {unknown}: start the later "
            f"version again, and before you go back from it set that back to its default there, or delete {path.stem}; "
            "nothing was changed, and workers and backends go on serving the devices"
        )


class Records:
    """The records of one run directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, record: Record) -> None:
        """Write or replace the device's record, which is as a whole the old or the new one.

        Raises `NotRecorded`; without room only for a device's first record, since each record reserves the room of the
        next one, so that a device on a full file system can still be recovered and removed.
        """
        path = self._path(record.config.name)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            fresh, spare = path.with_suffix(".new"), path.with_suffix(".old")
            _write(fresh, msgspec.json.encode(record))
            if path.exists():
                _exchange(fresh, path)
                return
            _write(spare, b"")
            fresh.replace(path)
            spare.replace(fresh)
        except OSError as error:
            raise NotRecorded(f"{path}: cannot be written: {explain(error)}") from error

    def forget(self, name: str) -> None:
        """Remove the record of a device that is gone."""
        for suffix in (".json", ".new", ".old"):
            self._path(name).with_suffix(suffix).unlink(missing_ok=True)

    def check(self) -> None:
        """Raise `WrittenByLater` for a later version's record, `DaemonError` if none can be listed; change nothing."""
        for path in self._paths():
            try:
                msgspec.json.decode(path.read_bytes(), type=Record)
            except NO_RECORD as error:
                if unknown := unknown_here(error):
                    raise WrittenByLater(path, unknown) from error
            except OSError:
                continue

    def load(self) -> list[Record]:
        """All records; one that cannot be read is logged and left out.  Raises what `check` raises."""
        self.check()
        found = []
        for path in self._paths():
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Record))
            except OSError as error:
                _log.error("%s: cannot be read: %s", path, error.strerror)
            except NO_RECORD as error:
                _log.error("%s: not a record: %s; it is kept as *.unreadable", path, error)
                with suppress(OSError):
                    path.replace(path.with_suffix(".unreadable"))
        return found

    def _paths(self) -> list[Path]:
        # Not `Path.glob`: it takes a directory that cannot be listed for an empty one, and the devices would be lost.
        try:
            return sorted(each for each in self._directory.iterdir() if each.suffix == ".json")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DaemonError(f"{self._directory}: {explain(error)}") from error

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def unknown_here(error: Exception) -> str:
    """The field or value of a record that only a later version knows; empty if the record is damaged."""
    found = _NOT_KNOWN.match(str(error))
    return "" if found is None else found["field"] or found["value"]


def _write(path: Path, data: bytes) -> None:
    """Fill the file with the data and spaces, which JSON allows.  Raises `OSError`."""
    size = -(-max(len(data), ROOM_BYTES) // ROOM_BYTES) * ROOM_BYTES
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
        os.pwrite(fd, data.ljust(size), 0)
        os.truncate(fd, size)
    finally:
        os.close(fd)


def _exchange(one: Path, other: Path) -> None:
    """Swap two files in one step; where the file system cannot, the first takes the second's place."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        one.replace(other)


def build_id() -> str:
    """Tells this version of the code from another: a hash of the installed files' names, sizes and times."""
    with os.scandir(Path(ublkpool.__file__).parent) as found:
        # In a checkout each of these folders is a symbolic link.
        stamps = sorted(stamp for each in found if each.is_dir() for stamp in _stamps(each.path))
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


def _stamps(folder: str) -> Iterator[tuple[str, int, int]]:
    """The path, bytes and time of change of each file of code below `folder`, as far as this user may read it."""
    with suppress(PermissionError), os.scandir(folder) as found:
        for each in found:
            if each.is_dir(follow_symlinks=False):
                yield from _stamps(each.path)
            elif each.name.endswith((".py", ".so")):
                about = each.stat()
                yield each.path, about.st_size, about.st_mtime_ns


async def end_left(records: Sequence[Record], spare: Collection[Process] = ()) -> None:
    """End every process on these records but `spare`: workers at once, the others with time to finish what they do.

    Raises `DaemonError` if one does not end when it is killed: it may still use its buffers.
    """
    processes = {each for record in records for each in record.processes} - set(spare)
    await asyncio.gather(*(end_process(each) for each in processes))


async def end_brokers(records: Sequence[Record], spare: Collection[Process]) -> None:
    """End the pool brokers on these records but `spare`.  Raises `DaemonError` as `end_left` does."""
    brokers = {each for record in records for each in record.processes if each.role == "broker"}
    await asyncio.gather(*(end_process(each) for each in brokers - set(spare)))
