"""A queue's unix socket that a backend cannot reach: how long it waits, and the error after that.

A dead worker's socket is missing until its successor makes one, and a new socket is denied until its owner and mode are
set.  A failure that lasts longer does not end by itself: after `HELLO_TIMEOUT_MS` the worker would kill the backend for
not saying HELLO, so the backend ends first, with the reason.
"""

import errno
import os
import time
from pathlib import Path

from ublkpool.bufpool.errors import BackendError

DENIED_PATIENCE_S = 5.0
MISSING_PATIENCE_S = 25.0
LOOK_S = 0.5
"""How often `Door.look` is called for a transport that connects by itself, in seconds."""
_PATIENCE_S = {
    errno.EACCES: DENIED_PATIENCE_S,
    errno.EPERM: DENIED_PATIENCE_S,
    errno.ENOENT: MISSING_PATIENCE_S,
}
_DENIED = (
    "run this backend as root, or as a member of the daemon's group; "
    "if it is one, restart the daemon, which gives its sockets back to the group"
)
_MISSING = (
    "its worker has not come back, or the run directory was emptied: see the daemon's log and `ublkpool list`"
)


class Door:
    """One queue's socket, and since when connecting to it fails."""

    def __init__(self, queue: int, path: str) -> None:
        self._queue, self._path = queue, path
        self._since_s = 0.0
        self._error = 0

    def reached(self) -> None:
        """A connection was made."""
        self._error = 0

    def failed(self, error: int) -> None:
        """An attempt to connect failed with this errno.  Raises `BackendError` if that lasts too long."""
        patience_s = _PATIENCE_S.get(error)
        if patience_s is None:
            # The socket exists: its worker is busy or has just died.
            self._error = 0
            return
        now_s = time.monotonic()
        if self._error != error:
            self._error, self._since_s = error, now_s
        elif now_s - self._since_s >= patience_s:
            way_out = _MISSING if error == errno.ENOENT else _DENIED
            raise BackendError(
                f"queue {self._queue}: {self._path}: {os.strerror(error)} for {patience_s:g} s: {way_out}"
            )

    def look(self) -> None:
        """Test the socket, for a transport that reports no errors.  Raises `BackendError` as `failed`."""
        try:
            Path(self._path).stat()
            error = 0 if os.access(self._path, os.W_OK, effective_ids=True) else errno.EACCES
        except OSError as unseen:
            error = unseen.errno or 0
        self.failed(error)
