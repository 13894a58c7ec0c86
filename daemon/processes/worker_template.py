"""The daemon's template of workers (`workers/template.py`): its process, and the answers that it owes.

It is forked before the daemon has any device, once: a later copy would keep the memory of devices that go.  Its workers
are children of the daemon, and go on when it ends.  From its end on the daemon forks workers itself, each of
which then takes some MB of memory more, until the next daemon; the log says so.

Owns the process, its socket and the processes that it was asked for until those are the caller's.  Runs on the
supervisor's asyncio loop.
"""

import asyncio
import errno
import logging
import os
import pickle
import signal
import socket
from functools import partial
from typing import NamedTuple

from ublkpool.daemon.errors import one_line
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.children import Child, describe_exit
from ublkpool.daemon.processes.reserve import with_room_for_one
from ublkpool.workers.process import fork_child
from ublkpool.workers.template import DESCRIPTORS_MAX, FORKED, PACKET_BYTES_MAX, TITLE, Request, serve

ANSWER_S = 30.0
"""A template that has not forked for so long is killed."""
_FALLBACK = "until the daemon is restarted, a new worker takes more memory"
_log = logging.getLogger("ublkpool.worker")


class Forked(NamedTuple):
    """The workers that the template has forked; fewer than asked for only with a reason."""

    pids: dict[int, int]
    """By queue."""
    errno: int
    """Why some are missing; 0 if none is."""


class Forking:
    """One answer.  Holds a descriptor for the pidfd of each process, which cannot be watched without."""

    def __init__(self, queues: int) -> None:
        """Raises `OSError`."""
        self._loop = asyncio.get_running_loop()
        self._whole: asyncio.Future[Forked] = self._loop.create_future()
        self._queues = queues
        self._places: list[int] = []
        self._said = b""
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            for _ in range(queues):
                self._places.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self.close()
            os.close(self._reader)
            os.close(self.writer)
            raise
        self._loop.add_reader(self._reader, self._hear)

    def asked(self) -> None:
        """The request is sent, or will not be: only the processes have the writer now."""
        os.close(self.writer)

    async def forked(self) -> Forked:
        """Wait until every process has told its number, or none can any more."""
        return await asyncio.shield(self._whole)

    def make_room(self) -> None:
        """For the pidfd of one process, which is opened at once."""
        os.close(self._places.pop())

    def close(self) -> None:
        """No more processes are to be watched."""
        while self._places:
            os.close(self._places.pop())

    def abandon(self) -> None:
        """The request is given up: kill its processes as soon as they are known."""
        self._whole.add_done_callback(self._kill)

    def _kill(self, whole: "asyncio.Future[Forked]") -> None:
        for pid in whole.result().pids.values():
            self.make_room()
            Child(pid).send(signal.SIGKILL)
        self.close()

    def _hear(self) -> None:
        while True:
            try:
                said = os.read(self._reader, 4096)
            except BlockingIOError:
                return
            self._said += said
            if not said or len(self._result().pids) == self._queues:
                break
        self._loop.remove_reader(self._reader)
        os.close(self._reader)
        self._whole.set_result(self._result())

    def _result(self) -> Forked:
        records = list(FORKED.iter_unpack(self._said))
        pids = {queue: pid for queue, pid in records if queue >= 0}
        reasons = [-number for queue, number in records if queue < 0]
        missing = 0 if len(pids) == self._queues else errno.ECHILD
        return Forked(pids, reasons[0] if reasons else missing)


class WorkerTemplate:
    """One daemon's template."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._background = Background("the template of workers")
        self._sock: socket.socket | None = None
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        """None while none runs."""
        return self._child.pid if self._child is not None and self._sock is not None else None

    def start(self) -> None:
        """Fork it, once, before the daemon has any device.  A failure is logged."""
        try:
            self._start()
        except OSError as error:
            _log.warning("the template of workers cannot be forked: %s; %s", one_line(error), _FALLBACK)
        else:
            self._background.spawn(self._tell_end())

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        main = partial(serve, theirs.fileno(), os.getpid())
        try:
            with theirs:
                self._child = Child(with_room_for_one(lambda: fork_child(main, [theirs.fileno()], TITLE))())
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        self._sock = ours

    async def _tell_end(self) -> None:
        assert self._child is not None
        status = await self._child.wait()
        self._close()
        _log.warning("the template of workers ended: %s; %s", describe_exit(status), _FALLBACK)

    def ask(self, request: Request) -> Forking | None:
        """Have these workers forked, which have the request's descriptors as soon as this returns.

        None: the template cannot.  Raises `OSError` if this process has no descriptor left.
        """
        sock = self._sock
        if sock is None:
            return None
        files = request.descriptors()
        try:
            packet = request.packet()
        except (AttributeError, TypeError, pickle.PicklingError):
            return None
        if len(packet) > PACKET_BYTES_MAX or len(files) >= DESCRIPTORS_MAX:
            return None
        forking = Forking(len(request.specs))
        try:
            socket.send_fds(sock, [packet], [forking.writer, *files])
        except OSError as error:
            _log.debug("the template of workers was not asked: %s", error)
            forking.abandon()
            return None
        finally:
            forking.asked()
        return forking

    async def answer(self, forking: Forking) -> Forked:
        """What has become of a request; a template that is stuck is killed."""
        try:
            return await asyncio.wait_for(forking.forked(), ANSWER_S)
        except TimeoutError:
            _log.warning("the template of workers has not forked for %.0f s and is killed", ANSWER_S)
            if self._child is not None:
                self._child.send(signal.SIGKILL)
            return await forking.forked()

    async def stop(self) -> None:
        """End it, for good; its workers go on."""
        self._background.cancel()
        if self._child is not None:
            await self._child.kill()
        self._close()

    def _close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
