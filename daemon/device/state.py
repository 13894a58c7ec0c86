"""What must outlive the boot: for each device name the store that first served it, and its generation.

Owns the directory and the meaning of the files `STATE_DIR/NAME.json`.  A file is durable before `save` returns
(`state_file.py`).  A separate process writes each file, since a file system may block its caller.  What an identity
means is `binding.py`'s.
"""

import asyncio
import errno
import fcntl
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol, Self

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.device.state_file import Write, keep_room
from ublkpool.daemon.errors import ConfigError, DaemonError
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.settings.own_directory import make_own_directory
from ublkpool.daemon.settings.user_directories import usual_run_dir, usual_state_dir

STATE_DIR_DEFAULT = Path("/var/lib/ublkpool")
VERSION = 1
SAVE_DEADLINE_S = 30.0
LOCK_PATIENCE_S = 5.0
_POLL_S = 0.05
_WHAT, _OPTION = "state directory", "--state-dir"
_LOCK = "lock"
_STATE = re.compile(r"[^.].*\.json\Z", re.DOTALL)
_UNFINISHED = re.compile(r"\.[A-Za-z0-9_.-]+\.json\.\d+-\d+\.new\Z")
"""The name that `Write` gives a file before it replaces a state."""
_OTHERS = re.compile(r"(lost\+found|at|events(\.old)?\.jsonl|\..*)\Z", re.DOTALL)
"""`at` has the state directories of other run directories, see `candidates`."""
_GENERATION = re.compile(rb'"generation"\s*:\s*(\d{1,18})\s*[,}]')
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_log = logging.getLogger("ublkpool.state")


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """The store that a device is bound to; `size_bytes` is the device's size at that attach, or since a resize."""

    kind: str
    size_bytes: int
    identity: wire.Identity = wire.Identity()
    boot: str = ""
    """The boot in which `identity.in_boot` was seen."""
    resized_bytes: int = 0
    """The size that the device was given while it was live; it wins over a smaller one of the config.  0: none."""


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a device name; it outlives the device, so that no generation is used twice."""

    name: str
    v: Literal[1] = 1
    generation: int = 0
    """Of the last attach."""
    store: Store | None = None
    """None: the device was never served, or it was deleted since."""
    takes_next: bool = False
    """Whether the next store that attaches becomes the device's, whatever its identity."""
    owner: str = ""
    """See `wire.Attach.owner`; of the last attach."""
    takes_over: bool = False
    """Whether the next backend breaks its store's lock, no matter which client holds it."""


class _Version(msgspec.Struct):
    v: int = VERSION


class Runner(Protocol):
    """Runs a function in a separate process; see `ControlRunner`."""

    async def run_beside(
        self,
        what: str,
        command: Call,
        result: type[None],
        deadline_s: float = SAVE_DEADLINE_S,
        *,
        owner: str,
    ) -> None:
        """Raises `DaemonError` if the function fails, takes longer than `deadline_s`, or too many of `owner` hang."""


class StateDirectory:
    """The states of one daemon's device names."""

    def __init__(self, directory: Path, runner: Runner, locks: Sequence[int] = ()) -> None:
        """Read the directory; `locks` are the locked descriptors, see `open`.  Raises `DaemonError`."""
        self.directory = directory
        self._runner = runner
        self._locks = list(locks)
        self._states: dict[str, DeviceState] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._unreadable: dict[str, str] = {}
        self._last_seen: dict[str, int] = {}
        """The generations in files that cannot be read otherwise."""
        self._load()

    @classmethod
    async def open(cls, candidates: Sequence[Path], runner: Runner) -> Self:
        """Take the first of these directories that exists or can be made, and lock it for this daemon's life.

        Raises `DaemonError` if none can be made or written to, if another user owns it or another daemon uses it, or if
        it is a directory of the system or has files that are not a daemon's.
        """
        directory = _made(candidates, logging.WARNING)
        locks: list[int] = []
        try:
            for path, flags in _to_be_locked(directory):
                locks.append(await _locked(directory, path, flags))
            states = cls(directory, runner, locks)
            keep_room(directory)
            return states
        except BaseException:
            for fd in locks:
                os.close(fd)
            raise

    @staticmethod
    def check(candidates: Sequence[Path]) -> None:
        """Refuse what `open` would refuse, but for a lock that another daemon has.  Raises `DaemonError`."""
        directory = _made(candidates, logging.DEBUG)
        for path, flags in _to_be_locked(directory):
            os.close(_opened(directory, path, flags))
        _names(directory)

    def close(self) -> None:
        """Unlock the directory."""
        while self._locks:
            os.close(self._locks.pop())

    def turn(self, name: str) -> asyncio.Lock:
        """To be held from `get` to `save`: a name without a device can be changed beside an `add` of it."""
        return self._turns.setdefault(name, asyncio.Lock())

    def get(self, name: str) -> DeviceState:
        """The state of this name, empty for an unknown one.  Raises `DaemonError` if its file cannot be read."""
        if name in self._unreadable:
            raise DaemonError(
                f"{self._path(name)}: {self._unreadable[name]}: device {name} is not served, since its store cannot "
                f"be checked: restore the file from a backup, or accept any store with: ublkpool rebind {name}"
            )
        return self._states.get(name) or DeviceState(name=name)

    def generation(self, name: str) -> int:
        """The generation of the last attach to this name; 0 if there was none or no generation is found in its file."""
        return self._states[name].generation if name in self._states else self._last_seen.get(name, 0)

    def knows(self, name: str) -> bool:
        """Whether this name has a store, or a file that cannot be read."""
        return name in self._unreadable or self.get(name).store is not None

    async def save(self, state: DeviceState) -> None:
        """Make this state durable.  Raises `DaemonError` that names the directory; then `get` is unchanged."""
        write = Write(self._path(state.name), msgspec.json.format(msgspec.json.encode(state)) + b"\n")
        try:
            await self._runner.run_beside(
                f"writing the state of {state.name}",
                Call(write),
                type(None),
                deadline_s=SAVE_DEADLINE_S,
                owner=f"the state of {state.name}",
            )
        except DaemonError as error:
            reason = _plain_reason(error)
            raise DaemonError(
                f"{_WHAT} {self.directory}: cannot write {state.name}.json: {reason}"
            ) from error
        self._states[state.name] = state
        self._unreadable.pop(state.name, None)

    def _load(self) -> None:
        for each in _names(self.directory):
            path = self.directory / each
            if _UNFINISHED.match(each):
                with suppress(OSError):
                    path.unlink()
            elif _STATE.match(each):
                self._read(path, each.removesuffix(".json"))

    def _read(self, path: Path, name: str) -> None:
        """Read one file.  A name that is there and cannot be read, such as a dangling link, counts as served."""
        content = b""
        try:
            content = path.read_bytes()
            self._states[name] = _decoded(content, name)
        except (ValueError, RecursionError, OSError) as error:
            reason = explain(error) if isinstance(error, OSError) else str(error)
            self._unreadable[name] = " ".join(reason.split())
            self._last_seen[name] = max(map(int, _GENERATION.findall(content)), default=0)
            _log.error("%s: not a device's state: %s", path, self._unreadable[name])

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def _names(directory: Path) -> list[str]:
    """The names in the directory.  Raises `DaemonError` if it cannot be listed."""
    # Not `Path.glob`, which takes such a directory for an empty one.
    try:
        return sorted(each.name for each in directory.iterdir())
    except OSError as error:
        raise DaemonError(f"{_WHAT} {directory}: {explain(error)}: choose another with {_OPTION}") from error


