"""Opening a store so that no other server, mount or volume manager has it, and waiting for a dead predecessor.

A store that is written is opened alone: a block device with O_EXCL, which mounts, swap, dm, md and mkfs take as well
(`bd_prepare_to_claim`), a regular file with flock.  The kernel keeps both for as long as I/O of a process that was
killed still runs, and a successor may write only after that: so opening waits for the dead however long that takes,
and for the living a few seconds.  Runs in the backend's process, before it attaches.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk import store_users as in_use
from ublkpool.bufpool.sdk.backend import log

LIVE_PATIENCE_S = 5.0
"""How long a living process may keep a store: a predecessor that is ending, a udev rule that looks at a disk."""
UNSEEN_PATIENCE_S = 20.0
"""The same if no process is seen to have the lock: another host, another container, or the I/O of a dead process."""
_PAUSE_MIN_S = 0.02
_PAUSE_MAX_S = 0.5


class Patience:
    """The wait for one store, from the first refusal on."""

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`clock` and `sleep` are in seconds."""
        self._path = path
        self._clock = clock
        self._sleep = sleep
        self._since_s = clock()
        self._said = ""
        self._pause_s = _PAUSE_MIN_S

    def wait(self, what: str) -> None:
        """Sleep a moment.  Raises `BackendError` if the process that has it is alive and stays.

        `what` says how it has it: `locked` or `held`.
        """
        lockers = in_use.lockers(self._path)
        # The descriptor of a process that has ended may have been inherited by one that lives.
        alive = _living(lockers) or _living(in_use.openers(self._path))
        if lockers and not alive:
            self._say(f"waiting until the I/O of process {lockers[0]}, which has ended, is over")
            self._since_s = self._clock()
        else:
            self._wait_for_the_living(what, alive)
        # Nothing tells when a claim of O_EXCL ends, and a blocking flock knows no deadline.
        self._sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _PAUSE_MAX_S)

    def _wait_for_the_living(self, what: str, seen: list[int]) -> None:
        who = ", ".join(map(in_use.name_process, seen)) or "a process that cannot be seen from here"
        patience_s = LIVE_PATIENCE_S if seen else UNSEEN_PATIENCE_S
        if self._clock() - self._since_s >= patience_s:
            raise BackendError(
                f"path={self._path}: {what} by {who}: end that first, or serve another file or block device"
            )
        self._say(f"{what} by {who}; waiting up to {patience_s:g} s")

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            log.warning("%s: %s", self._path, text)


def open_alone(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open and lock a file or block device that only this process may write; with O_RDONLY others may read it, too.

    The lock lasts as long as the descriptor and the I/O on it.  Raises `BackendError` naming who has it, `OSError`.
    """
    file = open_exclusively(path, flags, mode)
    try:
        lock(file, path, shared=flags & os.O_ACCMODE == os.O_RDONLY)
    except BaseException:
        os.close(file)
        raise
    return file


def open_exclusively(path: Path, flags: int, mode: int = 0o600) -> int:
    """`os.open`, with O_EXCL if it is a block device to be written.  Raises `BackendError` naming who has it."""
    if flags & os.O_ACCMODE == os.O_RDONLY or not _is_block_device(path):
        return os.open(path, flags, mode)
    patience = Patience(path)
    while True:
        try:
            return os.open(path, flags | os.O_EXCL, mode)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        _refuse_users(path, in_use.claimers(path))
        patience.wait("held exclusively")


def lock(file: int, path: Path, *, shared: bool) -> None:
    """Lock an open file for this process, or for all who only read it.  Raises `BackendError` naming who has it."""
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    patience = Patience(path)
    while True:
        try:
            fcntl.flock(file, mode)
            break
        except BlockingIOError:
            patience.wait("locked")
    if not shared:
        _refuse_users(path, in_use.users_without_a_claim(path))


def refuse_own_disk(path: Path, node: Path | None) -> None:
    """Raise `BackendError` if a device's data would lie on that device itself, whose node is `node`."""
    below: set[str] = set()
    # What cannot be looked at is not there yet, or is named when it is opened.
    with suppress(OSError):
        below = in_use.disks_below(path) if node is not None else below
    if node is not None and node.name in below:
        raise BackendError(
            f"path={path}: lies on {node}, the disk that is to be served from it: "
            f"every request would wait for itself; name another file or block device"
        )


def _living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if not in_use.is_dying(pid)]


def _refuse_users(path: Path, users: list[str]) -> None:
    if users:
        raise BackendError(f"path={path}: in use: {'; '.join(users)}; end that first, or use another")


def _is_block_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except FileNotFoundError:
        return False
