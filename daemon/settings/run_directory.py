"""The run directory of one daemon: claimed at its start, filled with its entries, removed at its clean end.

Owns the lock file, which the daemon holds (flock(2)) for its life and which records whether a daemon made the
directory, and the modes of the entries.  A directory that existed before keeps its mode; the daemon makes and removes
only its own entries.
"""

import asyncio
import errno
import fcntl
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import ConfigError, DaemonError
from ublkpool.daemon.settings.own_directory import make_own_directory
from ublkpool.workers.listening import socket_mode
from ublkpool.workers.privileges import Account

WAY_OUT = "choose another with --run-dir"
REPLACE_DEADLINE_S = 90.0
CLAIMS_MAX = 16
_NAME_ONE = "name an empty directory, or one that does not exist yet, with --run-dir"
_POLL_S = 0.05
_log = logging.getLogger("ublkpool.supervisor")
_WHAT = "run directory"
_LOCK = "lock"
_MADE, _FOUND = b"made\n", b"found\n"
SOCKETS = ("admin.sock", "attach.sock", "held.sock", "pool.sock")
_ENTRY = re.compile(
    r"(lock|queues|devices|(admin|attach|held|pool|metrics)\.sock|metrics\.(json|new)|memory-[A-Za-z0-9_.-]+\.keep|lost\+found)\Z"
)
_QUEUE_SOCKET = re.compile(r"\d+\.\d+(\.ring)?\Z")
_UNFINISHED = re.compile(r".+\.(new|old|unreadable)\Z")


class RunDirectory:
    """A claimed run directory; no other daemon can claim it before `remove` or the end of this process."""

    def __init__(self, path: Path, lock: int, made: bool) -> None:
        """Called by `claim`; `lock`: descriptor of the locked file; `made`: a daemon made the directory."""
        self.path = path
        self._lock = lock
        self._made = made

    @property
    def queues(self) -> Path:
        """The directory of the sockets on which workers listen for backends."""
        return self.path / "queues"

    @property
    def devices(self) -> Path:
        """The directory of the devices' records."""
        return self.path / "devices"

    @classmethod
    def claim(cls, path: Path) -> "RunDirectory":
        """Make and lock the directory, or lock an existing one.  Raises `ConfigError`, `DaemonRuns`, `DaemonError`."""
        for _ in range(CLAIMS_MAX):
            made = make_own_directory(path, _WHAT, "--run-dir")
            try:
                # Daemons of an older version left their lock files empty; count the directory as made by a daemon.
                made = made or (_check_is_run_directory(path) and _is_empty_lock(path))
                lock = _open_lock(path)
            except FileNotFoundError:
                # A daemon that ended has just removed the directory.
                continue
            if _is_still_there(path, lock):
                return cls(path, lock, _was_made(lock, made))
            os.close(lock)
        raise DaemonError(f"{path}: other daemons removed it {CLAIMS_MAX} times: {WAY_OUT}")

    @classmethod
    async def replace(cls, path: Path, ask_to_leave: Callable[[], None]) -> "RunDirectory":
        """Claim the directory; if a daemon runs there, call `ask_to_leave` and wait up to REPLACE_DEADLINE_S seconds.

        Raises `DaemonError` if that daemon does not end in time, and what `claim` raises.
        """
        with suppress(DaemonRuns):
            return cls.claim(path)
        ask_to_leave()
        deadline_s = asyncio.get_running_loop().time() + REPLACE_DEADLINE_S
        while asyncio.get_running_loop().time() < deadline_s:
            with suppress(DaemonRuns):
                return cls.claim(path)
            await asyncio.sleep(_POLL_S)
        raise DaemonError(f"{path}: the daemon that runs here has not left after {REPLACE_DEADLINE_S:.0f} s")

    def prepare(self, group: int | None, workers_enter: bool = False) -> None:
        """Make the subdirectories, with modes that let members of `group` reach the sockets for backends.

        `workers_enter`: every user may pass the directory, since workers that are no root connect to the broker there.

        Sockets of an earlier daemon's workers get their owner and mode back, because systemd gives every entry of a
        RuntimeDirectory= to root at each start.  Raises `ConfigError` if the group cannot enter an existing directory.
        """
        with _naming_failure(self.path):
            if group is not None:
                self._admit(group)
            if workers_enter and _may_be_opened(self.path, self._made):
                _let_pass(self.path)
            _make_entry(self.queues, group)
            _make_entry(self.devices, None)
            for each in self.queues.iterdir():
                _restore_socket(each, group)

    def _admit(self, group: int) -> None:
        """Let the group enter the directory.  Raises `ConfigError` if it cannot."""
        if _may_be_opened(self.path, self._made):
            _open_to(self.path, group)
        else:
            _check_lets_in(self.path, group)

    def remove(self) -> None:
        """Remove the daemon's entries and, if a daemon made it, the directory; then unlock it for the next daemon.

        Records of devices that still exist stay for the next daemon, and the directory with them.
        """
        try:
            (self.path / "pool.sock").unlink(missing_ok=True)
            _remove_entries(self.queues, _QUEUE_SOCKET)
            _remove_entries(self.devices, _UNFINISHED)
            # Last, because without this file another daemon can claim the directory.
            (self.path / _LOCK).unlink(missing_ok=True)
            if self._made:
                with suppress(OSError):
                    self.path.rmdir()
        finally:
            os.close(self._lock)


