"""One attached backend, as the supervisor sees it: its connection, its process, its segment, and its end.

Owns noticing that a backend is gone, and seeing to it.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Self

from ublkpool.bufpool import wire
from ublkpool.daemon.open_files import FileId, file_id, holders_of
from ublkpool.daemon.peer import Peer, peer_of, peer_pidfd

CLOSE_PATIENCE_S = 2.0
"""How long after its death a process's connection may seem open."""
WORDS_MAX = 16
"""Packets after the first one, where none is due."""
_log = logging.getLogger("ublkpool.attach")


class Session:
    """One attached backend: its connection, its process, its segment."""

    def __init__(self, sock: socket.socket, peer: Peer, attach: wire.Attach, segment_fd: int | None) -> None:
        """Takes over `sock` and `segment_fd`."""
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
        self._pidfd = peer_pidfd(sock, self.pid)
        self._hung_up = self._detaching = False
        self._handed: set[FileId] = set()
        self._others: Callable[[], Collection[int]] = tuple
        self._words = 0
        self._dead: asyncio.Future[None] = self._loop.create_future()
        self._cutting: asyncio.Task[None] | None = None
        self._loop.add_reader(sock, self._hear)

    @classmethod
    def adopt(
        cls, sock: socket.socket, attach: wire.Attach, segment_fd: int | None, token: bytes, segment: int
    ) -> Self:
        """Go on with the connection of a backend that an earlier daemon brought to its device.  Raises `OSError`."""
        sock.setblocking(False)
        session = cls(sock, peer_of(sock), attach, segment_fd)
        session.token, session.segment = token, segment
        return session

    @property
    def is_gone(self) -> bool:
        return self._gone.done()

    def fileno(self) -> int:
        """The connection."""
        return self._sock.fileno()

    def entrust(self, fd: int, others: Callable[[], Collection[int]]) -> None:
        """This file was handed to it; whoever else has it, but for `others` and us, has it from there."""
        self._handed.add(file_id(os.fstat(fd)))
        self._others = others

    async def gone(self) -> None:
        """Wait until it has closed its connection: then it touches no buffer any more."""
        await asyncio.shield(self._gone)

    def say(self, message: wire.DaemonMessage, fds: list[int] | None = None) -> None:
        """Send it a packet; a backend that does not listen will be noticed as gone."""
        with suppress(OSError):
            if fds:
                socket.send_fds(self._sock, [wire.encode_message(message)], fds)
            else:
                self._sock.send(wire.encode_message(message))

    async def detach(self, reason: str, patience_s: float, keep: bool) -> None:
        """Ask it to go, with or without what it keeps for a successor; kill it if it has not gone in time."""
        self._detaching = True
        self.say(wire.Detach(reason=reason, keep=keep))
        with suppress(TimeoutError):
            await asyncio.wait_for(self.gone(), patience_s)
            return
        await self.cut_off()

    async def hung_up(self, patience_s: float) -> None:
        """A queue's connection of its has ended: if it is not about to go, it is cut off."""
        if self._hung_up or self._detaching:
            return
        self._hung_up = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self.gone(), patience_s)
            return
        _log.error(
            "%s: backend cut off: process %d has hung up on a queue and stays", self.attach.device, self.pid
        )
        await self.cut_off()

    async def cut_off(self) -> None:
        """Make sure that it touches no buffer any more: shared memory cannot be taken back, so its process ends."""
        if self._cutting is None:
            self._cutting = self._loop.create_task(self._cut_off())
        await asyncio.shield(self._cutting)

    async def _cut_off(self) -> None:
        if self.is_gone:
            return
        self._kill()
        # However long that takes: what it does in the kernel may still read its buffers.
        await asyncio.wait((self._gone, self._dead), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((self._gone,), timeout=CLOSE_PATIENCE_S)
        while not self.is_gone:
            self._end_holders()
            await asyncio.wait((self._gone,), timeout=CLOSE_PATIENCE_S)

    def _kill(self) -> None:
        if self._pidfd is None:
            self._dead.set_result(None)
            return
        self._loop.add_reader(self._pidfd, self._on_death)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _on_death(self) -> None:
        assert self._pidfd is not None
        self._loop.remove_reader(self._pidfd)
        if not self._dead.done():
            self._dead.set_result(None)

    def _end_holders(self) -> None:
        """Its process is dead and its connection is not: another one has that, and perhaps the pool as well."""
        holders = holders_of(self._handed, self._others())
        _log.error(
            "%s: the connection of process %d outlives it; ending who has its memory: %s",
            self.attach.device,
            self.pid,
            ", ".join(map(str, holders)) or "nobody",
        )
        for pid in holders:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not holders:
            self._end()

    def close(self) -> None:
        """Forget it."""
        self._loop.remove_reader(self._sock)
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
            self._end()
            return
        # After its first packet a backend has nothing to say here but that it is gone.
        self._words += 1
        if self._words > WORDS_MAX and self._cutting is None:
            _log.error("%s: backend cut off: it talks on its attach connection", self.attach.device)
            self._cutting = self._loop.create_task(self._cut_off())

    def _end(self) -> None:
        self._loop.remove_reader(self._sock)
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
        if not self._gone.done():
            self._gone.set_result(None)
