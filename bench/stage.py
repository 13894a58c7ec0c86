"""What contestants share: a scratch directory on tmpfs, our daemon, and device numbers."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from bench.accounts import Threads
from bench.cells import REGION_BYTES, Cell
from bench.results import CLUSTER
from support.vm.daemon import Daemon

T = TypeVar("T")
DEADLINE_S = 120.0
_POLL_S = 0.02
_PIECE_BYTES = 1 << 20


class Disk:
    """A disk that is up: its node, and the processes that serve it by part, such as worker and backend."""

    def __init__(
        self,
        node: str,
        parts: Mapping[str, Sequence[int]],
        device: str = "",
        log: Path | None = None,
        threads: Mapping[str, Threads] | None = None,
    ) -> None:
        self.node = node
        self.parts = parts
        self.device = device
        """The device's name if it is ours; empty for peers."""
        self.log = log
        """The file with the server's last words, if it has one."""
        self.threads = threads or {}
        """Threads among those of `parts` that are counted by themselves as well."""


class Disks:
    """A contestant's disks; some peers have another setting for depth 1."""

    def __init__(self, disk: Disk, at_depth_1: Disk | None = None, *, may_sleep: bool = True) -> None:
        """Without `may_sleep` its processes are not stopped while others are measured."""
        self._disk = disk
        self._at_depth_1 = at_depth_1 or disk
        self.may_sleep = may_sleep

    def disk_for(self, cell: Cell) -> Disk:
        """The disk to run this cell on."""
        return self._at_depth_1 if cell.depth == 1 else self._disk

    def all(self) -> list[Disk]:
        """Each disk once."""
        return list(dict.fromkeys((self._disk, self._at_depth_1)))


NBDKIT = "nbdkit"
"""The part of a server that several contestants share."""
_OTHERS = ("daemon", "kernel", NBDKIT, CLUSTER)
"""Parts that serve more than one contestant, or that no signal reaches."""


def put_to_sleep(disks: Disks) -> None:
    """Stop a contestant's processes (SIGSTOP), so that they take no CPU time from the one that is measured."""
    _signal(disks, signal.SIGSTOP)


def wake_up(disks: Disks) -> None:
    """Continue them (SIGCONT)."""
    _signal(disks, signal.SIGCONT)


def _signal(disks: Disks, number: signal.Signals) -> None:
    if not disks.may_sleep:
        return
    pids = {
        pid for disk in disks.all() for part in disk.parts if part not in _OTHERS for pid in disk.parts[part]
    }
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class StageError(Exception):
    """A contestant cannot be started; the text is one line."""


class Stage:
    """The context; its end stops the daemon."""

    def __init__(self, directory: Path, kublk: Path, module: str = "support.vm.watched_daemon") -> None:
        """`module` is the program that runs as the daemon."""
        self.directory = directory
        self.kublk = kublk
        self._module = module
        self._daemon: Daemon | None = None
        self._cleanup = ExitStack()
        self._numbers = iter(range(100, 1000))
        self._shared: dict[str, int] = {}
        self._contexts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    @property
    def daemon(self) -> Daemon:
        """Our daemon, started at the first use."""
        if self._daemon is None:
            daemon = Daemon(name="bench", module=self._module)
            self._cleanup.callback(daemon.close)
            daemon.start()
            self._daemon = daemon
        return self._daemon

    def other_daemon(self, name: str, config: str) -> Daemon:
        """Another daemon of ours, with this config, until the end of the stage."""
        daemon = Daemon(config, name=name, module=self._module)
        self._cleanup.callback(daemon.close)
        daemon.start()
        return daemon

    def log_of(self, name: str) -> Path:
        """The file that gets the output of the shared process of this name."""
        return self.directory / f"{name}.log"

    def shared_process(self, name: str, command: Sequence[str | Path]) -> int:
        """The pid of a process that several contestants use: the first one starts it, the stage's end ends it."""
        if name not in self._shared:
            self._shared[name] = self._cleanup.enter_context(process(command, self.log_of(name)))
        return self._shared[name]

    def shared_context(self, name: str, make: Callable[[], AbstractContextManager[T]]) -> T:
        """What several contestants use: the first one enters the context, the stage's end leaves it."""
        if name not in self._contexts:
            self._contexts[name] = self._cleanup.enter_context(make())
        found: T = self._contexts[name]
        return found

    def next_number(self) -> int:
        """A free device number."""
        return next(each for each in self._numbers if not Path(f"/dev/ublkc{each}").exists())

    def make_file(self, name: str) -> Path:
        """A file of REGION_BYTES on the scratch directory's tmpfs, with every block written."""
        path = self.directory / name
        with path.open("wb") as file:
            for _ in range(0, REGION_BYTES, _PIECE_BYTES):
                file.write(b"\xa5" * _PIECE_BYTES)
        return path


def run(*command: str | Path) -> str:
    """Run a command; returns its output.  Raises `StageError` with the end of its output."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-200:]
        raise StageError(f"{Path(command[0]).name} {command[1]} ended with {done.returncode}: {said}")
    return done.stdout


@contextmanager
def process(command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> Iterator[int]:
    """Run a process for the length of a block; ends it with SIGTERM, then with SIGKILL."""
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
    try:
        yield child.pid
    finally:
        child.terminate()
        try:
            child.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_for(check: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds.  Raises `StageError` with `what` after the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not check():
        if time.monotonic() > deadline:
            raise StageError(f"not within {DEADLINE_S:.0f} s: {what}")
        time.sleep(_POLL_S)


def last_words(log: Path | None) -> str:
    """The end of a process's output."""
    said = log.read_text(errors="replace").split("\n") if log and log.exists() else []
    return " ".join([each for each in said if each][-2:]) or "it said nothing"


def read_first_block(node: str) -> None:
    """Wait until the node exists, and read from it.  Raises `OSError` if it does not read."""
    wait_for(Path(node).exists, f"{node} exists")
    fd = os.open(node, os.O_RDONLY)
    try:
        os.read(fd, 4096)
    finally:
        os.close(fd)
