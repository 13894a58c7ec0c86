"""Forking: what a child does first, and how a worker's process begins and ends.

`fork_child` is the one place where the daemon forks: workers, the pool broker, the holder, control commands, and the
children that become backends by exec.  The parent has one thread.

Before the fork: sockets, memory and mappings that the child inherits.  After it, in this order: signals back to their
defaults; every descriptor but the named ones closed, since a stray /dev/ublkcN would block recovery for as long as the
child lives; then the child's own work.  The child ends in `os._exit`: nothing of the parent's stack, buffers or exit
handlers runs twice.
"""

import errno
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ublkpool.bufpool.way_out import explain
from ublkpool.ublk import process_calls
from ublkpool.ublk.privilege import is_privileged
from ublkpool.workers.messages import Fault, send
from ublkpool.workers.pool_files import PoolFiles
from ublkpool.workers.privileges import forbid_new_rights
from ublkpool.workers.queue_loop import QueueLoop, WorkerSpec
from ublkpool.workers.record_gate import RecordGate

EXIT_FAULT = 1
EXIT_CRASH = 70
_log = logging.getLogger("ublkpool.worker")


def fork_child(
    main: Callable[[], int], keep_fds: Sequence[int], title: str, fork: Callable[[], int] = os.fork
) -> int:
    """Fork; the child runs `main` with these descriptors and 0 to 2, and exits with its result.  Returns the pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = fork()
    if not pid:
        become_child(main, keep_fds, title)
    return pid


def become_child(main: Callable[[], int], keep_fds: Sequence[int], title: str) -> NoReturn:
    """What a process does that was just forked, see `fork_child`."""
    status = EXIT_CRASH
    try:
        _begin(keep_fds, title)
        status = main()
    except BaseException:
        _log.critical("process %s ended by an error of its own", title, exc_info=True)
    finally:
        sys.stderr.flush()
        os._exit(status)


def share_heap() -> None:
    """Exclude all objects so far from garbage collection; for the parent, before its first fork.

    A collection writes to each object that it visits, and a page that either process writes to is no longer shared.
    """
    gc.collect()
    gc.freeze()


def _begin(keep_fds: Sequence[int], title: str) -> None:
    gc.freeze()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    # A terminal's Ctrl-C reaches the whole group; the supervisor decides when its children go.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process_calls.close_all_but([0, 1, 2, *keep_fds])
    process_calls.set_process_name(title)


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    return f"{error.filename}: {explain(error)}" if error.filename else explain(error)


def _prepare_to_give_up_rights() -> None:
    """What an ordinary user could not do, and what must come before the first thread.  Raises `OSError`."""
    forbid_new_rights()
    # All of its memory is locked, also what it maps later; and one user runs the workers of all devices.
    for limit in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _harden() -> None:
    """Never wait for memory.  An ordinary user's worker goes on with less.  Raises `OSError`."""
    for call in (process_calls.set_io_flusher, process_calls.lock_memory):
        try:
            call()
        except OSError as error:
            if is_privileged() or error.errno not in (errno.EPERM, errno.ENOMEM):
                raise
            _log.debug("an ordinary user's worker goes on without %s", error)


def run_worker(
    spec: WorkerSpec,
    char_fd: int,
    descriptors: Sequence[object],
    pool: PoolFiles,
    supervisor: socket.socket,
    gate: RecordGate,
) -> int:
    """A worker's whole life after the fork; its exit status.  It fetches nothing before it is on record."""
    try:
        if spec.account is not None:
            _prepare_to_give_up_rights()
        _harden()
        loop = QueueLoop(spec, char_fd, descriptors[spec.queue.queue], pool, supervisor)
    except Exception as error:
        send(supervisor, Fault(f"queue {spec.queue.queue} cannot start: {_reason(error)}"))
        _log.debug("worker", exc_info=True)
        return EXIT_FAULT
    return loop.run() if gate.passes() else EXIT_FAULT
