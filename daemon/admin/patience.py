"""What a client makes of a daemon that does not answer, and of one whose socket is gone.

Owns how long a silence is listened to and what is said meanwhile.  Must not import anything slow.
"""

import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ublkpool.daemon.admin.wire import REPLY_BYTES_MAX
from ublkpool.daemon.errors import DaemonUnreachable

STOPPED_NOTICE_S = 1.0
SILENT_NOTICE_S = 5.0
_RECEIVED_BYTES = 1 << 16
_PROC = Path("/proc")


class Listening:
    """Lines of the daemon's, and what is said while none comes."""

    def __init__(
        self, path: Path, connection: socket.socket, timeout_s: float | None, say: Callable[[str], None]
    ) -> None:
        """`timeout_s` None: as long as it takes, for the daemon may have much to do."""
        self._path = path
        self._connection = connection
        self._timeout_s = timeout_s
        self._say = say
        self._said = ""
        self._buffer = bytearray()
        self._pid = _peer_pid(connection)

    def line(self) -> bytes:
        """The next one.  Raises `DaemonUnreachable` if the daemon ends, or is silent for too long."""
        since_s = time.monotonic()
        while b"\n" not in self._buffer and len(self._buffer) < REPLY_BYTES_MAX:
            self._connection.settimeout(STOPPED_NOTICE_S)
            try:
                received = self._connection.recv(_RECEIVED_BYTES)
            except TimeoutError:
                self._wait(time.monotonic() - since_s)
                continue
            if not received:
                raise DaemonUnreachable("the daemon ended before it answered; its log says why")
            self._buffer += received
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = rest
        return bytes(line)

    def _wait(self, silent_s: float) -> None:
        is_stopped = _is_stopped(self._pid)
        who = f"the daemon, process {self._pid}, "
        why = f"is stopped (SIGSTOP): let it go on with kill -CONT {self._pid}" if is_stopped else ""
        if self._timeout_s is not None and silent_s >= self._timeout_s:
            why = why or f"may be hung: see its log, and cat /proc/{self._pid}/stack"
            raise DaemonUnreachable(
                f"{self._path}: {who}did not answer within {self._timeout_s:g} s; it {why}"
            )
        if why:
            self._say_once(f"{who}{why}; waiting")
        elif self._timeout_s is not None and silent_s >= SILENT_NOTICE_S:
            self._say_once(f"{who}has not answered yet; waiting up to {self._timeout_s:g} s")

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(text)


def explain_missing(path: Path) -> str:
    """Why there is no socket at `path` although a daemon listens there; empty if none is seen to."""
    inode = _listener(path)
    if not inode:
        return ""
    pid = _holder(inode)
    who, how = (f"process {pid}", f"kill {pid}") if pid else ("whose process is not seen from here", "end it")
    return (
        f"{path}: gone, but a daemon ({who}) listens there: its run directory was emptied or replaced; "
        f"{how}, then start the daemon again"
    )


def _listener(path: Path) -> str:
    """The inode of a socket that was bound to this path and listens; the kernel remembers the path of a removed one."""
    wanted = {str(path), os.path.realpath(path)}
    with suppress(OSError):
        for line in (_PROC / "net/unix").read_text().splitlines():
            words = line.split(maxsplit=7)
            if len(words) == 8 and words[7] in wanted and words[3] == "00010000":
                return words[6]
    return ""


def _holder(inode: str) -> int:
    """The process that has this socket open, 0 if none is seen."""
    wanted = f"socket:[{inode}]"
    for process in _PROC.iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                if any(_target(each) == wanted for each in (process / "fd").iterdir()):
                    return int(process.name)
    return 0


def _target(link: Path) -> str:
    with suppress(OSError):
        return str(link.readlink())
    return ""


def _peer_pid(connection: socket.socket) -> int:
    """The pid of the process that began to listen (SO_PEERCRED)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return (_PROC / f"{pid}/stat").read_text().rpartition(") ")[2][:1] in ("T", "t")
    return False
