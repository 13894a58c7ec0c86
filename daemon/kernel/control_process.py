"""Whatever may wait in the kernel for ever, in a disposable process with a deadline.

Two kinds of calls run here.  A ublk control command may block, for ever if a reference leaked; and a command that
blocks holds a lock that every other command on the host wants, so most of them take turns.  A *look* is any other call
that a disk or a file system answers: an open of a block device, sysfs, another process's /proc, an umount.  Each runs
in a child of its own: the daemon never waits inside the kernel, and when a deadline passes it says what hangs.

A child is forked for each call instead of kept in a pool: looks happen a few times in a device's life, a whole one
takes about 4 ms, and a child that hangs needs no replacement.
"""

import asyncio
import errno
import logging
import os
import resource
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import kernel_log
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.readable import readable
from ublkpool.daemon.processes.reserve import Reserve, with_room_for_one
from ublkpool.ublk import queue
from ublkpool.ublk.errors import UblkError
from ublkpool.workers.process import fork_child

T = TypeVar("T")
DEADLINE_S = 60.0
KILL_PATIENCE_S = 5.0
START_PATIENCE_S = 20.0
START_PAUSE_S = 0.25
"""While there is no process to be had."""
LOOK_DEADLINE_S = 20.0
LOOK_TITLE = "ublkpool-look"
LOOKS_MAX = 4
"""Looks of one owner that have not ended, hung ones included."""
_BEGUN = b"\n"
"""Before the answer, to which it makes no difference: JSON may begin with white space."""
_log = logging.getLogger("ublkpool.control")


class ControlFailed(DaemonError):
    """A control command that failed or hung; `errno` is the kernel's, 0 for a hang."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.errno = code


class CallHung(ControlFailed):
    """A call that was not back at its deadline: its process was told to KILL and ends when the kernel lets it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 0)


class CannotStart(ControlFailed):
    """There was no descriptor, process or memory for the call: it was not made."""

    def __init__(self, what: str, error: OSError) -> None:
        super().__init__(f"{what}: no process for it: {error.strerror}{_limit(error)}", error.errno or 0)


class _Answer(msgspec.Struct):
    value: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    errno: int = 0


