"""`python -m ublkpool.daemon.backend_template FD`: the program of `backends/template_process.py`.

Imports what a built-in backend needs, then forks at each request that comes over the socket FD, and ends with the
socket.  A child becomes `ublkpool backend` in all that can be told from outside: its descriptors, process group,
directory, user and rights, environment and command line are those of a program that the daemon has started.
"""

import ctypes
import errno
import gc
import os
import socket
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import msgspec

from ublkpool.bufpool.packets import receive_packet
from ublkpool.daemon.backends.becoming import (
    PACKET_BYTES_MAX,
    READY,
    TEMPLATE,
    Task,
    be_a_program,
    cannot,
    program,
    take_place,
)
from ublkpool.daemon.cli.commands import main as command
from ublkpool.daemon.processes.command_line import show_as
from ublkpool.ublk import process_calls
from ublkpool.ublk.sibling import fork_beside

TASK_BYTES_MAX = 1 << 20
_IMPORTED = (
    "ublkpool.daemon.cli.attach",
    "ublkpool.daemon.logs",
    "ublkpool.daemon.printed",
    "ublkpool.bufpool.sdk.loader",
    "ublkpool.bufpool.sdk.ring_links",
    "ublkpool.bufpool.sdk.zeromq_links",
    "ublkpool.bufpool.sdk.layers.stack",
    "ublkpool.backends.null",
    "ublkpool.backends.memory",
    "ublkpool.backends.file",
    "ublkpool.backends.cow",
)
"""What these import must start no thread and open nothing that a child must not share (a ZeroMQ context, a ring)."""
_PR_SET_DUMPABLE = 4


def main() -> int:
    """Serve the socket until it ends; in a child the backend's exit status."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    show_as(["ublkpool", "backend-template"])
    process_calls.set_process_name(TEMPLATE)
    for each in _IMPORTED:
        import_module(each)
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("a module has started a thread, so this process must not fork")
    gc.collect()
    gc.freeze()
    sock.send(READY)
    own = _serve(sock)
    return 0 if own is None else _child(own)


def _serve(sock: socket.socket) -> socket.socket | None:
    """Fork whenever it is asked for.  Returns the child's own socket in a child, and None at the daemon's end."""
    while True:
        packet, fd = receive_packet(sock, PACKET_BYTES_MAX)
        if not packet:
            return None
        if fd is None:
            sock.send(b"%d" % -errno.ENFILE)
            continue
        try:
            pid = fork_beside()
        except OSError as error:
            pid = -(error.errno or 0)
        if not pid:
            sock.close()
            return socket.socket(fileno=fd)
        os.close(fd)
        sock.send(b"%d" % pid)


def _child(own: socket.socket) -> int:
    """Become the backend that the daemon names; its exit status.  Without a word of it, end."""
    packet, stderr = receive_packet(own, TASK_BYTES_MAX)
    own.close()
    if not packet or stderr is None:
        os._exit(0)
    task = msgspec.json.decode(packet, type=Task)
    try:
        be_a_program(stderr)
        process_calls.close_all_but([0, 1, 2])
        _be_called(task)
        _take_environment(take_place(task, None))
        if task.config.user is not None:
            # As after an exec by the new user: other processes of this user may look into it.
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    except (LookupError, OSError, ValueError) as error:
        return cannot(error)
    return command()


def _be_called(task: Task) -> None:
    show_as([*program(None), *task.arguments])
    process_calls.set_process_name(Path(sys.executable).name)
    sys.argv[:] = [str(Path(__file__).with_name("__main__.py")), *task.arguments]


def _take_environment(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    # `python -m` searches the directory that it is started in.
    sys.path[0] = str(Path.cwd())


if __name__ == "__main__":
    sys.exit(main())
