"""A memory cgroup (v2) that a test makes, fills, freezes and removes."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.vm.daemon import eventually
from support.vm.files import run


def _hierarchy() -> Path:
    """Where cgroup v2 is mounted; mounts it if it is not."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    where = tempfile.mkdtemp(prefix="ublkpool-cgroup-")
    run("mount", "-t", "cgroup2", "none", where)
    return Path(where)


class MemoryGroup:
    """One group below the root group; processes started in it stay in it."""

    def __init__(self, name: str) -> None:
        """Skip the test if the kernel has no memory controller in cgroup v2."""
        root = _hierarchy()
        offered = (root / "cgroup.controllers").read_text().split()
        if "memory" not in offered:
            pytest.skip("no memory controller in cgroup v2 here")
        # Both controllers, so that the group's own limits throttle a process that dirties pages (cgroup writeback).
        wanted = [f"+{each}" for each in ("memory", "io") if each in offered]
        (root / "cgroup.subtree_control").write_text(" ".join(wanted))
        self._root, self._path = root, root / name
        self._path.mkdir()

    def set(self, name: str, value: int | str) -> None:
        """Write `memory.NAME`."""
        (self._path / f"memory.{name}").write_text(str(value))

    @property
    def used_bytes(self) -> int:
        return int((self._path / "memory.current").read_text())

    def events(self) -> dict[str, int]:
        """The counts of hit limits (`high`, `max`) and of processes killed for it (`oom_kill`)."""
        lines = (self._path / "memory.events").read_text().splitlines()
        return {name: int(count) for name, count in (line.split() for line in lines)}

    def processes(self) -> list[int]:
        return [int(each) for each in (self._path / "cgroup.procs").read_text().split()]

    def enter(self, pid: int | None = None) -> None:
        """Move this process, or another, into the group."""
        (self._path / "cgroup.procs").write_text(str(pid or os.getpid()))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Processes started in this block are members; this process is one for the length of the block."""
        self.enter()
        try:
            yield
        finally:
            (self._root / "cgroup.procs").write_text(str(os.getpid()))

    def leave(self) -> None:
        """Move the members back to the root group."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                (self._root / "cgroup.procs").write_text(str(pid))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze all members except this process for the length of a block."""
        assert os.getpid() not in self.processes()
        self._freeze(True)
        try:
            yield
        finally:
            self._freeze(False)

    def _freeze(self, frozen: bool) -> None:
        (self._path / "cgroup.freeze").write_text(str(int(frozen)))
        wanted = f"frozen {int(frozen)}"
        eventually(lambda: wanted in (self._path / "cgroup.events").read_text().splitlines(), wanted)

    def close(self) -> None:
        """Remove the group after its members have ended."""
        eventually(self._is_removed, "the group's processes end")

    def _is_removed(self) -> bool:
        # rmdir(2) fails with EBUSY for a moment after the last process has left the list.
        try:
            self._path.rmdir()
        except OSError as error:
            return error.errno == errno.ENOENT
        return True
