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
    """One group below the root; who is started in it stays in it."""

    def __init__(self, name: str) -> None:
        """Skips the test where the kernel offers no memory controller in cgroup v2."""
        root = _hierarchy()
        offered = (root / "cgroup.controllers").read_text().split()
        if "memory" not in offered:
            pytest.skip("no memory controller in cgroup v2 here")
        # Both, so that who dirties pages is slowed down for the group's own limits (cgroup writeback).
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
        """How often a limit was hit (`high`, `max`) and a process killed for it (`oom_kill`)."""
        lines = (self._path / "memory.events").read_text().splitlines()
        return {name: int(count) for name, count in (line.split() for line in lines)}

    def processes(self) -> list[int]:
        return [int(each) for each in (self._path / "cgroup.procs").read_text().split()]

    def enter(self, pid: int | None = None) -> None:
        """This process, or another, goes in."""
        (self._path / "cgroup.procs").write_text(str(pid or os.getpid()))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Whoever is started in this block is a member; we are one only for its length."""
        self.enter()
        try:
            yield
        finally:
            (self._root / "cgroup.procs").write_text(str(os.getpid()))

    def leave(self) -> None:
        """Its members go back to the root group."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                (self._root / "cgroup.procs").write_text(str(pid))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No member runs for the length of a block, but for this process."""
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
        """Remove it, when its members have ended."""
        eventually(self._is_removed, "the group's processes end")

    def _is_removed(self) -> bool:
        # It is busy for a moment after the last process has left its list.
        try:
            self._path.rmdir()
        except OSError as error:
            return error.errno == errno.ENOENT
        return True
