"""A client's wait for a daemon that does not answer, and the search for a daemon whose socket is gone.

Owns the time limits of the wait and the texts that the user sees meanwhile.  Must not import a slow module.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ublkpool.daemon.admin.wire import REPLY_BYTES_MAX
from ublkpool.daemon.errors import DaemonSilent, DaemonUnreachable
from ublkpool.workers.credentials import credentials_of

STOPPED_NOTICE_S = 1.0
"""Seconds of silence after which the client looks whether the daemon is stopped (SIGSTOP)."""
SILENT_NOTICE_S = 5.0
"""Seconds of silence after which the client tells the user that it waits."""
_RECEIVED_BYTES = 1 << 16
_PROC = Path("/proc")


def now_s() -> float:
    """The clock of `DaemonLines`."""
    return time.monotonic()


class DaemonLines:
    """The lines that the daemon sends on one connection; tells the user while the daemon is silent."""

    def __init__(
        self,
        path: Path,
        connection: socket.socket,
        timeout_s: float | None,
        say: Callable[[str], None],
        on_idle: Callable[[], None] = lambda: None,
        is_prompt: bool = True,
        begun_s: float | None = None,
    ) -> None:
        """`timeout_s`: seconds until the wait ends, from `begun_s`, when the client began to connect, or from now.

        None: no limit, because the operation may take long.

        `is_prompt`: the answer is due at once, and the user is told that it has not come.  `on_idle` is called after
        each second of silence, and may raise to end the wait.
        """
        self._path = path
        self._connection = connection
        self._timeout_s = timeout_s
        self._say = say
        self._on_idle = on_idle
        self._is_prompt = is_prompt
        self._said = ""
        self._since_s = now_s() if begun_s is None else begun_s
        self._buffer = bytearray()
        self._pid = credentials_of(connection).pid

    def begin_anew(self) -> None:
        """Measure `timeout_s` from now."""
        self._since_s = time.monotonic()

    def next_line(self) -> bytes:
        """The daemon's next line.  Raises `DaemonUnreachable` if the daemon ends, `DaemonSilent` after `timeout_s`."""
        while b"\n" not in self._buffer and len(self._buffer) < REPLY_BYTES_MAX:
            self._connection.settimeout(min(STOPPED_NOTICE_S, self._left_s()))
            try:
                received = self._connection.recv(_RECEIVED_BYTES)
            except TimeoutError:
                self._on_idle()
                self._check_silence(time.monotonic() - self._since_s)
                continue
            if not received:
                raise DaemonUnreachable("the daemon ended before it answered; its log says why")
            self._buffer += received
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = rest
        return bytes(line)

    def _left_s(self) -> float:
        """Seconds until the wait is given up, but more than 0, which would mean not to wait in another way."""
        if self._timeout_s is None:
            return STOPPED_NOTICE_S
        return max(self._since_s + self._timeout_s - time.monotonic(), 0.001)

    def _check_silence(self, silent_s: float) -> None:
        """Raise at the time limit, else tell the user why the daemon does not answer."""
        if self._timeout_s is not None and silent_s >= self._timeout_s:
            raise silence(self._path, self._pid, self._timeout_s, self._is_prompt)
        if _is_stopped(self._pid):
            self._say_once(f"the daemon, process {self._pid}, {_stopped(self._pid)}; waiting")
        elif self._timeout_s is not None and self._is_prompt and silent_s >= SILENT_NOTICE_S:
            self._say_once(
                f"the daemon, process {self._pid}, has not answered yet; waiting up to {self._timeout_s:g} s"
            )

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(text)


def silence(path: Path, pid: int, timeout_s: float, is_prompt: bool) -> DaemonSilent:
    """The error for a daemon that did not answer in this time; `is_prompt`: the answer was due at once."""
    if _is_stopped(pid):
        reason = f"; it {_stopped(pid)}"
    elif is_prompt:
        reason = f"; it may be hung: see its log, and cat /proc/{pid}/stack"
    else:
        reason = ""
    return DaemonSilent(f"{path}: the daemon, process {pid}, did not answer within {timeout_s:g} s{reason}")


def _stopped(pid: int) -> str:
    return f"is stopped (SIGSTOP): let it go on with kill -CONT {pid}"


def why_unreachable(path: Path, error: OSError) -> DaemonUnreachable:
    """The error for a connection that was not made."""
    start = "start it with: ublkpool serve --run-dir " + str(path.parent)
    match error:
        case FileNotFoundError():
            text = explain_missing(path) or f"{path}: no such socket, the daemon is not running; {start}"
        case ConnectionRefusedError():
            text = f"{path}: a daemon that was killed left this socket, none is running; {start}"
        case PermissionError():
            text = f"{path}: permission denied; run this as the daemon's user, usually with sudo"
        case TimeoutError() | BlockingIOError():
            text = f"{path}: the daemon does not accept connections; it may be hung"
        case _:
            text = f"{path}: cannot reach the daemon: {error.strerror or error}"
    return DaemonUnreachable(text)


def explain_missing(path: Path) -> str:
    """The error for a removed socket that a daemon still listens on; empty if no daemon listens on this path."""
    inode = _listener(path)
    if not inode:
        return ""
    pid = _holder(inode)
    who, how = (f"process {pid}", f"kill {pid}") if pid else ("its process is not visible here", "end it")
    return (
        f"{path}: gone, but a daemon ({who}) listens there: its run directory was emptied or replaced; "
        f"{how}, then start the daemon again"
    )


def _listener(path: Path) -> str:
    """The inode of the listening socket bound to `path`, also if the file was removed; empty if there is none.

    /proc/net/unix shows the path at bind(2) for as long as the socket exists.
    """
    wanted = {str(path), os.path.realpath(path)}
    with suppress(OSError):
        for line in os.fsdecode((_PROC / "net/unix").read_bytes()).split("\n"):
            words = line.split(maxsplit=7)
            if len(words) == 8 and words[7] in wanted and words[3] == "00010000":
                return words[6]
    return ""


def _holder(inode: str) -> int:
    """The pid of a visible process with this socket open, else 0."""
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


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return (_PROC / f"{pid}/stat").read_text(errors="replace").rpartition(") ")[2][:1] in ("T", "t")
    return False
