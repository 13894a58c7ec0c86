"""Runs fio on a disk whose server may die: its requests would then wait, and fio with them, for ever.

So a run watches the server's processes, reports a death in one line, and does not wait for a process that no signal
ends; that process ends when the disk is removed, which is the next step.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from selectors import EVENT_READ, DefaultSelector

from bench.accounts import Books, has_ended, queue_cpus, requests_done, take_books
from bench.cells import REGION_BYTES, Cell, FioError, FioNumbers, fio_command, job_cpus, parse_fio
from bench.stage import Disk, StageError, last_words

FAILURES_OF_A_RUN = (StageError, FioError, OSError, subprocess.SubprocessError)
END_PATIENCE_S = 2.0
_PATIENCE_S = 120.0
_POLL_S = 0.02
_LEAD_S = 0.1
_BLOCK_BYTES = 4096
_LOOP_THREADS = "kernel"
_READ_BYTES = 1 << 16


def check_served(disk: Disk) -> None:
    """Raise `StageError` with the server's last words if a process that serves the disk has ended."""
    for part, pid in _servers(disk):
        if has_ended(pid):
            raise _death(disk, part, pid)


def _servers(disk: Disk) -> Iterator[tuple[str, int]]:
    return ((part, pid) for part, pids in disk.parts.items() if part != _LOOP_THREADS for pid in pids)


def _death(disk: Disk, part: str, pid: int) -> StageError:
    return StageError(f"its {part} (process {pid}) has died: {last_words(disk.log)}")


@contextmanager
def _deaths_of_servers(disk: Disk) -> Iterator[DefaultSelector]:
    """A selector that wakes up when a process that serves the disk ends; its data is the part and the pid."""
    with ExitStack() as stack:
        selector = stack.enter_context(DefaultSelector())
        for part, pid in _servers(disk):
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError as error:
                raise _death(disk, part, pid) from error
            stack.callback(os.close, descriptor)
            selector.register(descriptor, EVENT_READ, (part, pid))
        yield selector


def run_fio(disk: Disk, cell: Cell, runtime_s: float) -> tuple[FioNumbers, tuple[Books, Books]]:
    """Run one cell on a disk; the counters cover a time within the run, in which fio neither starts nor ends.

    Raises `FioError`, or `StageError` if a server of the disk dies.
    """
    check_served(disk)
    cpus = job_cpus(queue_cpus(disk.node), cell.jobs)
    idle = requests_done(disk.node)
    fio = _start(fio_command(disk.node, cell, cpus, runtime_s))
    try:
        parts = {**disk.parts, "fio": [fio.pid]}
        while requests_done(disk.node) == idle and fio.poll() is None:
            check_served(disk)
            time.sleep(_POLL_S)
        first = take_books(disk.node, parts, disk.threads)
        time.sleep(max(_LEAD_S, runtime_s - 2 * _LEAD_S))
        second = take_books(disk.node, parts, disk.threads)
        output = _output(fio, disk)
    finally:
        end(fio)
    return parse_fio(output, fio.returncode), (first, second)


def write_end(disk: Disk) -> None:
    """Write the region's last block, at which some servers allocate all blocks before it.

    Raises `StageError`, also if a server of the disk dies.
    """
    last = REGION_BYTES // _BLOCK_BYTES - 1
    dd = _start(["dd", "if=/dev/zero", f"of={disk.node}", f"bs={_BLOCK_BYTES}", f"seek={last}", *_DIRECT])
    try:
        said = _output(dd, disk)
    finally:
        end(dd)
    if dd.returncode:
        raise StageError(f"the last block of {disk.node} cannot be written: {' '.join(said.split())[-200:]}")


_DIRECT = ("count=1", "oflag=direct", "conv=notrunc")


def _start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _output(child: "subprocess.Popen[str]", disk: Disk) -> str:
    """The output of fio.  Raises `StageError` if it does not end, or if a server of the disk ends."""
    assert child.stdout is not None
    deadline_s = time.monotonic() + _PATIENCE_S
    said = b""
    # Polling the servers would cost some percent of the measured time in a guest; the selector waits for their pidfds.
    with _deaths_of_servers(disk) as selector:
        selector.register(child.stdout, EVENT_READ)
        while ready := selector.select(max(0.0, deadline_s - time.monotonic())):
            if died := [key.data for key, _ in ready if key.data]:
                raise _death(disk, *died[0])
            piece = os.read(child.stdout.fileno(), _READ_BYTES)
            said += piece
            if not piece:
                child.wait(_PATIENCE_S)
                return said.decode(errors="replace")
    raise StageError(f"what runs on {disk.node} has not ended after {_PATIENCE_S:.0f} s")


def end(child: "subprocess.Popen[str]") -> None:
    """Kill fio and wait briefly; if its requests wait, it ends only when its disk is removed."""
    child.kill()
    if child.stdout:
        child.stdout.close()
    with suppress(subprocess.TimeoutExpired):
        child.wait(END_PATIENCE_S)
