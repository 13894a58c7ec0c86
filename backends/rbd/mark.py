"""Which process is about to take an image's lock, on record in the image before it takes it.

The daemon has an owner on record from the attach on.  A process that dies between its lock and its attach is known by
its mark instead: a successor for the same device of the same daemon sees that the process is gone, and breaks its lock.
Nothing is known of a process of another boot, machine, container, run directory or device: it counts as alive.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from ublkpool.bufpool.sdk.backend import Hint

MARK = "ublkpool_claim"
"""Key of the image's metadata."""
_PLACE_DIGITS = 24
_START = 19
"""Where `/proc/PID/stat` has the start time, counted from the state on."""


class ProcessMark(NamedTuple):
    """A process of this boot; `place` names the device, its daemon and the namespace of `pid`."""

    place: str
    pid: int
    started_ticks: int

    @classmethod
    def of_this(cls, hint: Hint) -> "ProcessMark | None":
        """This process; None if the kernel does not say enough to name it."""
        pid = os.getpid()
        try:
            return cls(_place(hint), pid, _started_ticks(pid))
        except OSError:
            return None

    def text(self, address: str) -> str:
        """The record, with the address under which the process is about to have the lock."""
        return f"{address} {self.place} {self.pid} {self.started_ticks}"

    def follows(self, record: str, owner: str) -> bool:
        """Whether the owner is another process for the same device of the same daemon, and has ended."""
        match record.split():
            case [address, place, pid, started] if (address, place) == (owner, self.place):
                return pid.isdecimal() and started.isdecimal() and _has_ended(int(pid), int(started))
        return False


def _place(hint: Hint) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = Path("/proc/self/ns/pid").stat()
    named = [boot, namespace.st_dev, namespace.st_ino, hint.run_dir.resolve(), hint.device]
    return hashlib.sha256("\0".join(map(str, named)).encode()).hexdigest()[:_PLACE_DIGITS]


def _has_ended(pid: int, started_ticks: int) -> bool:
    """Whether there is no such process; one that cannot be looked at counts as alive."""
    try:
        # /proc may hide the processes of other users, and this call does not.
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    try:
        return _started_ticks(pid) != started_ticks
    except OSError:
        return False


def _started_ticks(pid: int) -> int:
    """The start time, in clock ticks since the boot: with the pid it names one process only.  Raises `OSError`."""
    return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()[_START])
