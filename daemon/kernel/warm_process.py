"""Processes that make one call after another for the daemon, so that a call costs no fork.

Forking the daemon takes longer than most calls: the kernel copies its page tables, and both sides then fault on what
they write.  A `Call` names a function of a module and plain arguments, so that a process which was forked earlier can
make it.  Such a process makes one call at a time and is as disposable as one that was forked for a single call: it is
killed when its call hangs or is given up, it ends with the daemon, and it keeps no descriptor between calls.

Owns the processes that have no call just now.  Runs: `WarmProcesses` on the supervisor's asyncio loop, `_serve` in the
process.
"""

import os
import pickle
import socket
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ublkpool.bufpool.packets import receive_descriptors
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.reserve import with_room_for_one
from ublkpool.ublk import process_calls
from ublkpool.workers.process import fork_child

IDLE_MAX = 2
"""Processes that are kept for the next calls: calls of one device come one after another."""
PACKET_BYTES_MAX = 64 << 10
TITLE = "ublkpool-warm"
_FDS_MAX = 4
Execute = Callable[[str, Callable[[], Any], int, Callable[[], None]], None]
"""Makes a call, then calls the last argument, then writes the answer to the descriptor, which it closes."""


class WarmProcess:
    """One such process."""

    def __init__(self, child: Child, sock: socket.socket) -> None:
        """Takes `sock` over."""
        self.child = child
        self._sock = sock
        # Also when the last user forgets it: then it would wait for a call for ever.
        self._closing = weakref.finalize(self, sock.close)

    def begin(self, packet: bytes, fds: Sequence[int]) -> None:
        """Have it make the call of this packet.  Raises `OSError`: it makes none."""
        socket.send_fds(self._sock, [packet], fds)

    def close(self) -> None:
        """Let it end."""
        self._closing()


class WarmProcesses:
    """The processes of one daemon that have no call just now."""

    def __init__(self, execute: Execute) -> None:
        """None runs yet: the first call starts one."""
        self._execute = execute
        self._idle: list[WarmProcess] = []

    def begin(self, what: str, title: str, call: Call, writer: int) -> WarmProcess | None:
        """The process that makes the call and writes its answer to `writer`; None: such a process cannot take it.

        Raises `OSError`: no process could be started.
        """
        packet = _packed(what, title, call)
        if packet is None:
            return None
        while True:
            is_new = not self._idle
            process = self._start() if is_new else self._idle.pop()
            try:
                process.begin(packet, [writer, *call.fds])
                return process
            except OSError:
                # An idle one may have died.
                process.close()
                if is_new:
                    raise

    def give_back(self, process: WarmProcess) -> None:
        """Its call is over, and its answer was whole."""
        if process.child.exit_status is None and len(self._idle) < IDLE_MAX:
            self._idle.append(process)
        else:
            process.close()

    def close(self) -> None:
        """Let those end that have no call; the daemon's end does the same."""
        while self._idle:
            self._idle.pop().close()

    def _start(self) -> WarmProcess:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        serve = partial(_serve, theirs, os.getpid(), self._execute)
        fork = with_room_for_one(lambda: fork_child(serve, [theirs.fileno()], TITLE))
        try:
            with theirs:
                child = Child(fork())
        except BaseException:
            ours.close()
            raise
        # A packet and its descriptors always have room: the process has taken the one before.
        ours.setblocking(False)
        return WarmProcess(child, ours)


def _packed(what: str, title: str, call: Call) -> bytes | None:
    """The call as a packet; None if it is too large for one, or refers to what only this process has."""
    try:
        packet = pickle.dumps((what, title, call.function, call.arguments))
    except (AttributeError, TypeError, pickle.PicklingError):
        return None
    return packet if len(packet) <= PACKET_BYTES_MAX else None


def _serve(sock: socket.socket, parent: int, execute: Execute) -> int:
    """Make the calls that come until the daemon closes its end."""
    # An END_USER_RECOVERY that outlived the supervisor would complete when the next one's workers fetch their tags.
    process_calls.die_with_parent(parent)
    home = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    while True:
        packet, fds, _ = receive_descriptors(sock, PACKET_BYTES_MAX, _FDS_MAX)
        if not packet:
            return 0
        # The daemon is the only one that has the other end.
        what, title, function, arguments = pickle.loads(packet)
        process_calls.set_process_name(title)
        writer, *others = fds
        keep = (0, 1, 2, sock.fileno(), home, writer)
        execute(what, Call(function, *arguments, fds=others), writer, partial(_clean_up, keep, home))
        process_calls.set_process_name(TITLE)


def _clean_up(keep: Sequence[int], home: int) -> None:
    """Before the answer: an open file would keep a lock or a device, and a directory its file system."""
    process_calls.close_all_but(keep)
    os.fchdir(home)
