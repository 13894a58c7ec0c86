"""Checks that a test leaves no warning in the kernel log and no task in an unkillable wait."""

import os
from collections.abc import Iterator
from contextlib import suppress

from support.guest.console import complaints
from support.vm.daemon import content, entries, eventually_nothing

_RECORD_BYTES_MAX = 8192


class KernelLog:
    """The kernel log from now on; empty if this process may not read it."""

    def __init__(self) -> None:
        self._kmsg: int | None = None
        with suppress(OSError):
            self._kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._kmsg, 0, os.SEEK_END)

    def complaints(self) -> list[str]:
        """The lines since the last call in which the kernel reports a fault."""
        return complaints("\n".join(self._new()))

    def _new(self) -> list[str]:
        lines: list[str] = []
        while self._kmsg is not None:
            try:
                record = os.read(self._kmsg, _RECORD_BYTES_MAX)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue
            lines.append(record.decode(errors="replace").partition(";")[2].partition("\n")[0])
        return lines

    def close(self) -> None:
        if self._kmsg is not None:
            os.close(self._kmsg)


def uninterruptible() -> set[str]:
    """Every task in D state, as `pid name`."""
    found = set()
    for tid, path in _tasks():
        with suppress(OSError):
            name, _, rest = (
                content(f"{path}/stat").decode(errors="replace").partition(" (")[2].rpartition(") ")
            )
            if rest.startswith("D"):
                found.add(f"{tid} {name}")
    return found


def _tasks() -> Iterator[tuple[str, str]]:
    """The number and the directory of every task.  Without pathlib, because this runs after each test."""
    for pid in entries("/proc"):
        with suppress(OSError):
            yield from ((tid, f"/proc/{pid}/task/{tid}") for tid in entries(f"/proc/{pid}/task"))


def expect_no_stuck_task() -> None:
    """Wait until every task that is in D state now has left it.  Raises `AssertionError` naming the rest."""
    stuck = uninterruptible()

    def still_stuck() -> set[str]:
        stuck.intersection_update(uninterruptible())
        return stuck

    if stuck:
        eventually_nothing(still_stuck, "tasks leave D state")
