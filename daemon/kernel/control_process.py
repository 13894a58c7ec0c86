"""Every call that may wait in the kernel for ever, in a disposable process with a deadline.

Two kinds of calls run here.  A ublk control command may block, for ever if a reference to the device leaked; and a
command that blocks holds a lock that every other command on the host needs, so most commands take turns.  A *look* is
any other call that a disk or a file system answers: an open of a block device, sysfs, another process's /proc, an
umount.  Each call runs in a child of its own: the daemon never waits inside the kernel, and when a deadline passes it
names the call that hangs.

A call that is a `Call` is made by a process that was forked earlier (`warm_process.py`), any other callable by one that
is forked for it and sees everything that the daemon sees.
"""

import asyncio
import errno
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import kernel_log
from ublkpool.daemon.kernel.warm_process import WarmProcess, WarmProcesses
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.processes.backoff import Backoff, start_surely
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.reserve import Reserve, with_room_for_one
from ublkpool.ublk import process_calls
from ublkpool.ublk.errors import UblkError
from ublkpool.workers.process import fork_child

T = TypeVar("T")
DEADLINE_S = 60.0
KILL_PATIENCE_S = 5.0
START_PATIENCE_S = 20.0
START_PAUSE_S = 0.25
"""Between attempts to start a call for which there is no process, descriptor or memory."""
LOOK_DEADLINE_S = 20.0
LOOK_TITLE = "ublkpool-look"
LOOKS_MAX = 4
"""Unfinished looks of one owner, hung ones included."""
ANSWER_BYTES_MAX = 16 << 20
"""Of one answer.  The largest is that of a config file: some 600 bytes for each device, so 27 000 devices."""
_PIPE_BYTES = 65536
_BEGUN = b"\n"
"""Sent before the answer, which is JSON and may begin with white space."""
_log = logging.getLogger("ublkpool.control")


class ControlFailed(DaemonError):
    """A call that failed or hung; `errno` is the kernel's, 0 for a hang."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.errno = code


class CallHung(ControlFailed):
    """A call that had not returned at its deadline: its process got SIGKILL, and ends when the kernel lets it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 0)


class CannotStart(ControlFailed):
    """The call was not made, for want of a descriptor, a process or memory."""

    def __init__(self, what: str, error: OSError) -> None:
        super().__init__(f"{what}: no process for it: {error.strerror}{_limit(error)}", error.errno or 0)


class _Answer(msgspec.Struct):
    value: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    errno: int = 0


class _Started(NamedTuple):
    """A process that makes the call, and the descriptor from which its answer is read."""

    child: Child
    reader: int
    warm: WarmProcess | None = None
    """The process goes on after the answer; None: it was forked for this call, and ends."""