def _decoded(content: bytes, name: str) -> DeviceState:
    """The state of this name.  Raises `ValueError`."""
    version = msgspec.json.decode(content, type=_Version).v
    if version != VERSION:
        raise ValueError(f"it has version {version}, and this daemon reads version {VERSION}")
    state = msgspec.json.decode(content, type=DeviceState)
    if state.name != name:
        raise ValueError(f"it is the state of {state.name}")
    return state


def _plain_reason(error: DaemonError) -> str:
    code = getattr(error, "errno", 0)
    return os.strerror(code) if code else str(error)


def _to_be_locked(directory: Path) -> Sequence[tuple[Path, int]]:
    # Also the file: a daemon of an older version locks only that.
    return (directory, os.O_RDONLY | os.O_DIRECTORY), (directory / _LOCK, os.O_RDWR | os.O_CREAT)


def _opened(directory: Path, path: Path, flags: int) -> int:
    """Raises `DaemonError`."""
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DaemonError(f"{_WHAT} {directory}: {explain(error)}: choose another with {_OPTION}") from error


async def _locked(directory: Path, path: Path, flags: int) -> int:
    """Lock `path`, waiting `LOCK_PATIENCE_S` for a daemon that is just ending.  Raises `DaemonError`."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + LOCK_PATIENCE_S
    fd = _opened(directory, path, flags)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                if loop.time() >= deadline_s:
                    raise DaemonError(
                        f"{_WHAT} {directory}: another daemon uses it: choose another with {_OPTION}"
                    ) from None
            await asyncio.sleep(_POLL_S)
    except BaseException:
        os.close(fd)
        raise


def _made(candidates: Sequence[Path], level: int) -> Path:
    """The first that exists or can be made; one that is passed over is logged at this level.  Raises `ConfigError`."""
    *others, last = candidates
    for directory in others:
        try:
            _make(directory)
            return directory
        except ConfigError as error:
            # Passed over only where no state can be kept; an existing directory that is refused may have some.
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _UNWRITABLE:
                raise
            _log.log(
                level,
                "%s: %s; its devices' state is in %s, which may end with the boot (%s)",
                directory,
                error.__cause__.strerror,
                last,
                _OPTION,
            )
    _make(last)
    return last


def _make(directory: Path) -> None:
    """Make the directory, or check that an existing one is a daemon's or empty.  Raises `ConfigError`."""
    if make_own_directory(directory, _WHAT, _OPTION):
        return
    try:
        names = [each.name for each in directory.iterdir()]
    except OSError as error:
        raise ConfigError(
            [f"{_WHAT} {directory}: {explain(error)}: choose another with {_OPTION}"]
        ) from error
    # Where a daemon has locked the file, later files of other programs do no harm.
    foreign = sorted(each for each in names if not (_STATE.match(each) or _OTHERS.match(each)))
    if foreign and _LOCK not in names:
        raise ConfigError(
            [f"{_WHAT} {directory}: not a daemon's: it contains {foreign[0]}: choose another with {_OPTION}"]
        )


def candidates(run_dir: Path, given: Path | None) -> list[Path]:
    """The directories for the state of a daemon in this run directory, in order; no two daemons share one.

    `given` is the user's choice.  For a run directory other than the default, such as a test's, the second one lies
    beside it, for machines on which `/var/lib` cannot be written to.  An ordinary user's are below the user's home.
    """
    if given is not None:
        return [given]
    own = usual_state_dir() or STATE_DIR_DEFAULT
    run_dir = run_dir.resolve()
    if run_dir == usual_run_dir(serves=True).resolve():
        return [own]
    return [
        own / "at" / run_dir.relative_to("/"),
        run_dir.with_name(f"{run_dir.name}.state"),
    ]
