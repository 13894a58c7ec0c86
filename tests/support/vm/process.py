"""Child processes without a start of Python, direct I/O on a disk, and facts about processes from /proc."""

import mmap
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn, Self

from support.vm.daemon import DEADLINE_S, Daemon
from ublkpool.bufpool.sdk import process

_FORK = multiprocessing.get_context("fork")
_STAT_FLAGS = 8
"""The index of `flags` in /proc/PID/stat, counted from 0."""


class Forked:
    """A function in a forked process; its result is the exit status."""

    def __init__(self, main: Callable[[], int]) -> None:
        self._process = _FORK.Process(target=lambda: sys.exit(main()), daemon=True)
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the process if it still runs, so that it releases what it holds, such as a mount."""
        if self.running:
            self.kill()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Wait for the process; returns its exit status, negative if a signal ended it."""
        self._process.join(deadline_s)
        status = self._process.exitcode
        assert status is not None, f"process {self.pid} has not ended after {deadline_s:g} s"
        return status

    def kill(self) -> int:
        """End it now."""
        self._process.kill()
        return self.wait()


def write_block(path: str, offset: int, data: bytes, flags: int = 0) -> int:
    """One direct write; returns 0 or the errno."""
    return _direct(path, os.O_RDWR, len(data), lambda fd, page: _put(fd, page, data, offset, flags))


def disk_bytes(path: str) -> int:
    """The size of a disk that the kernel has."""
    return int((Path("/sys/block") / Path(path).name / "size").read_text()) * 512


def read_block(path: str, offset: int, length: int) -> bytes:
    """One direct read.  Raises `OSError`."""
    found = bytearray()

    def fetch(fd: int, page: mmap.mmap) -> None:
        assert os.preadv(fd, [memoryview(page)[:length]], offset) == length
        found.extend(page[:length])

    error = _direct(path, os.O_RDONLY, length, fetch)
    if error:
        raise OSError(error, os.strerror(error))
    return bytes(found)


def _put(fd: int, page: mmap.mmap, data: bytes, offset: int, flags: int) -> None:
    page[: len(data)] = data
    with memoryview(page) as view, view[: len(data)] as part:
        written = os.pwritev(fd, [part], offset, flags)
    assert written == len(data)


def _direct(path: str, mode: int, length: int, work: Callable[[int, mmap.mmap], None]) -> int:
    fd = os.open(path, mode | os.O_DIRECT | os.O_CLOEXEC)
    try:
        work(fd, mmap.mmap(-1, -(-length // mmap.PAGESIZE) * mmap.PAGESIZE))
        return 0
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(fd)


class Ran(NamedTuple):
    """A command's exit status and output."""

    status: int
    out: str
    err: str


class Command:
    """`ublkpool ARGUMENTS` in a fork of this process: the same as the script, without its two seconds of imports."""

    def __init__(self, daemon: Daemon, *arguments: str, user: int = 0) -> None:
        self._out, self._err = os.memfd_create("out"), os.memfd_create("err")
        words = daemon.addressed(arguments)
        self._child = Forked(lambda: _become(words, daemon.environment(), self._out, self._err, user))

    @property
    def running(self) -> bool:
        return self._child.running

    def kill(self) -> None:
        """End it now."""
        self._child.kill()

    def wait(self) -> Ran:
        """Wait for the command."""
        return Ran(self._child.wait(), _text(self._out), _text(self._err))


def run_command(daemon: Daemon, *arguments: str, user: int = 0) -> Ran:
    """Run a command to its end."""
    return Command(daemon, *arguments, user=user).wait()


def _become(words: list[str], environment: Mapping[str, str], out: int, err: int, user: int) -> NoReturn:
    from ublkpool.daemon.cli.commands import cli

    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.update(environment)
    if user:
        os.setuid(user)
    try:
        cli.main(words, prog_name="ublkpool")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _text(file: int) -> str:
    text = os.pread(file, os.fstat(file).st_size, 0).decode()
    os.close(file)
    return text


def mapped_huge_bytes(pid: int, name_end: str) -> int:
    """The bytes that a process maps in huge pages of the shared memory whose name ends with this text."""
    total_bytes, is_it = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, value = line.partition(" ")
        if not key.endswith(":"):
            is_it = line.endswith(name_end)
        elif is_it and key == "ShmemPmdMapped:":
            total_bytes += int(value.split()[0]) * 1024
    return total_bytes


def process_flags(pid: int) -> int:
    """The kernel's PF_* bits of a process."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    return int(after_name.split()[_STAT_FLAGS - 2])


@cache
def flusher_flags() -> int:
    """The bits that PR_SET_IO_FLUSHER sets on this kernel, tried in a child."""
    reader, writer = os.pipe()

    def try_it() -> int:
        before = process_flags(os.getpid())
        assert process.set_io_flusher() is None
        os.write(writer, str(process_flags(os.getpid()) & ~before).encode())
        return 0

    assert Forked(try_it).wait() == 0
    os.close(writer)
    answer = os.read(reader, 64)
    os.close(reader)
    return int(answer)


def status_field(pid: int, name: str) -> str:
    """A line of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))


def holders_of_device(name: str) -> set[int]:
    """All processes of the machine that have a node of /dev open or mapped."""
    numbers = (int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit())
    return {pid for pid in numbers if holds_device(pid, name)}


def holds_device(pid: int, name: str) -> bool:
    """Whether a process has a node of /dev open or mapped; false if it has ended."""
    wanted = f"/dev/{name}"
    with suppress(FileNotFoundError, ProcessLookupError):
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        files = [_target(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
        return wanted in files or any(line.split()[-1] == wanted for line in maps)
    return False


def _target(link: Path) -> str:
    """The target of a link; empty if it was closed meanwhile."""
    with suppress(FileNotFoundError):
        return str(link.readlink())
    return ""
