"""The template of backends: a process that has imported what a backend needs, and forks one when it is asked.

A backend that the daemon starts costs no start of Python then.  Each child is a child of the daemon, not of the
template (`ublk/sibling.py`): it is watched and reaped as one that the daemon forked, and the template's end is no
matter to it.  The template never learns what its children become: the daemon tells the child over a socket of the
child's own.  So nothing of one device reaches another, and a child whose daemon dies before that ends.

The template belongs to one daemon, runs its code, and ends with it.  It has one thread.

Owns the process, its socket and the children that were not told yet.  If it does not run or does not answer, backends
are started by exec as before it existed; the log says so once.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path

import msgspec

from ublkpool.bufpool.packets import receive_packet, send_packet
from ublkpool.daemon.backends.becoming import (
    FORK,
    PACKET_BYTES_MAX,
    READY,
    Task,
    be_a_program,
    take_default_signals,
)
from ublkpool.daemon.errors import one_line
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.children import Child, describe_exit
from ublkpool.daemon.processes.mounts import enter_live_view
from ublkpool.daemon.processes.reserve import restore_descriptor_limit, with_room_for_one
from ublkpool.daemon.processes.supervised import SupervisedProcess
from ublkpool.workers.process import fork_child

ANSWER_S = 30.0
"""A template that answers nothing for so long is replaced; its first answer waits for the start of Python."""
RESTART_MIN_S = 0.1
RESTART_MAX_S = 60.0
WORDS_BYTES_MAX = 65536
ROOM = "." * 1024
"""An argument that nothing reads: room for the command line that `ps` shows of a child."""
_TITLE = "the template of backends"
_FALLBACK = "until it runs again, a backend's start takes the start of a Python interpreter"
_log = logging.getLogger("ublkpool.backend")


class Forked:
    """A child of the template that waits for its task; without one it ends."""

    def __init__(self, child: Child, sock: socket.socket) -> None:
        """Takes `sock` over."""
        self.child = child
        self._sock = sock

    def begin(self, task: Task, stderr: int) -> None:
        """Have it become this backend, which logs to a duplicate of `stderr`.  Raises `OSError`: it does not."""
        with self._sock:
            send_packet(self._sock, msgspec.json.encode(task), stderr)

    def close(self) -> None:
        """Let it end."""
        self._sock.close()


class _Asked:
    """A child that the template was asked for."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        # For the child's pidfd: a child that cannot be watched must not run.
        self._place = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.answer: asyncio.Future[Forked | None] = asyncio.get_running_loop().create_future()

    def is_there(self, pid: int) -> Child | None:
        """The template has forked it."""
        os.close(self._place)
        try:
            child = Child(pid)
        except OSError as error:
            _log.error("process %d, a backend's, cannot be watched and ends: %s", pid, one_line(error))
            self.sock.close()
            child = None
        self._settle(Forked(child, self.sock) if child is not None else None)
        return child

    def is_not_there(self) -> None:
        """There is none, or it must end."""
        os.close(self._place)
        self._settle(None)

    def give_up(self) -> None:
        """No backend waits for it any more: it ends."""
        if not self.answer.cancel() and (forked := self.answer.result()) is not None:
            forked.close()

    def _settle(self, forked: Forked | None) -> None:
        if forked is not None and not self.answer.done():
            self.answer.set_result(forked)
            return
        self.sock.close()
        if not self.answer.done():
            self.answer.set_result(None)