class ControlRunner:
    """Runs control commands (functions of `ublk.control`, or made of them) and looks."""

    def __init__(
        self, reserve: Reserve | None = None, on_hang: Callable[[str, str], None] = lambda what, text: None
    ) -> None:
        """With a `reserve`, commands find descriptors even when the daemon has reached its limit.

        `on_hang` is called with the name of each call that hung, and with the error's text.
        """
        self._turn = asyncio.Lock()
        self._looks: dict[str, set[Child]] = {}
        self._reserve = reserve
        self._on_hang = on_hang
        self._warm = WarmProcesses(_execute)

    def close(self) -> None:
        """Let the processes end that wait for the next call."""
        self._warm.close()

    async def run(
        self, what: str, command: Callable[[], Any], result: type[T], deadline_s: float = DEADLINE_S
    ) -> T:
        """The command's result, which must be of type `result`; `what` begins errors.  Raises `ControlFailed`."""
        async with self._turn:
            return await self.run_beside(what, command, result, deadline_s)

    async def run_beside(
        self,
        what: str,
        command: Callable[[], Any],
        result: type[T],
        deadline_s: float = DEADLINE_S,
        begun: asyncio.Event | None = None,
        owner: str = "",
    ) -> T:
        """As `run`, but without a turn: for a command that completes only after other commands, such as START_DEV.

        `begun` is set when the process is about to send its command.  The start is tried again for
        `START_PATIENCE_S`: a command may be what cleans up after a failed start.  With an `owner` at most `LOOKS_MAX`
        calls of that owner run at once, as looks do.
        """
        loop = asyncio.get_running_loop()
        unfinished = self._with_room(owner, what, f"processes wait for {owner}") if owner else set()
        with ExitStack() as held:

            def start() -> _Started:
                with ExitStack() as attempt:
                    if self._reserve is not None:
                        attempt.enter_context(self._reserve.released())
                    started = self._start(what, command, "ublkpool-ctl", ())
                    held.push(attempt.pop_all())
                    return started

            pauses = Backoff(loop.time, START_PAUSE_S, START_PAUSE_S)
            started = await start_surely("a control command", start, pauses, _log, START_PATIENCE_S)
            with self._telling_hang(what):
                return await self._finish(what, started, result, deadline_s, unfinished, begun)

    def _start(self, what: str, command: Callable[[], Any], title: str, keep_fds: Sequence[int]) -> _Started:
        """Have a process make the call.  Raises `CannotStart`; then nothing runs."""
        try:
            reader, writer = os.pipe()
        except OSError as error:
            raise CannotStart(what, error) from error
        try:
            warm = self._warm.begin(what, title, command, writer) if isinstance(command, Call) else None
            if warm is not None:
                return _Started(warm.child, reader, warm)
            return _Started(Child(_fork(what, command, title, writer, keep_fds)), reader)
        except OSError as error:
            os.close(reader)
            raise CannotStart(what, error) from error
        finally:
            os.close(writer)

    async def _finish(
        self,
        what: str,
        started: _Started,
        result: type[T],
        deadline_s: float,
        unfinished: set[Child],
        begun: asyncio.Event | None = None,
    ) -> T:
        """The answer of the process.  Raises `CallHung` at the deadline, `ControlFailed`."""
        unfinished.add(started.child)
        raw = await _answer(what, started, deadline_s, begun)
        unfinished.discard(started.child)
        if started.warm is not None:
            self._warm.give_back(started.warm)
        return _decode(what, raw, result)

    @contextmanager
    def _telling_hang(self, what: str) -> Iterator[None]:
        try:
            yield
        except CallHung as error:
            self._on_hang(what, str(error))
            raise

    async def look(
        self,
        owner: str,
        what: str,
        work: Callable[[], Any],
        result: type[T],
        deadline_s: float = LOOK_DEADLINE_S,
        keep_fds: Sequence[int] = (),
        title: str = LOOK_TITLE,
    ) -> T:
        """The result of `work`, for which a disk or a file system may keep the process waiting for ever.

        `work` has the descriptors `keep_fds`, and no others of this process; `what` begins errors, and `title`
        names the process.

        `owner` is a device's name: at most `LOOKS_MAX` looks of one owner run at once, so that a device that does not
        answer costs a bounded number of processes, and other devices' looks go on.  Raises `CallHung` at the deadline,
        `ControlFailed` for an `OSError` of `work` and if too many looks are unfinished.
        """
        looks = self._with_room(owner, what, "processes wait for this disk")
        started = self._start(what, work, title, keep_fds)
        try:
            with self._telling_hang(what):
                return await self._finish(what, started, result, deadline_s, looks)
        except CallHung as error:
            _log.error("%s", error)
            raise

    def _with_room(self, owner: str, what: str, why: str) -> set[Child]:
        """The owner's unfinished calls.  Raises `ControlFailed` if there are as many as may be."""
        unfinished = self._unfinished(owner)
        if len(unfinished) >= LOOKS_MAX:
            pids = ", ".join(str(each.pid) for each in unfinished)
            raise ControlFailed(f"{what}: not tried: {len(unfinished)} {why} ({pids})", 0)
        return unfinished

    def _unfinished(self, owner: str) -> set[Child]:
        looks = self._looks.setdefault(owner, set())
        looks -= {each for each in looks if each.exit_status is not None}
        self._looks = {name: each for name, each in self._looks.items() if each or name == owner}
        return looks


async def _answer(
    what: str, started: _Started, deadline_s: float, begun: asyncio.Event | None = None
) -> bytes:
    """What the process has sent; it has ended, or has no call any more.  Raises `CallHung` at the deadline."""
    child = started.child
    answer = _Inbox(started.reader, begun)
    try:
        answer.collect()
        async with asyncio.timeout(deadline_s):
            await (child.wait() if started.warm is None else answer.ended.wait())
        answer.read_all()
    except TimeoutError:
        stack = _kernel_stack(child.pid)
        _dispose(started)
        raise CallHung(
            f"{what} has hung for {deadline_s:.0f} s in process {child.pid}{stack}; {_kernel_says()}"
        ) from None
    except asyncio.CancelledError:
        # The caller that gave up must be able to rely on it: the kernel does not execute the command later.
        _dispose(started)
        with suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), KILL_PATIENCE_S)
        raise
    finally:
        answer.close()
    return bytes(answer.raw)


