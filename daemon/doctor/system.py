"""The machine that is examined: the root of its file tree, and the directories of the daemon.

A check reads /proc, /sys, /dev, /etc, /lib and /usr below `root` only, so that a test gives it a tree of its own.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

DEVICES = "sys/class/ublk-char"
"""Has an entry for each device of the driver, of any program."""
RULES_DIRECTORIES = (
    "etc/udev/rules.d",
    "run/udev/rules.d",
    "usr/local/lib/udev/rules.d",
    "usr/lib/udev/rules.d",
    "lib/udev/rules.d",
)
"""As udev(7) orders them: of files with the same name, only the first counts."""
StatVfs = Callable[[Path], os.statvfs_result]


class System(NamedTuple):
    """`state_dirs` are the candidates for the state directory, in order; `is_root`: whether the doctor runs as root."""

    root: Path
    run_dir: Path
    state_dirs: Sequence[Path]
    release: str
    is_root: bool

    def text(self, path: str) -> str:
        """The stripped text of a file below the root; empty if it cannot be read."""
        with suppress(OSError):
            return (self.root / path).read_text(errors="replace").strip()
        return ""

    def names(self, path: str) -> list[str]:
        """The sorted names in a directory below the root; none if it cannot be listed."""
        with suppress(OSError):
            return sorted(each.name for each in (self.root / path).iterdir())
        return []

    def number(self, path: str) -> int | None:
        """The number in a file below the root; None if there is none."""
        text = self.text(path)
        return int(text) if text.isdecimal() else None


def instance_of(run_dir: Path) -> str:
    """The name by which a daemon of this run directory marks its devices and names its pools."""
    return hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]


def free_bytes(room: os.statvfs_result) -> int:
    """What an ordinary user may still write to the file system."""
    return room.f_bavail * room.f_frsize