def check_prepared(path: Path, group: int | None) -> None:
    """Refuse what `RunDirectory.prepare` would refuse, in a directory that another daemon has locked; change nothing.

    Raises `ConfigError`.
    """
    with _naming_failure(path):
        made = (path / _LOCK).read_bytes() in (_MADE, b"")
        if group is not None and not _may_be_opened(path, made):
            _check_lets_in(path, group)
        for name in ("queues", "devices"):
            _check_entry(path / name)


@contextmanager
def _naming_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise ConfigError([f"{_WHAT} {path}: {where}: {explain(error)}: {WAY_OUT}"]) from error


def _may_be_opened(path: Path, made: bool) -> bool:
    """Whether a daemon made the directory, or systemd made it for us (RUNTIME_DIRECTORY)."""
    return made or str(path) in os.environ.get("RUNTIME_DIRECTORY", "").split(":")


def _check_lets_in(path: Path, group: int) -> None:
    """Raise `ConfigError` if the group cannot enter the directory."""
    about = path.stat()
    by_group = about.st_gid == group and about.st_mode & stat.S_IXGRP
    if not by_group and not about.st_mode & stat.S_IXOTH:
        raise ConfigError(
            [
                f"{_WHAT} {path}: group {group} of the config cannot enter it "
                f"(mode {stat.S_IMODE(about.st_mode):04o}, group {about.st_gid}): "
                f"chgrp {group} {path} && chmod 750 {path}, or {WAY_OUT}"
            ]
        )


def restore_queues(path: Path, group: int | None, workers_enter: bool = False) -> None:
    """Make the workers' directory again if another program removed it while the daemon runs.  Raises `OSError`."""
    queues = path / "queues"
    if queues.is_dir():
        return
    _log.error("%s was removed while the daemon runs; making it again", queues)
    if not path.is_dir():
        path.mkdir(0o700)
        _open_to(path, group)
        if workers_enter:
            _let_pass(path)
    _make_entry(queues, group)


class DaemonRuns(DaemonError):
    """Another daemon holds the run directory's lock."""


def why_not_a_run_directory(path: Path) -> str:
    """Why a daemon would not use this directory, which exists: it has entries of others.  Raises `OSError`."""
    try:
        _check_is_run_directory(path)
    except ConfigError as error:
        return str(error)
    return ""


def _check_is_run_directory(path: Path) -> bool:
    """Whether a daemon used this directory before.

    Raises `ConfigError` for a directory with entries that are not a daemon's, and `OSError`.
    """
    entries = {each.name for each in path.iterdir()}
    # With all three present a daemon used this directory, and later entries of other programs do no harm.
    was_here = {_LOCK, "queues", "devices"} <= entries and (path / _LOCK).is_file()
    foreign = sorted(each for each in entries if not _ENTRY.match(each))
    if foreign and not was_here:
        raise ConfigError([f"{_WHAT} {path}: not a daemon's: it contains {foreign[0]}: {_NAME_ONE}"])
    return _LOCK in entries


def _is_empty_lock(path: Path) -> bool:
    about = (path / _LOCK).lstat()
    return stat.S_ISREG(about.st_mode) and about.st_size == 0


def _open_lock(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path / _LOCK, flags, 0o600)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError([f"{_WHAT} {path}: {path / _LOCK}: {explain(error)}: {WAY_OUT}"]) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise DaemonRuns(
            f"{path}: another daemon is running here: stop it, or choose another --run-dir"
        ) from None
    return fd


def _is_still_there(path: Path, lock: int) -> bool:
    """Whether `path` still has the locked file; a daemon that ends removes it, and then the lock protects nothing."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock), (path / _LOCK).lstat())
    return False


def _was_made(lock: int, made_now: bool) -> bool:
    """Whether a daemon made the directory: the one that the lock file recorded, else this one (`made_now`)."""
    recorded = os.pread(lock, len(_FOUND), 0)
    if recorded:
        return recorded == _MADE
    # A full file system must not keep the daemon from starting; then the lock file stays empty.
    with suppress(OSError):
        os.pwrite(lock, _MADE if made_now else _FOUND, 0)
    return made_now


def _make_entry(path: Path, group: int | None) -> None:
    """Make a subdirectory, or accept an existing one.  Raises `OSError`, also if `path` is no directory."""
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    _check_entry(path)
    _open_to(path, group)


def _check_entry(path: Path) -> None:
    """Raise `OSError` unless `path` is a directory of this daemon's user or root's."""
    about = path.lstat()
    if not stat.S_ISDIR(about.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if about.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, f"it belongs to user {about.st_uid}", str(path))


def _restore_socket(path: Path, group: int | None) -> None:
    """Set owner and mode of a worker's socket, as the worker that made it did."""
    # A worker that ends removes its socket.
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            os.chown(path, os.geteuid(), -1 if group is None else group)
            path.chmod(socket_mode(group))


def let_workers_connect(pool_socket: Path, account: Account) -> None:
    """Set group and mode of the broker's socket, so that workers of this account can connect, and root's as well.

    At every start: systemd gives it to root.  Harmless without a socket.
    """
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(pool_socket.lstat().st_mode):
            os.chown(pool_socket, -1, account.group)
            pool_socket.chmod(0o770 if account.user else 0o700)


def _let_pass(path: Path) -> None:
    path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IXOTH)


def _open_to(path: Path, group: int | None) -> None:
    if group is not None:
        os.chown(path, -1, group)
    path.chmod(0o700 if group is None else 0o750)


def _remove_entries(directory: Path, pattern: "re.Pattern[str]") -> None:
    with suppress(OSError):
        for each in directory.iterdir():
            if pattern.match(each.name):
                each.unlink()
        directory.rmdir()