def _dispose(started: _Started) -> None:
    """The process makes no further call, and ends as soon as the kernel lets it."""
    started.child.send(signal.SIGKILL)
    if started.warm is not None:
        started.warm.close()


class _Inbox:
    """What the process has sent so far: taken while it runs, since a process that fills the pipe waits in its write."""

    def __init__(self, reader: int, begun: asyncio.Event | None) -> None:
        """`begun` is set by the first byte, or by the end of the process if it sent none."""
        self.raw = bytearray()
        self.ended = asyncio.Event()
        """Nothing more comes: the process has closed its end, with the answer or because it died."""
        self._reader = reader
        self._begun = begun
        self._loop = asyncio.get_running_loop()

    def collect(self) -> None:
        """Have the loop read what arrives.  Raises `OSError`."""
        os.set_blocking(self._reader, False)
        self._loop.add_reader(self._reader, self._read)

    def read_all(self) -> None:
        """The process has ended: read what the loop has not."""
        while self._read():
            pass

    def close(self) -> None:
        """Close the descriptor."""
        self._loop.remove_reader(self._reader)
        os.close(self._reader)

    def _read(self) -> bool:
        """Read once; whether there was something."""
        try:
            piece = os.read(self._reader, _PIPE_BYTES)
        except BlockingIOError:
            return False
        if self._begun is not None:
            self._begun.set()
        if not piece:
            self._loop.remove_reader(self._reader)
            self.ended.set()
        self.raw += piece
        return bool(piece)


def _fork(what: str, command: Callable[[], Any], title: str, writer: int, keep_fds: Sequence[int]) -> int:
    """Fork a process that makes this one call and ends; its number.  Raises `OSError`."""
    parent = os.getpid()

    def make() -> int:
        # An END_USER_RECOVERY that outlived the supervisor would complete when the next one's workers fetch their tags,
        # before that supervisor has begun its own recovery: the device would be live without workers.
        process_calls.die_with_parent(parent)
        _execute(what, command, writer)
        return 0

    return with_room_for_one(lambda: fork_child(make, [writer, *keep_fds], title))()


def _execute(
    what: str, command: Callable[[], Any], writer: int, clean_up: Callable[[], None] = lambda: None
) -> None:
    """Make the call and `clean_up`, then write the answer to `writer`, which is closed then."""
    try:
        os.write(writer, _BEGUN)
        answer = _Answer(value=msgspec.Raw(msgspec.json.encode(command())))
    except UblkError as error:
        answer = _Answer(error=str(error), errno=error.errno)
    except OSError as error:
        answer = _Answer(error=str(error), errno=error.errno or 0)
    clean_up()
    _send(what, writer, msgspec.json.encode(answer))


def _send(what: str, writer: int, raw: bytes) -> None:
    """Send the answer, or one in its place that says that it is too large."""
    if len(raw) > ANSWER_BYTES_MAX:
        error = f"{what}: its answer has {len(raw)} bytes, and at most {ANSWER_BYTES_MAX} are taken"
        raw = msgspec.json.encode(_Answer(error=error))
    with os.fdopen(writer, "wb") as stream:
        stream.write(raw)


def _decode(what: str, raw: bytes, result: type[T]) -> T:
    try:
        answer = msgspec.json.decode(raw, type=_Answer)
    except msgspec.DecodeError:
        # Nothing, or the beginning of an answer.
        raise ControlFailed(f"{what}: its process died without an answer", 0) from None
    if answer.error:
        raise ControlFailed(answer.error, answer.errno)
    return msgspec.json.decode(answer.value, type=result)


def _limit(error: OSError) -> str:
    """The limit that the errno stands for, and the setting that raises it."""
    match error.errno:
        case errno.EMFILE:
            return f" (the daemon's limit is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}: LimitNOFILE=, ulimit -n)"
        case errno.EAGAIN:
            return " (the limit of processes: TasksMax=, ulimit -u)"
        case _:
            return ""


def _kernel_says() -> str:
    said = kernel_log.last_words()
    return f"the kernel log says: {' | '.join(said)}" if said else "the kernel log (dmesg) says nothing of it"


def _kernel_stack(pid: int) -> str:
    with suppress(OSError):
        top = Path(f"/proc/{pid}/stack").read_text().split("\n", 1)[0].partition("] ")[2]
        return f" (in {top})" if top else ""
    return ""
