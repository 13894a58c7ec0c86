"""The real daemon for tests with a driver: started, used through its admin socket, and checked for what it left behind.

Every process below the daemon has a mark in its environment, which fork and exec pass on, so that the tests find
orphaned processes, too.  Conditions are awaited, with deadlines that only a hang reaches.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from support.fakes.watched_calls import MARK as MAY_WAIT
from support.stopping import stop
from support.vm.warm_starts import Started, WarmStarts
from ublkpool.bufpool.pool.arena import arena_prefix
from ublkpool.bufpool.pool.control import Control
from ublkpool.bufpool.pool.memory import SHM_DIRECTORY
from ublkpool.daemon.admin import client as admin_client
from ublkpool.daemon.admin import patience as admin_patience
from ublkpool.daemon.admin.client import Client
from ublkpool.daemon.admin.wire import admin_socket
from ublkpool.daemon.backends.becoming import TEMPLATE
from ublkpool.daemon.errors import DaemonError, RemoteError
from ublkpool.daemon.events.keeper import TITLE as WRITER
from ublkpool.daemon.kernel.warm_process import IDLE_MAX
from ublkpool.daemon.kernel.warm_process import TITLE as WAITS_FOR_CALLS
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.daemon.status import DeviceStats, DeviceStatus
from ublkpool.workers.template import TITLE as FORKS

DEADLINE_S = float(os.environ.get("UBLKPOOL_TEST_DEADLINE_S", "300"))
"""Seconds; a longer wait is a hang, even with two guests on two CPUs."""
WORKER_USER = "daemon"
"""As which workers and broker run in the tests: an account of every system, which no test uses for a backend."""
MARK = "UBLKPOOL_TEST_MARK"
CANNOT_TELL = "it cannot be told whether its disk is in use"
_POLL_S = 0.02
_PAUSE_SHARE = 3
"""How much longer than a look the pause after it is."""
_PAUSE_MAX_S = 0.3
_T = TypeVar("_T")
WARM = WarmStarts()
"""Of all daemons of this process, once `tests/vm/conftest.py` has begun it."""


def eventually(check: Callable[[], _T], what: str, deadline_s: float = DEADLINE_S) -> _T:
    """Wait until `check` is true, and return its value.  Raises `AssertionError` with `what` after the deadline."""
    return _awaited(check, bool, what, deadline_s)


def eventually_nothing(find: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until `find` returns nothing.  Raises `AssertionError` with what it still finds after the deadline."""
    _awaited(find, lambda found: not found, what, deadline_s)


def _awaited(look: Callable[[], _T], is_enough: Callable[[_T], bool], what: str, deadline_s: float) -> _T:
    deadline = time.monotonic() + deadline_s
    while True:
        began = time.monotonic()
        if is_enough(found := look()):
            return found
        now = time.monotonic()
        assert now < deadline, f"not within {deadline_s:g} s: {what}; there is {found!r}"
        # A look may cost a slow guest much of the CPU that the awaited process needs.
        time.sleep(min(max(_POLL_S, _PAUSE_SHARE * (now - began)), _PAUSE_MAX_S))


def with_user(config: str) -> str:
    """The config with a user for the workers, unless it names one."""
    line = f'user = "{WORKER_USER}"\n'
    if "[daemon]" not in config:
        return f"[daemon]\n{line}{config}"
    return config if "\nuser = " in config else config.replace("[daemon]\n", f"[daemon]\n{line}", 1)


def nodes() -> set[str]:
    """Every ublk node of this machine."""
    return {path.name for path in Path("/dev").glob("ublk[bc]*")}


def pools() -> set[str]:
    """Every pool of any ublkpool daemon in shared memory."""
    return {path.name for path in SHM_DIRECTORY.glob("ublkpool*")}


def marked_processes(mark: str) -> dict[int, str]:
    """The live processes that carry this mark, with their command lines.

    Not those that write events: each lasts a moment, at any time after something has happened.
    """
    wanted = f"{MARK}={mark}".encode()
    found = {}
    # Without pathlib, which takes several times as long: tests wait for this again and again.
    for process in entries("/proc"):
        with suppress(OSError):
            pid = int(process)
            if wanted in content(f"/proc/{pid}/environ").split(b"\0") and _name(pid) != WRITER:
                words = content(f"/proc/{pid}/cmdline").replace(b"\0", b" ")
                found[pid] = words.decode(errors="replace").strip()
    return found


