"""System calls of processes, counted by the kernel's tracing, which unlike strace stops no process.

Uses a histogram on the event `raw_syscalls:sys_enter`, by thread.  It makes each system call a little slower, so these
runs are not timed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_TRACING = Path("/sys/kernel/tracing")
_EVENT = Path("events/raw_syscalls/sys_enter")
_HISTOGRAM = "hist:keys=common_pid:size=4096"
_LINE = re.compile(r"\{ common_pid:\s*(\d+)[^}]*\} hitcount:\s*(\d+)")


class SyscallsError(Exception):
    """This kernel cannot count system calls; the text is one line."""


@contextmanager
def counting() -> Iterator[Path]:
    """Count for the length of a block; yields the histogram for `counted`.  Raises `SyscallsError`."""
    event = _TRACING / _EVENT
    try:
        (event / "trigger").write_text(_HISTOGRAM)
    except OSError as error:
        raise SyscallsError(f"{event}: {error.strerror}: needs tracefs and histogram triggers") from error
    try:
        yield event / "hist"
    finally:
        (event / "trigger").write_text(f"!{_HISTOGRAM}")


def counted(histogram: Path, parts: Mapping[str, Iterable[int]]) -> dict[str, int]:
    """System calls so far of each part's processes, all threads together."""
    by_thread = parse_histogram(histogram.read_text())
    return {
        part: sum(by_thread.get(thread, 0) for pid in pids for thread in threads_of(pid))
        for part, pids in parts.items()
    }


def parse_histogram(text: str) -> dict[int, int]:
    """Hits by thread."""
    return {int(thread): int(hits) for thread, hits in _LINE.findall(text)}


def threads_of(pid: int) -> list[int]:
    """The threads of a process; empty if it has ended."""
    return [int(each.name) for each in Path(f"/proc/{pid}/task").glob("[0-9]*")]
