"""The process that forks workers for its daemon: a copy of the daemon from before its first device.

A worker that the daemon forks shares the daemon's memory only until the daemon goes on: Python counts references in
the objects themselves, so the daemon soon writes to nearly every page, and the worker keeps copies of its own.  This
process runs no Python between two forks (`ublk/csrc/fork_asked.h`), so it shares its pages with all workers that it has
forked.

A request is for all workers of a device, because the driver lets only one process map a device's descriptors.  Its
child maps them, forks the other workers, which are children of the daemon like itself (`ublk/sibling.py`), and becomes
the first queue's.  Each worker's number is told by the process that has forked it, so that also one which dies at once
is known; when all are told, no process has the answer's pipe any more.

Runs: `serve` in the process, `_answer` in its children.
"""

import errno
import os
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.way_out import explain
from ublkpool.ublk import process_calls
from ublkpool.ublk.calls import ffi, lib
from ublkpool.ublk.mappings import map_descriptors, unmap_descriptors
from ublkpool.ublk.sibling import fork_beside, fork_when_asked
from ublkpool.workers.messages import Fault, end_of, send
from ublkpool.workers.pool_files import SentPool
from ublkpool.workers.process import EXIT_FAULT, become_child, fork_child, run_worker, share_heap
from ublkpool.workers.queue_loop import WorkerSpec
from ublkpool.workers.record_gate import RecordGate
from ublkpool.workers.rehearsal import rehearse

TITLE = "ublkpool-fork"
PACKET_BYTES_MAX: int = lib.UQ_ASKED_BYTES
DESCRIPTORS_MAX: int = lib.UQ_ASKED_FDS
REHEARSALS = 2
"""Some of what stays of a call is made at the second one."""
FORKED = struct.Struct("=ii")
"""struct uq_forked."""


class Request(NamedTuple):
    """The workers of a device; descriptors as the daemon numbers them, of which `numbers` says which was sent where."""

    specs: tuple[WorkerSpec, ...]
    """One for each queue, in their order."""
    geometry: Geometry
    char: int
    data: int
    control: int
    gate: int
    """The reader of the gate that opens when the workers are on record."""
    sockets: tuple[int, ...]
    """The workers' ends, one for each queue."""

    def descriptors(self) -> list[int]:
        """All of them, each once."""
        named = [each for spec in self.specs for each in spec.descriptors()]
        return list(dict.fromkeys([self.char, self.data, self.control, self.gate, *self.sockets, *named]))

    def packet(self) -> bytes:
        """To be sent with `descriptors`.  Raises what `pickle` raises for what only the daemon's process has."""
        return pickle.dumps((self, self.descriptors()))


class _Child(NamedTuple):
    """A request in the process that answers it, with that process's numbers."""

    specs: Sequence[WorkerSpec]
    pool: SentPool
    char: int
    gate: int
    sockets: Sequence[int]
    answer: int


def serve(sock: int, daemon: int) -> int:
    """Fork workers until the daemon closes its end of `sock` or ends; in a child the worker's exit status."""
    process_calls.die_with_parent(daemon)
    with suppress(OSError):
        for _ in range(REHEARSALS):
            rehearse()
    share_heap()
    asked = ffi.new("struct uq_asked *")
    if not fork_when_asked(sock, asked):
        return 0
    os.close(sock)
    answer, *others = asked.fds[0 : asked.fd_count]
    packet = bytes(ffi.buffer(asked.packet, asked.bytes))
    # The daemon is the only one that has the other end.
    request, numbers = pickle.loads(packet)
    return _answer(_received(request, dict(zip(numbers, others, strict=True)), answer))


def _received(request: Request, numbers: Mapping[int, int], answer: int) -> _Child:
    return _Child(
        [each.renumbered(numbers) for each in request.specs],
        SentPool(numbers[request.data], numbers[request.control], request.geometry, len(request.specs)),
        numbers[request.char],
        numbers[request.gate],
        [numbers[each] for each in request.sockets],
        answer,
    )


def _answer(child: _Child) -> int:
    """Fork the workers of all queues but the first, and become that one; its exit status."""
    mapped: list[object] = []
    try:
        for spec in child.specs:
            mapped.append(map_descriptors(child.char, spec.queue.queue, spec.queue.depth))
        for queue in range(1, len(child.specs)):
            pid = fork_child(*_life(child, queue, mapped), fork_beside)
            os.write(child.answer, FORKED.pack(queue, pid))
    except OSError as error:
        # The daemon may have heard of all processes, and waits for what this one says.
        send(end_of(child.sockets[0]), Fault(f"queue 0 cannot start: {explain(error)}"))
        os.write(child.answer, FORKED.pack(-1, -(error.errno or errno.EIO)))
        return EXIT_FAULT
    return become_child(*_life(child, 0, mapped))


def _life(child: _Child, queue: int, mapped: list[Any]) -> tuple[Callable[[], int], list[int], str]:
    """What this queue's worker does, with which descriptors, and its name."""
    spec, sock = child.specs[queue], child.sockets[queue]

    def live() -> int:
        os.close(child.answer)
        for number, each in enumerate(mapped):
            if number != queue:
                unmap_descriptors(each, spec.queue.depth)
        return run_worker(spec, child.char, mapped, child.pool, end_of(sock), RecordGate.at(child.gate))

    pool = child.pool
    keep = [child.answer, child.char, child.gate, pool.data_fd, pool.control_fd, sock, *spec.descriptors()]
    return live, keep, spec.title
