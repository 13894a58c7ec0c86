"""`python -m MODULE` without a start of Python: a copy of a process that has imported ublkpool.

In a guest the imports take most of a daemon's start.  One process (`python -m support.vm.warm_starts`) imports them and
forks on demand; the child is a child of this process, which waits for it, and has its own command line and environment
in /proc, by which tests recognize it.  What a process inherits otherwise, such as its cgroup and mount namespace, is
that of the moment when that process began: `WarmStarts.fits` says whether this process's is still the same.

A copy that is a daemon has no start of Python for its template of backends either: where the daemon's child would
become the template by exec (`daemon/backends/template_process.py`), it runs that program in its own process.  What a
test's daemon has changed in ublkpool (`patience.py`) then holds for backends, too.

Owns the channel to that process, and its life.
"""

import array
import ctypes
import json
import os
import re
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, Protocol

_TEMPLATE = "ublkpool.daemon.backend_template"
_IMPORTED = (
    "support.vm.patience",
    "support.fakes.watched_calls",
    "ublkpool.daemon.cli.serve",
    "ublkpool.daemon.supervisor",
    "ublkpool.workers.process",
    "ublkpool.ublk.sibling",
)
_REQUEST_BYTES_MAX = 1 << 18
_PID_BYTES = 16
_CAP_SYS_RESOURCE = 24
_PR_SET_MM = 35
_PR_SET_MM_ARG_START, _PR_SET_MM_ARG_END, _PR_SET_MM_ENV_START, _PR_SET_MM_ENV_END = 8, 9, 10, 11


class Started(Protocol):
    """What `subprocess.Popen` and `WarmChild` have in common."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


class WarmChild:
    """A child of this process that another one has forked."""

    def __init__(self, pid: int, command: Sequence[str]) -> None:
        self.pid = pid
        self._command = command
        self._status: int | None = None

    def poll(self) -> int | None:
        """The exit status if it has ended, negative if a signal ended it; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns the exit status.  Raises `subprocess.TimeoutExpired` after `timeout` seconds."""
        if self.poll() is None:
            death = os.pidfd_open(self.pid)
            try:
                if not select.select([death], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self._command, timeout or 0)
            finally:
                os.close(death)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        """End it now."""
        self.send_signal(signal.SIGKILL)


class WarmStarts:
    """The process that forks."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._inherited: object = None

    def begin(self) -> None:
        """Start the process; what it inherits is what its children do."""
        self._inherited = _inherited()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Pytest finds this module by its own setting, and a guest's environment has no PYTHONPATH.
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=theirs.fileno(), env=environment
            )

    def fits(self, command: Sequence[str]) -> bool:
        """Whether `start` can start this command, and it would inherit what a child of this process does."""
        is_module = list(command[:2]) == [sys.executable, "-m"]
        return self._channel is not None and is_module and self._inherited == _inherited()

    def start(self, command: Sequence[str], environment: Mapping[str, str], out: int) -> WarmChild:
        """Start `[python, "-m", MODULE, ARGUMENT...]` with standard output and error on `out`, and no input."""
        assert self._channel is not None
        request = json.dumps({"command": list(command), "environment": dict(environment)}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [out]))]
        self._channel.sendmsg([request], rights)
        answer = self._channel.recv(_PID_BYTES)
        assert answer, "the process that has imported ublkpool has ended"
        return WarmChild(int(answer), command)

    def end(self) -> None:
        """End the process; its children go on."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            assert self._process.wait() == 0
            self._process = None


def _inherited() -> tuple[object, ...]:
    """What a child inherits and tests change."""
    namespaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "user", "pid_for_children")]  # noqa: PTH115
    limits = resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Path("/proc/self/cgroup").read_text(), Path.cwd(), *namespaces, *limits


def _serve(channel: socket.socket) -> None:
    """Fork for each request, until the other end is closed."""
    from ublkpool.daemon import backend_template
    from ublkpool.ublk.sibling import fork_beside

    for module in (*_IMPORTED, *backend_template._IMPORTED):
        __import__(module)
    while True:
        request, ancillary, _, _ = channel.recvmsg(_REQUEST_BYTES_MAX, socket.CMSG_SPACE(4))
        if not request:
            return
        ((_, _, right),) = ancillary
        (out,) = array.array("i", right)
        pid = fork_beside()
        if pid == 0:
            channel.close()
            _go_on_at_exec()
            _become(**json.loads(request), out=out)
        os.close(out)
        channel.send(str(pid).encode())


def _go_on_at_exec() -> None:
    """From now on a child that would exec the template of backends runs that module in its own process instead.

    Everything is imported there already.
    """
    execve = os.execve

    def replaced(path: str, command: list[str], environment: Mapping[str, str]) -> NoReturn:
        if command[1:3] == ["-m", _TEMPLATE] and _may_show():
            _close_at_exec()
            _take_signals_of_python()
            _become(command, dict(environment))
        execve(path, command, environment)

    setattr(os, "execve", replaced)  # noqa: B010


def _take_signals_of_python() -> None:
    """As a start of Python sets them."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _close_at_exec() -> None:
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        # The listing's own descriptor is among the names, and closed.
        with suppress(OSError):
            if not os.get_inheritable(int(name)):
                os.close(int(name))


def _become(command: list[str], environment: dict[str, str], out: int | None = None) -> NoReturn:
    """Run a module as the main program, to its end; `out`: a descriptor for its output, None to keep what it has."""
    status = 1
    try:
        if out is not None:
            _take_descriptors(out)
        _show(command, environment)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = command[2:]
        # Python warns of a main program that was imported before.
        sys.modules.pop(command[2], None)
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _take_descriptors(out: int) -> None:
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)


def _show(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Make /proc show this command line and environment (prctl(2), PR_SET_MM).  Raises `OSError` without the right."""
    words = "".join(f"{word}\0" for word in command).encode()
    pairs = "".join(f"{key}={value}\0" for key, value in environment.items()).encode()
    for text, start, end in (
        (pairs, _PR_SET_MM_ENV_START, _PR_SET_MM_ENV_END),
        (words, _PR_SET_MM_ARG_START, _PR_SET_MM_ARG_END),
    ):
        shown = ctypes.create_string_buffer(text, len(text))
        _SHOWN.append(shown)
        address = ctypes.addressof(shown)
        moves = [(start, address), (end, address + len(text))]
        # The kernel refuses a start behind the end, so a text that moves to a higher address moves its end first.
        for option, to in moves if address <= _shown_end(end) else reversed(moves):
            _set_mm(option, to)


def _shown_end(option: int) -> int:
    """The address where the command line or the environment of /proc ends now (proc_pid_stat(5))."""
    values = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    return int(values[{_PR_SET_MM_ARG_END: 46, _PR_SET_MM_ENV_END: 48}[option]])


def _may_show() -> bool:
    """Whether this process may do what `_show` does (capabilities(7): CAP_SYS_RESOURCE)."""
    (effective,) = re.findall(r"^CapEff:\s*(\S+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return bool(int(effective, 16) >> _CAP_SYS_RESOURCE & 1)


_SHOWN: list[object] = []
"""The memory that /proc shows, which must stay where it is."""
_libc = ctypes.CDLL(None, use_errno=True)


def _set_mm(option: int, address: int) -> None:
    if _libc.prctl(_PR_SET_MM, option, ctypes.c_ulong(address), 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_MM, {option}): {os.strerror(error)}")


if __name__ == "__main__":
    with socket.socket(fileno=os.dup(0)) as requests:
        _serve(requests)
