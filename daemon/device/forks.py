"""How a device's workers of one epoch are forked: by the daemon's template of workers, or by the daemon itself.

Owns the window in which the supervisor holds /dev/ublkcN: it opens and closes that without an await in between, so that
no child forked elsewhere inherits the device.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ublkpool.bufpool.pool.arena import Arena
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.processes.reserve import with_room_for_one
from ublkpool.daemon.processes.worker_template import Forked, Forking, WorkerTemplate
from ublkpool.ublk.mappings import map_descriptors, unmap_descriptors
from ublkpool.workers import messages
from ublkpool.workers.process import fork_child, run_worker
from ublkpool.workers.queue_loop import WorkerSpec
from ublkpool.workers.record_gate import RecordGate
from ublkpool.workers.template import Request

_log = logging.getLogger("ublkpool.device")
Begun = Callable[[WorkerSpec, int, socket.socket], None]
"""Takes over a worker: its process, and the supervisor's end of its socket."""


class Forks(NamedTuple):
    """The workers to be forked, which pass `gate` once they are on record."""

    kernel: BlockDevice
    arena: Arena
    specs: Sequence[WorkerSpec]
    gate: RecordGate
    begun: Begun

    async def by_template(self, template: WorkerTemplate) -> bool:
        """Whether the template has forked all of them; if it has forked only some, `begun` has these.

        Raises `DaemonError`, `OSError`.
        """
        # The opener of a user's device is started with each open, and cannot be started twice.
        if template.pid is None or self.kernel.is_a_users:
            return False
        char_fd = await self.kernel.open_char()
        sockets: list[tuple[socket.socket, socket.socket]] = []
        try:
            sockets.extend(messages.pair() for _ in self.specs)
            forking = template.ask(self._request(char_fd, [theirs.fileno() for _, theirs in sockets]))
        except OSError:
            _close(ours for ours, _ in sockets)
            raise
        finally:
            os.close(char_fd)
            _close(theirs for _, theirs in sockets)
        ends = [ours for ours, _ in sockets]
        if forking is None:
            _close(ends)
            return False
        return self._take(forking, await self._forked(template, forking, ends), ends)

    def _request(self, char_fd: int, sockets: Sequence[int]) -> Request:
        arena = self.arena
        files = (char_fd, arena.data_fd, arena.control_fd, self.gate.reader)
        return Request(tuple(self.specs), arena.geometry, *files, tuple(sockets))

    async def _forked(
        self, template: WorkerTemplate, forking: Forking, ends: Sequence[socket.socket]
    ) -> Forked:
        try:
            return await template.answer(forking)
        except asyncio.CancelledError:
            forking.abandon()
            _close(ends)
            raise

    def _take(self, forking: Forking, forked: Forked, ends: Sequence[socket.socket]) -> bool:
        for spec, ours in zip(self.specs, ends, strict=True):
            pid = forked.pids.get(spec.queue.queue)
            if pid is None:
                ours.close()
                continue
            forking.make_room()
            self.begun(spec, pid, ours)
        forking.close()
        if forked.errno:
            _log.warning(
                "%s: the template of workers cannot fork: %s", self.specs[0].name, os.strerror(forked.errno)
            )
        return not forked.errno

    async def here(self) -> None:
        """Fork them all from this process.  Raises `DaemonError`, `OSError`; `begun` has what was forked."""
        char_fd = await self.kernel.open_char()
        # No await from here to the close: a child forked elsewhere meanwhile would hold the device until it ends.
        depth = self.kernel.info.depth
        descriptors: list[object] = []
        try:
            for queue in range(len(self.specs)):
                descriptors.append(map_descriptors(char_fd, queue, depth))
            for spec in self.specs:
                self._fork_here(spec, char_fd, descriptors)
        finally:
            # From here on only the workers hold the device, so that their end releases it.
            for mapped in descriptors:
                unmap_descriptors(mapped, depth)
            os.close(char_fd)

    def _fork_here(self, spec: WorkerSpec, char_fd: int, descriptors: list[object]) -> None:
        arena, kernel, gate = self.arena, self.kernel, self.gate
        inherited = [char_fd, arena.data_fd, arena.control_fd, gate.reader, *spec.descriptors()]
        if kernel.opener is not None:
            inherited.append(kernel.opener.life)
        ours, theirs = messages.pair()
        fork = with_room_for_one(
            lambda: fork_child(
                lambda: run_worker(spec, char_fd, descriptors, arena, theirs, gate),
                [*inherited, theirs.fileno()],
                spec.title,
            )
        )
        try:
            pid = fork()
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self.begun(spec, pid, ours)


def _close(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()