class ControlRunner:
    """Runs control commands (functions of `ublk.control`, or made of them) and looks."""

    def __init__(self, reserve: Reserve | None = None) -> None:
        """With a `reserve`, commands find descriptors although the daemon has none left."""
        self._turn = asyncio.Lock()
        self._looks: dict[str, set[Child]] = {}
        self._reserve = reserve

    async def run(
        self, what: str, command: Callable[[], Any], result: type[T], deadline_s: float = DEADLINE_S
    ) -> T:
        """The command's result, which must be of type `result`.  Raises `ControlFailed`."""
        async with self._turn:
            return await self._run_surely(what, command, result, deadline_s)

    async def run_beside(
        self,
        what: str,
        command: Callable[[], Any],
        result: type[T],
        deadline_s: float = DEADLINE_S,
        begun: asyncio.Event | None = None,
    ) -> T:
        """The same without a turn: for START_DEV, which waits for what other commands may be needed for.

        `begun` is set when the process is about to send its command.
        """
        return await self._run_surely(what, command, result, deadline_s, begun)

    async def _run_surely(
        self,
        what: str,
        command: Callable[[], Any],
        result: type[T],
        deadline_s: float,
        begun: asyncio.Event | None = None,
    ) -> T:
        """Tried again while there is no process, descriptor or memory for it: it may be the end of a failed start."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + START_PATIENCE_S
        while True:
            try:
                with self._reserve.released() if self._reserve is not None else nullcontext():
                    return await self._run(what, command, result, deadline_s, begun)
            except CannotStart as error:
                if loop.time() > until_s:
                    raise
                _log.warning("%s; trying again", error)
            await asyncio.sleep(START_PAUSE_S)

    async def look(
        self,
        owner: str,
        what: str,
        work: Callable[[], Any],
        result: type[T],
        deadline_s: float = LOOK_DEADLINE_S,
        keep_fds: Sequence[int] = (),
    ) -> T:
        """The result of `work`, which a disk or a file system may keep waiting for ever; `what` is for the error.

        `work` has the descriptors `keep_fds`, and no others of this process.

        `owner` is a device's name: at most `LOOKS_MAX` looks of one owner are under way, so that a device that answers
        nothing costs a bounded number of processes, and another device's looks are not refused for it.  Raises
        `CallHung` at the deadline, `ControlFailed` for an `OSError` of `work` and if too many looks are under way.
        """
        looks = self._unfinished(owner)
        if len(looks) >= LOOKS_MAX:
            pids = ", ".join(str(each.pid) for each in looks)
            raise ControlFailed(f"{what}: not tried: {len(looks)} processes wait for this disk ({pids})", 0)
        try:
            return await self._run(what, work, result, deadline_s, None, LOOK_TITLE, looks, keep_fds)
        except CallHung as error:
            _log.error("%s", error)
            raise

    def _unfinished(self, owner: str) -> set[Child]:
        looks = self._looks.setdefault(owner, set())
        looks -= {each for each in looks if each.exit_status is not None}
        self._looks = {name: each for name, each in self._looks.items() if each or name == owner}
        return looks

    async def _run(
        self,
        what: str,
        command: Callable[[], Any],
        result: type[T],
        deadline_s: float,
        begun: asyncio.Event | None = None,
        title: str = "ublkpool-ctl",
        looks: set[Child] | None = None,
        keep_fds: Sequence[int] = (),
    ) -> T:
        child, reader = _start(what, command, title, keep_fds)
        if looks is not None:
            looks.add(child)
        try:
            async with asyncio.timeout(deadline_s):
                if begun is not None:
                    await readable(reader)
                    begun.set()
                await child.wait()
        except TimeoutError:
            stack = _kernel_stack(child.pid)
            child.send(signal.SIGKILL)
            raise CallHung(
                f"{what} has hung for {deadline_s:.0f} s in process {child.pid}{stack}; {_kernel_says()}"
            ) from None
        except asyncio.CancelledError:
            # Whoever gave up must know that the kernel will not carry it out later.
            child.send(signal.SIGKILL)
            with suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), KILL_PATIENCE_S)
            raise
        finally:
            # The pipe holds the whole answer, which is far smaller than a pipe, once the child has exited.
            raw = _drain(reader, child.exit_status is not None)
        return _decode(what, raw, result)


def _start(what: str, command: Callable[[], Any], title: str, keep_fds: Sequence[int]) -> tuple[Child, int]:
    """A process that executes the command, and where its answer comes from.  Raises `CannotStart`: nothing runs."""
    parent = os.getpid()
    try:
        reader, writer = os.pipe()
    except OSError as error:
        raise CannotStart(what, error) from error
    fork = with_room_for_one(
        lambda: fork_child(lambda: _execute(command, writer, parent), [writer, *keep_fds], title)
    )
    try:
        return Child(fork(), what), reader
    except OSError as error:
        os.close(reader)
        raise CannotStart(what, error) from error
    finally:
        os.close(writer)


def _execute(command: Callable[[], Any], writer: int, parent_pid: int) -> int:
    try:
        # An END_USER_RECOVERY that outlived the supervisor would be answered by the tags that the next one fetches
        # before it starts its own recovery: the device would be live without workers.
        queue.die_with_parent(parent_pid)
        os.write(writer, _BEGUN)
        answer = _Answer(value=msgspec.Raw(msgspec.json.encode(command())))
    except UblkError as error:
        answer = _Answer(error=str(error), errno=error.errno)
    except OSError as error:
        answer = _Answer(error=str(error), errno=error.errno or 0)
    os.write(writer, msgspec.json.encode(answer))
    return 0


def _drain(reader: int, finished: bool) -> bytes:
    try:
        return os.read(reader, 65536) if finished else b""
    finally:
        os.close(reader)


def _decode(what: str, raw: bytes, result: type[T]) -> T:
    if raw in (b"", _BEGUN):
        raise ControlFailed(f"{what}: its process died without an answer", 0)
    answer = msgspec.json.decode(raw, type=_Answer)
    if answer.error:
        raise ControlFailed(answer.error, answer.errno)
    return msgspec.json.decode(answer.value, type=result)


def _limit(error: OSError) -> str:
    """Which limit it was, and whose."""
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
