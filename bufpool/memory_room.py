"""How much memory is available, so that memory that is too large is refused before the OOM killer ends a process.

A pool, a memory disk and a backend's own segment are each allocated and locked as a whole: they must fit into the
machine's available memory and into every cgroup (v2) of this process, or the kernel's OOM killer ends a process of its
choice.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ublkpool.bufpool.errors import PoolError

MEMINFO = Path("/proc/meminfo")
OWN_CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")


class Room(NamedTuple):
    """Available memory in bytes, and the limit that it was computed from."""

    free_bytes: int
    limit: str


def check_room(what: str, size_bytes: int, way_out: str) -> None:
    """Raise `PoolError` with the figures if `size_bytes` are not available now.

    `what` names the memory in the error, `way_out` says what the user can do.
    """
    least = min(_rooms(), default=None)
    if least is not None and least.free_bytes < size_bytes:
        raise PoolError(
            f"{what} needs {mib(size_bytes)} of memory and {mib(least.free_bytes)} are available ({least.limit}): "
            f"{way_out}"
        )


def mib(size_bytes: int) -> str:
    """As text, in MiB."""
    return f"{size_bytes / (1 << 20):.1f} MiB"


def _rooms() -> Iterator[Room]:
    with suppress(OSError, LookupError, ValueError):
        yield Room(_fields(MEMINFO)["MemAvailable:"] * 1024, "MemAvailable")
    for group in _groups():
        with suppress(OSError, LookupError, ValueError):
            # "max" where there is no limit, which is no number; the root has no such file.
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text()) - _reclaimable(group)
            yield Room(max(0, limit - used), f"memory.max of the cgroup {group}")


def _groups() -> Iterator[Path]:
    """The cgroup of this process and those above it."""
    with suppress(OSError):
        for line in OWN_CGROUP.read_text().splitlines():
            hierarchy, _, path = line.partition("::")
            if hierarchy == "0":
                own = CGROUP_ROOT / path.lstrip("/")
                yield own
                yield from (each for each in own.parents if each.is_relative_to(CGROUP_ROOT))


def _reclaimable(group: Path) -> int:
    """Page cache of files, which the kernel gives up for an allocation; shared memory is not among it."""
    stat = _fields(group / "memory.stat")
    return stat["inactive_file"] + stat["active_file"]


def _fields(path: Path) -> dict[str, int]:
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}