class BackendTemplate(SupervisedProcess):
    """The daemon's template; it is started when a backend is first asked for."""

    def __init__(self, live_mounts: int | None = None) -> None:
        """Nothing runs yet.  `live_mounts`: the mount namespace that backends run in (`daemon/processes/mounts.py`)."""
        super().__init__(_TITLE, _log, RESTART_MIN_S, RESTART_MAX_S)
        self._live_mounts = live_mounts
        self._background = Background(_TITLE)
        self._loop = asyncio.get_running_loop()
        self._sock: socket.socket | None = None
        """None while no process runs."""
        self._asked: deque[_Asked] = deque()
        self._untold: set[Child] = set()
        """Children that may still be in the template's process group."""
        self._is_ready = self._is_doubtful = False
        """Whether this one has imported everything; whether the one before had not: then no backend waits for this."""
        self._stderr: int | None = None
        """Where its last words are read, at its end."""

    @property
    def pid(self) -> int | None:
        """None while none runs."""
        return self.child.pid if self._sock is not None else None

    def begin(self) -> None:
        """Start it, unless it was started before, and again whenever it ends, until `stop`."""
        if self.is_started or self._is_ending:
            return
        try:
            self.start()
        except OSError as error:
            if not self._is_doubtful:
                _log.warning("%s cannot be started: %s; %s", _TITLE, one_line(error), _FALLBACK)
            self._is_doubtful = True
        else:
            self._background.spawn(self.keep_running())

    async def fork(self) -> Forked | None:
        """A child that waits for its task; None if there is none to be had, and exec is the way."""
        self.begin()
        if self._sock is None or self._is_doubtful:
            return None
        try:
            asked = self._ask(self._sock)
        except OSError as error:
            _log.debug("%s was not asked: %s", _TITLE, error)
            return None
        try:
            return await asyncio.wait_for(asyncio.shield(asked.answer), ANSWER_S)
        except TimeoutError:
            asked.give_up()
            self._replace_silent(asked)
            return None
        except asyncio.CancelledError:
            asked.give_up()
            raise

    def _ask(self, sock: socket.socket) -> _Asked:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            try:
                asked = _Asked(ours)
            except OSError:
                ours.close()
                raise
            try:
                send_packet(sock, FORK, theirs.fileno())
            except OSError:
                asked.is_not_there()
                raise
        self._asked.append(asked)
        return asked

    def _replace_silent(self, asked: _Asked) -> None:
        if asked in self._asked:
            _log.warning("%s has not answered for %.0f s and is replaced; %s", _TITLE, ANSWER_S, _FALLBACK)
            self.child.send(signal.SIGKILL)

    async def stop(self) -> None:
        """End it, for good; a child that was not told yet ends as well."""
        self.let_end()
        self._background.cancel()
        if self.is_started:
            await self.child.kill()
            self._close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reader, writer = os.pipe()
        keep = [theirs.fileno(), writer]
        if self._live_mounts is not None:
            keep.append(self._live_mounts)
        fork = with_room_for_one(
            lambda: fork_child(lambda: self._become(theirs, writer), keep, "ublkpool-start")
        )
        try:
            self.child = Child(fork())
        except BaseException:
            ours.close()
            os.close(reader)
            raise
        finally:
            theirs.close()
            os.close(writer)
        ours.setblocking(False)
        self._sock, self._stderr, self._is_ready = ours, reader, False
        self._loop.add_reader(ours, self._hear)

    def _become(self, sock: socket.socket, stderr: int) -> int:
        """Runs in the forked child: become the template by exec; 1 if that fails."""
        try:
            take_default_signals()
            be_a_program(stderr)
            if self._live_mounts is not None:
                enter_live_view(self._live_mounts, "/")
            restore_descriptor_limit()
            sock.set_inheritable(True)
            command = [sys.executable, "-m", "ublkpool.daemon.backend_template", str(sock.fileno()), ROOM]
            os.execve(command[0], command, os.environ)
        except (OSError, ValueError) as error:
            os.write(2, f"ublkpool: cannot start: {error}\n".encode())
        return 1

    def _hear(self) -> None:
        """Take every answer that has come."""
        while self._sock is not None:
            try:
                packet, _ = receive_packet(self._sock, PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            except ConnectionError:
                packet = b""
            if not packet:
                self._loop.remove_reader(self._sock)
                # It has closed its socket, so it can only end.
                self.child.send(signal.SIGKILL)
                return
            self._take(packet)

    def _take(self, packet: bytes) -> None:
        if packet == READY:
            self._is_ready, self._is_doubtful = True, False
            self._pauses.serves()
            return
        asked, number = self._asked.popleft(), int(packet)
        if number < 0:
            _log.debug("%s cannot fork: %s", _TITLE, os.strerror(-number))
            asked.is_not_there()
            return
        self._untold = {each for each in self._untold if each.exit_status is None}
        if (child := asked.is_there(number)) is not None:
            self._untold.add(child)

    async def _clear_away(self, pause_s: float) -> None:
        self._hear()
        was_doubtful, self._is_doubtful = self._is_doubtful, not self._is_ready
        words = self._last_words()
        why = f": {words}" if words else ""
        self._close()
        level = logging.DEBUG if was_doubtful else logging.WARNING
        how = describe_exit(self.child.exit_status or 0)
        _log.log(level, "%s ended: %s%s; %s", _TITLE, how, why, _FALLBACK)

    def _last_words(self) -> str:
        """The last line that it wrote."""
        lines = b""
        if self._stderr is not None:
            os.set_blocking(self._stderr, False)
            with suppress(BlockingIOError):
                lines = os.read(self._stderr, WORDS_BYTES_MAX)
        return lines.decode(errors="replace").strip().rpartition("\n")[2]

    def _close(self) -> None:
        if self._stderr is not None:
            os.close(self._stderr)
            self._stderr = None
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._sock.close()
            self._sock = None
        while self._asked:
            self._asked.popleft().is_not_there()
        self._watch_strays()

    def _watch_strays(self) -> None:
        """Have the children reaped that it forked and did not tell of: they end, since their sockets are closed."""
        known = {each.pid for each in self._untold if each.exit_status is None}
        for pid in _children():
            with suppress(OSError):
                if pid not in known and os.getpgid(pid) == self.child.pid:
                    Child(pid)


def _children() -> list[int]:
    """The numbers of this process's children; none if the kernel does not tell (CONFIG_PROC_CHILDREN)."""
    with suppress(FileNotFoundError):
        return [int(each) for each in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return []
