"""The daemon's own view of mounts: none of its own disks may be mounted in it.

A daemon that starts while its disks are mounted gets these mounts with its mount namespace.  There they would outlive
the client's umount and keep the disk busy; and at the daemon's end the kernel would wait for a disk that nobody serves.
"""

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ublkpool.ublk import queue

_ESCAPE = re.compile(r"\\([0-7]{3})")
_SYS_BLOCK = Path("/sys/dev/block")
_log = logging.getLogger("ublkpool.supervisor")


class Mount(NamedTuple):
    """A line of /proc/PID/mountinfo."""

    device: str
    """`major:minor`"""
    path: str
    source: str


def parse_mounts(mountinfo: str) -> Iterator[Mount]:
    """The mounts that the text describes, in its order."""
    for line in mountinfo.splitlines():
        about, _, origin = line.partition(" - ")
        fields, source = about.split(), origin.split()
        yield Mount(fields[2], _plain(fields[4]), _plain(source[1]))


def leave_mounts(numbers: Collection[int]) -> None:
    """Unmount in this namespace, and only here, whatever lies on the disks with these device numbers."""
    disks = {f"ublkb{number}" for number in numbers}
    mounts = list(parse_mounts(Path("/proc/self/mountinfo").read_text())) if disks else []
    for mount in reversed(mounts):
        if disks & _disks_below(_SYS_BLOCK / mount.device) or _is_on(mount.source, disks):
            _log.info("leaving the mount %s of our own disk to others", mount.path)
            # A mount below another goes with it.
            with suppress(OSError):
                queue.leave_mount(mount.path)


def _is_on(source: str, disks: Collection[str]) -> bool:
    """Whether the source is one of these disks: some file systems have device numbers of their own."""
    return source.removeprefix("/dev/") in disks


def _disks_below(block: Path) -> set[str]:
    """The names of a block device, of the disk that it is a part of, and of all that it is made of."""
    if not block.exists():
        return set()
    found = set(block.resolve().parts)
    for slave in (block / "slaves").glob("*"):
        found |= _disks_below(slave)
    return found


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda code: chr(int(code[1], 8)), text)