def entries(directory: str) -> list[str]:
    """The numbers that a directory of /proc has as names: of processes, or of a process's tasks."""
    with os.scandir(directory) as found:
        return [each.name for each in found if each.name.isdigit()]


def content(path: str) -> bytes:
    """A file of /proc."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return file.readall()


def total(stats: DeviceStats, counter: str) -> int:
    """The sum of a counter over the queues."""
    return sum(queue.counters[counter] for queue in stats.queues)


def has_rings(device: str) -> bool:
    """Whether a device of this name has rings on this kernel; UBLKPOOL_RINGS (0, 1) decides for all."""
    wanted = os.environ.get("UBLKPOOL_RINGS")
    major = int(os.uname().release.partition(".")[0])
    return wanted == "1" if wanted else bool((zlib.crc32(device.encode()) + major) & 1)


class BackendProcess:
    """A `ublkpool backend` process that the test starts itself."""

    def __init__(self, process: Started, log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        return self.process.wait(deadline_s)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit status, negative if a signal ended the process."""
        self.process.send_signal(number)
        return self.wait()


class Daemon:
    """One `ublkpool serve` in a run directory of its own."""

    def __init__(
        self, config: str = "", name: str = "run", module: str = "support.vm.watched_daemon"
    ) -> None:
        _wait_long_for_answers()
        self._scratch = Path(tempfile.mkdtemp(prefix="ublkpool-vm-"))
        # The workers' user must be able to reach the run directory in it.
        self._scratch.chmod(0o711)
        self.run_dir = self._scratch / name
        self.state_dir = self._scratch / "state"
        self.log = self._scratch / "daemon.log"
        self.client = Client(self.run_dir)
        self.backends: list[BackendProcess] = []
        self.nodes_before, self.pools_before = nodes(), pools()
        self._config = config
        self._module = module
        self._process: Started | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def path(self, name: str) -> Path:
        """A path for a file of the test."""
        return self._scratch / name

    def command(self, *arguments: str) -> list[str]:
        """A command line of ublkpool for this daemon."""
        return [sys.executable, "-m", "ublkpool.daemon", *self.addressed(arguments)]

    def addressed(self, arguments: Sequence[str]) -> list[str]:
        """A command and its arguments, with `--run-dir` between them."""
        return [arguments[0], "--run-dir", str(self.run_dir), *arguments[1:]]

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            MARK: str(self.run_dir),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "UBLKPOOL_STATE_DIR": str(self.state_dir),
        }

    def start(self, warm: bool = True) -> None:
        """Start it, unless `warm` in the way of a user, with a new interpreter; wait until it answers."""
        self.path("config.toml").write_text(with_user(self._config))
        command = [sys.executable, "-m", self._module, *self._serve()]
        self._process = self._spawn(command, self.log, warm)
        eventually(self._answers, "the daemon answers")

    def _serve(self, *options: str) -> list[str]:
        return self.addressed(["serve", "--config", str(self.path("config.toml")), *options])

    @contextmanager
    def life(self) -> Iterator[Self]:
        """Run the daemon for a block, and check that its end leaves nothing; prints its log on failure."""
        try:
            self.start()
            yield self
            assert self.stop() == 0
            eventually_nothing(self.remains, "nothing is left of the daemon")
        finally:
            print(self.said())
            self.close()

    def _spawn(self, command: Sequence[str], log: Path, warm: bool = True) -> Started:
        with log.open("ab") as out:
            if warm and WARM.fits(command):
                return WARM.start(command, self.environment(), out.fileno())
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.environment()
            )

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the daemon ended:\n{self.said()}"
        # Without a socket the client would look for the reason, each time.
        if not admin_socket(self.run_dir).exists():
            return False
        with suppress(DaemonError):
            self.client.devices()
            return True
        return False

    def said(self, since: int = 0) -> str:
        """The daemon's log from this byte on."""
        with suppress(FileNotFoundError):
            return self.log.read_bytes()[since:].decode(errors="replace")
        return ""

    def add(
        self,
        name: str,
        backend: str | None = None,
        options: Mapping[str, object] | None = None,
        **config: Any,
    ) -> DeviceStatus:
        """Create a device; with a backend, one that the daemon runs.  Raises `DaemonError`.

        A device of the same name has rings on one kernel and frames on the other, so that every test runs with both.
        On a slow machine a request may take longer than the default `io_timeout`, which some tests count as trouble.
        """
        config.setdefault("rings", has_rings(name))
        config.setdefault("io_timeout_s", DEADLINE_S)
        texts = {key: str(value) for key, value in (options or {}).items()}
        child = BackendConfig(kind=backend, options=texts, cwd="/") if backend else None
        return self.client.add(DeviceConfig(name=name, backend=child, **config))

    @contextmanager
    def device(self, name: str, backend: str | None = None, **config: Any) -> Iterator[DeviceStatus]:
        """A device for the length of a block; at the end none of its buffers may be lent."""
        yield self.add(name, backend, **config)
        self.delete(name)

    def status(self, name: str) -> DeviceStatus:
        """A device's status as `list` shows it."""
        return next(each for each in self.client.devices() if each.name == name)

    def stats(self, name: str) -> DeviceStats:
        """A device's counters."""
        return self.client.stats(name)[0]

    def wait_live(self, name: str) -> DeviceStatus:
        """Wait until the device is live."""
        return self.client.wait_live(name, DEADLINE_S)

    def delete(self, name: str) -> None:
        """Wait until a device is at rest, then delete it.  Raises `AssertionError` if a lease does not come back."""
        self.rest(name)
        eventually(lambda: self._deleted(name), f"{name} is deleted")

    def _deleted(self, name: str) -> bool:
        """Delete a device; False if a busy machine had no time to look for the users of its disk, so that it stays."""
        try:
            self.client.delete([name])
        except RemoteError as error:
            if CANNOT_TELL not in str(error):
                raise
            return False
        return True

    def rest(self, name: str) -> DeviceStats:
        """Wait until no request is in flight and every lease has come back; returns the counters."""
        status = self.status(name)
        # The queues work meanwhile, so counters that do not match are read again.
        eventually_nothing(lambda: self._out(status), f"{name} comes to rest, with every lease back")
        if self.stats(name).queues:
            eventually(
                lambda: self._books_agree(status), f"the slots of {name} have the owners that hold them"
            )
        return self.stats(name)

    def _out(self, status: DeviceStatus) -> dict[str, int]:
        """The counts that must be 0 for a device at rest and are not, by description."""
        stats = self.stats(status.name)
        if not stats.queues:
            return {}
        # With need_get_data off every tag keeps the buffer that it got at its first fetch.
        kept = 0 if status.need_get_data or status.zero_copy else status.queues * status.depth
        counts = {
            "requests in flight": total(stats, "in_flight"),
            "buffers waited for": total(stats, "buffers_waiting"),
            "buffers lent": total(stats, "buffers_lent") - kept,
            "leases not returned": total(stats, "lent_total") - total(stats, "returned_total") - kept,
        }
        if not any(counts.values()):
            with closing(self.control(status)) as control:
                headers = map(control.slot_header, range(control.header.geometry.slot_count))
                counts["slots with a tag"] = sum(1 for header in headers if header.tag) - kept
        return {what: count for what, count in counts.items() if count}

    def _books_agree(self, status: DeviceStatus) -> bool:
        with closing(self.control(status)) as control:
            owners = list(control.slot_owners())
        held = [queue.buffers_held for queue in self.stats(status.name).queues]
        return held == [
            sum(1 for owner in owners if owner and owner.queue == queue) for queue in range(status.queues)
        ]

    def control(self, status: DeviceStatus) -> Control:
        """The control segment of a device's pool, for reading."""
        assert status.id is not None
        name = arena_prefix(self._instance, status.id).removeprefix("/")
        with (SHM_DIRECTORY / f"{name}-ctl").open("r+b") as file:
            return Control(file.fileno())

    @property
    def broker_pid(self) -> int:
        """The pid of the pool broker, 0 while none runs."""
        marked = marked_processes(str(self.run_dir))
        return next((pid for pid in marked if _name(pid) == "ublkpool-broker"), 0)

    @property
    def template_pid(self) -> int:
        """The pid of the template of backends, 0 while none runs."""
        marked = marked_processes(str(self.run_dir))
        return next((pid for pid in marked if _name(pid) == TEMPLATE), 0)

    @property
    def _instance(self) -> str:
        return hashlib.sha256(str(self.run_dir.resolve()).encode()).hexdigest()[:8]

    def backend(self, kind: str, device: str, **options: object) -> BackendProcess:
        """Start a backend with `ublkpool backend`."""
        pairs = [f"{key}={value}" for key, value in options.items()]
        command = self.command("backend", kind, "--device", device)
        log = self.path(f"backend-{len(self.backends)}.log")
        backend = BackendProcess(self._spawn([*command, "--", *pairs], log), log)
        self.backends.append(backend)
        return backend

    @contextmanager
    def stopped(self, pid: int) -> Iterator[None]:
        """Stop a process (SIGSTOP) for the length of a block."""
        stop(pid)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def together(self, *calls: Callable[[], _T]) -> list[_T]:
        """Run these at the same time, because each may wait for a start of Python."""
        with ThreadPoolExecutor(len(calls)) as threads:
            return [each.result() for each in [threads.submit(call) for call in calls]]

    def command_run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a command of ublkpool to its end."""
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE_S,
            env=self.environment(),
            check=False,
        )

    def forbidden(self) -> list[str]:
        """The calls of supervisor, workers and broker that a disk can block, as a watched daemon logged them."""
        return [line for line in self.said().splitlines() if MAY_WAIT in line]

    def leftovers(self) -> list[str]:
        """Descriptions of what is left although no device exists, and the forbidden calls that the daemon made."""
        found = [f"device {each.name}, {each.state}" for each in self.client.devices()]
        found += self.forbidden()
        found += [f"/dev/{name}" for name in sorted(nodes() - self.nodes_before)]
        found += [f"{SHM_DIRECTORY}/{name}" for name in sorted(pools() - self.pools_before)]
        found += [str(path) for path in sorted((self.run_dir / "queues").iterdir())]
        found += [str(path) for path in sorted(self.run_dir.glob("*.keep"))]
        return found + [f"process {pid}: {words}" for pid, words in self._strays().items()]

    def _strays(self) -> dict[int, str]:
        processes = marked_processes(str(self.run_dir))
        # The daemon, and as many of each child as outlive devices.
        processes.pop(self.pid, None)
        for name in ("ublkpool-broker", "ublkpool-hold", TEMPLATE, FORKS, *[WAITS_FOR_CALLS] * IDLE_MAX):
            if lasting := [pid for pid in processes if _name(pid) == name]:
                del processes[lasting[0]]
        return processes

    def reap(self) -> list[int]:
        """The exit statuses of all backends started here; all must have ended."""
        statuses = [backend.wait() for backend in self.backends]
        self.backends.clear()
        return statuses

    def clean(self) -> None:
        """Clean up after a failed test, so that the next one does not fail because of it."""
        for backend in self.backends:
            backend.process.kill()
        self.reap()
        with suppress(DaemonError):
            self.client.delete(None, force=True)

    def stop(self) -> int:
        """End the daemon with SIGTERM; returns its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(DEADLINE_S)

    def crash(self) -> None:
        """Kill the daemon process alone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def replace(self, module: str) -> None:
        """Start another daemon with `--replace`, which takes over from the running one."""
        before = self._process
        assert before is not None
        self._process = self._spawn([sys.executable, "-m", module, *self._serve("--replace")], self.log)
        assert before.wait(2 * DEADLINE_S) == 0, self.said()
        eventually(self._answers, "the next daemon answers")

    def wait_end(self) -> int:
        """Wait for the daemon's end; returns its exit status."""
        assert self._process is not None
        return self._process.wait(DEADLINE_S)

    def crash_everything(self) -> None:
        """Kill the daemon and all processes below it, except the keepers of memory disks."""
        self.crash()
        for pid, words in marked_processes(str(self.run_dir)).items():
            if "keeper.py" not in words:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def remains(self) -> list[str]:
        """Descriptions of what is left after the daemon's end."""
        found = [str(self.run_dir)] if self.run_dir.exists() else []
        found += self.forbidden()
        found += [f"/dev/{name}" for name in sorted(nodes() - self.nodes_before)]
        found += [f"{SHM_DIRECTORY}/{name}" for name in sorted(pools() - self.pools_before)]
        return found + [
            f"process {pid}: {words}" for pid, words in marked_processes(str(self.run_dir)).items()
        ]

    def close(self) -> None:
        """Remove all processes and the directory, whatever the state."""
        self.clean()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _wait_long_for_answers() -> None:
    """Let this process and its forks give a slow daemon time, and not speak of it on stderr, which tests compare."""
    setattr(admin_client, "QUERY_TIMEOUT_S", DEADLINE_S)  # noqa: B010
    setattr(admin_patience, "SILENT_NOTICE_S", DEADLINE_S)  # noqa: B010


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
