"""Opening a store so that no other server, mount or volume manager has it, and waiting for a dead predecessor.

A store that is written is opened alone: a block device with O_EXCL, which mounts, swap, dm, md and mkfs use as well
(`bd_prepare_to_claim`), a regular file with flock.  The kernel keeps both until the last I/O of a killed process has
ended, and a successor may write only after that.  So opening waits for a dead process as long as that takes, and for a
living one a few seconds.  Runs in the backend's process, before it attaches.
"""

import errno
import fcntl
import math
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
"""How long to wait for a living process, such as an ending predecessor or a udev rule that reads the disk."""
UNSEEN_PATIENCE_S = 20.0
"""The same if no visible process has the lock: another host or container, or the I/O of a dead process."""
_PAUSE_MIN_S = 0.02
_PAUSE_MAX_S = 0.5


class Patience:
    """The wait for one store, from the first refusal on."""

    with_the_dead_s: float = math.inf
    """How long to wait for the I/O of a dead process; a process that only opens a store for others waits in turns."""

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
        self._begun_s = self._since_s = clock()
        self._said = ""
        self._pause_s = _PAUSE_MIN_S

    def wait(self, what: str) -> None:
        """Sleep a moment.  Raises `BackendError` if a living process keeps the store too long.

        `what` says how it keeps it: `locked` or `held exclusively`.
        """
        lockers = in_use.lockers(self._path)
        # A living process may have inherited the descriptor of one that has ended.
        alive = _living(lockers) or _living(in_use.openers(self._path))
        if lockers and not alive:
            text = f"waiting until the I/O of process {lockers[0]}, which has ended, is over"
            if self._clock() - self._begun_s >= self.with_the_dead_s:
                raise BackendError(f"path={self._path}: {text}")
            self._say(text)
            self._since_s = self._clock()
        else:
            self._wait_for_the_living(what, alive)
        # The end of an O_EXCL claim raises no event, and a blocking flock has no deadline.
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

    The lock lasts as long as the descriptor and the I/O on it.  Raises `BackendError` naming the mount, holder or
    process that uses it, `OSError` if it cannot be opened.
    """
    file = open_exclusively(path, flags, mode)
    try:
        lock(file, path, shared=flags & os.O_ACCMODE == os.O_RDONLY)
    except BaseException:
        os.close(file)
        raise
    return file


def open_exclusively(path: Path, flags: int, mode: int = 0o600) -> int:
    """`os.open`, with O_EXCL for a block device to be written.  Raises as `open_alone`."""
    kind = _type(path)
    if stat.S_ISFIFO(kind):
        # Opening it would wait for its other end, perhaps for ever.
        raise BackendError(f"path={path}: neither a regular file nor a block device")
    if flags & os.O_ACCMODE == os.O_RDONLY or not stat.S_ISBLK(kind):
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
    """Lock an open file, exclusively or shared with other readers.  Raises `BackendError` naming its user."""
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
    """Raise `BackendError` if the store lies on the device that it is to serve, whose node is `node`."""
    below: set[str] = set()
    # A path that cannot be examined does not exist yet, or opening it will report why.
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


def _type(path: Path) -> int:
    """The file's mode, 0 for a path that does not exist."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return 0
