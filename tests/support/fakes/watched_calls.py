"""Finds calls of the supervisor's loop, of a worker or of the broker that a disk can block for ever.

These are calls on a block device's node, on its sysfs directory, on another process's descriptors, memory or mounts, or
on a path that does not belong to the daemon.  Helper processes (`ControlRunner`) may make all of them.
"""

import asyncio
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import ublkpool
from ublkpool.workers import process

MARK = "a call that may wait for ever: "
HELPERS = ("ublkpool-warm", "ublkpool-ctl", "ublkpool-look", "ublkpool-events", "ublkpool-start")
_DISK = re.compile(
    r"/dev/(ublkb|mapper/|dm-|md|loop|sd|vd|nvme)|/sys/(block|class/block|dev/block|devices/virtual/block)\b"
    r"|/proc/\d+/(fd|fdinfo|maps|smaps|map_files|mountinfo|mounts|environ|cmdline|cwd|root|exe)\b"
)
_OWN = re.compile(
    r"/dev/(shm\b|null$|urandom$|kmsg$|ublkc\d+$)"
    r"|/proc/(self|\d+/(stat|status|comm|stack)$|meminfo$|sys/)"
    r"|/sys/(kernel/mm|fs/cgroup|devices/system/cpu)\b|/etc/|/run/|/usr/(lib|share)/|/var/lib/ublkpool\b"
)
_AUDITED = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chdir"}
_UNAUDITED = ("stat", "lstat", "access", "readlink", "statvfs")
_role = ""


def is_on_a_disk(path: str) -> bool:
    """Whether a disk, or a process that waits for one, can block a call on this path."""
    return bool(_DISK.match(path)) and not path.startswith(("/proc/self/", f"/proc/{os.getpid()}/"))


def is_own(path: str, own: tuple[str, ...]) -> bool:
    """Whether the path belongs to the daemon: below or above `own`, its code, or answered by the kernel alone."""
    if is_on_a_disk(path):
        return False
    leads_there = any(each.startswith(f"{path.rstrip('/')}/") for each in own)
    return leads_there or bool(_OWN.match(path)) or path.startswith((*own, *_code()))


@cache
def _code() -> tuple[str, ...]:
    package = Path(ublkpool.__file__).resolve().parents[2]
    return tuple(map(str, (package, sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"))))


def is_on_the_loop() -> bool:
    """Whether this process is a worker or the broker, or runs an asyncio loop now; helpers do not."""
    if _role:
        return _role not in HELPERS
    return asyncio._get_running_loop() is not None


def watch(is_allowed: Callable[[str], bool], report: Callable[[str], None]) -> None:
    """From now on `report` every call on the loop with a path that is not allowed; cannot be undone."""
    busy = False

    def look(call: str, path: object) -> None:
        nonlocal busy
        if busy or not isinstance(path, str | bytes | os.PathLike) or not is_on_the_loop():
            return
        busy = True
        try:
            text = os.path.normpath(os.path.join(os.getcwd(), os.fsdecode(path)))  # noqa: PTH118, PTH109
            if not is_allowed(text):
                report(f"{MARK}{call} {text} in {_role or 'the supervisor'}")
        finally:
            busy = False

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _AUDITED and arguments:
            look(event, arguments[0])

    sys.addaudithook(hear)
    for name in _UNAUDITED:
        _wrap(name, look)
    _follow_forks()


def _wrap(name: str, look: Callable[[str, object], None]) -> None:
    call = getattr(os, name)

    @wraps(call)
    def watched(path: Any, *arguments: Any, **named: Any) -> Any:
        look(f"os.{name}", path)
        return call(path, *arguments, **named)

    setattr(os, name, watched)


def _follow_forks() -> None:
    begin = process._begin

    def begun(keep_fds: Any, title: str) -> None:
        global _role
        _role = title
        begin(keep_fds, title)

    setattr(process, "_begin", begun)  # noqa: B010


def print_with_stack(line: str) -> None:
    """Write the call and its caller into the daemon's log."""
    stack = " < ".join(
        f"{each.name} ({Path(each.filename).name})" for each in reversed(traceback.extract_stack()[-9:-3])
    )
    sys.stderr.write(f"{line}: {stack}\n")
    sys.stderr.flush()
