"""One attached backend, as the supervisor sees it: its connection, its process, its segment, and its end.

Owns noticing that a backend is gone, and seeing to it.  A backend that was handed its device's memory is gone when its
process is dead, which a pidfd tells; the end of its connection is only the reason to expect that.  Runs on the
supervisor's asyncio loop.
"""

import asyncio
import logging
import os
import secrets
import select
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from ublkpool.bufpool import wire
from ublkpool.daemon.backends.peer import Peer, peer_of, peer_pidfd
from ublkpool.daemon.processes.background import owned

LEAVE_PATIENCE_S = 10.0
"""How long a backend that has closed its connection may take to end by itself."""
WORDS_MAX = 16
"""Packets after the first one, where none is due."""
_log = logging.getLogger("ublkpool.attach")


class Session:
    """One attached backend: its connection, its process, its segment."""

    generation = 0
    """Of its attach; the device gives it."""

    def __init__(self, sock: socket.socket, peer: Peer, attach: wire.Attach, segment_fd: int | None) -> None:
        """Takes over `sock` and `segment_fd`, unless it raises `OSError`: there is no pidfd of the process.

        A process that has been reaped already makes a session that is gone.
        """
        try:
            self._pidfd: int | None = peer_pidfd(sock)
        except ProcessLookupError:
            self._pidfd = None
        self.attach = attach
        self.segment_fd = segment_fd
        self.segment = wire.SEGMENT_NONE
        """The number by which it names its own segment; the device gives it."""
        self.pid, self.uid = peer.pid, peer.uid
        # ZeroMQ keeps routing ids that begin with 0 for itself.
        self.token = b"\x01" + secrets.token_bytes(wire.TOKEN_BYTES - 1)
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._left: asyncio.Future[None] = self._loop.create_future()
        self._has_memory = self._hung_up = self._detaching = False
        self._words = 0
        self._leaving: asyncio.Future[None] | None = None
        self._cutting: asyncio.Future[None] | None = None
        if self._pidfd is None:
            self._end()
            return
        self._loop.add_reader(self._pidfd, self._on_death)
        self._loop.add_reader(sock, self._hear)

    @classmethod
    def adopt(
        cls,
        sock: socket.socket,
        attach: wire.Attach,
        segment_fd: int | None,
        token: bytes,
        segment: int,
        generation: int = 0,
    ) -> Self:
        """Go on with the connection of a backend that an earlier daemon brought to its device.  Raises `OSError`."""
        sock.setblocking(False)
        session = cls(sock, peer_of(sock), attach, segment_fd)
        session.token, session.segment, session.generation = token, segment, generation
        session._has_memory = True
        return session

    @property
    def is_gone(self) -> bool:
        """Whether it cannot touch a buffer any more: its process is dead, or it left before it was handed any."""
        return self._gone.done()

    @property
    def is_leaving(self) -> bool:
        """Whether it has closed its connection or is being killed; its successor waits for its death."""
        return self._left.done() or self._cutting is not None

    def fileno(self) -> int:
        """The connection."""
        return self._sock.fileno()

    def entrust(self, message: wire.DaemonMessage, fds: Sequence[int]) -> None:
        """Hand it the memory of its device, with this message.  From now on only its death ends the session."""
        if self.is_gone or self._left.done() or self._is_dead():
            return
        self._has_memory = True
        self.say(message, list(fds))

    def _is_dead(self) -> bool:
        """Whether its process is dead by now, though the loop may not have heard of it."""
        return self._pidfd is None or _shows(self._pidfd, select.POLLIN)

    async def gone(self) -> None:
        """Wait until it is gone: it touches no buffer any more."""
        await asyncio.shield(self._gone)

    def say(self, message: wire.DaemonMessage, fds: list[int] | None = None) -> None:
        """Send it a packet; a backend that does not listen will be noticed as gone."""
        with suppress(OSError):
            if fds:
                socket.send_fds(self._sock, [wire.encode_message(message)], fds)
            else:
                self._sock.send(wire.encode_message(message))

    async def detach(self, reason: str, patience_s: float, keep: bool) -> None:
        """Ask it to go, with or without what it keeps for a successor; kill it if it has not left in time.

        The end of its connection is enough here: the device ends, and its memory serves no other backend.
        """
        self._detaching = True
        self.say(wire.Detach(reason=reason, keep=keep))
        if not await self._leaves(patience_s):
            await self.cut_off()

    async def hung_up(self, patience_s: float) -> None:
        """A queue's connection of its has ended: if it is not about to go, it is cut off."""
        if self._hung_up or self._detaching:
            return
        self._hung_up = True
        if await self._leaves(patience_s):
            return
        _log.error(
            "%s: backend cut off: process %d has hung up on a queue and stays", self.attach.device, self.pid
        )
        await self.cut_off()

    async def _leaves(self, patience_s: float) -> bool:
        """Whether it closes its connection, or dies, in this time."""
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._left), patience_s)
            return True
        return False

    async def cut_off(self) -> None:
        """Make sure that it touches no buffer any more: shared memory cannot be taken back, so its process ends.

        Returns when the process is dead, however long that takes: what it does in the kernel may still read its
        buffers.
        """
        self._cut_off_soon()
        await self.gone()

    def _cut_off_soon(self) -> None:
        if self._cutting is None:
            self._cutting = owned(self.attach.device, self._loop.create_task(self._cut_off()))

    async def _cut_off(self) -> None:
        if self._pidfd is not None and not self.is_gone:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self.gone()

    def close(self) -> None:
        """Forget it.  Harmless twice."""
        if self._sock.fileno() < 0:
            return
        for task in (self._leaving, self._cutting):
            if task is not None:
                task.cancel()
        self._stop_listening()
        self._sock.close()
        for fd in (self.segment_fd, self._pidfd):
            if fd is not None:
                os.close(fd)
        self.segment_fd = self._pidfd = None

    def _hear(self) -> None:
        try:
            packet = self._sock.recv(1)
        except BlockingIOError:
            return
        except ConnectionError:
            packet = b""
        if not packet:
            self._on_close()
            return
        # After its first packet a backend has nothing to say here but that it is gone.
        self._words += 1
        if self._words > WORDS_MAX and not self.is_leaving:
            _log.error("%s: backend cut off: it talks on its attach connection", self.attach.device)
            if self._has_memory:
                self._cut_off_soon()
            else:
                self._on_close()

    def _on_close(self) -> None:
        """Its connection has ended: it may be about to end as well, or it was never handed anything."""
        self._loop.remove_reader(self._sock)
        if not self._has_memory:
            self._end()
            return
        _resolve(self._left)
        if not self.is_gone and self._cutting is None:
            self._leaving = owned(self.attach.device, self._loop.create_task(self._see_it_end()))

    async def _see_it_end(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.gone(), LEAVE_PATIENCE_S)
            return
        _log.error(
            "%s: backend cut off: process %d has closed its connection and lives on",
            self.attach.device,
            self.pid,
        )
        await self.cut_off()

    def _on_death(self) -> None:
        if self._has_memory and not _shows(self._sock.fileno(), select.POLLHUP):
            _log.warning(
                "%s: process %d has ended and another has its connection: a backend must attach after its last fork",
                self.attach.device,
                self.pid,
            )
        self._end()

    def _end(self) -> None:
        self._stop_listening()
        _resolve(self._left)
        _resolve(self._gone)

    def _stop_listening(self) -> None:
        self._loop.remove_reader(self._sock)
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _shows(fd: int, events: int) -> bool:
    """Whether the descriptor has one of these events now."""
    poll = select.poll()
    poll.register(fd, events)
    return any(seen & events for _, seen in poll.poll(0))
