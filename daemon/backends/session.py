"""One attached backend as the supervisor sees it: its connection, its process, its segment, and its end.

Owns the rule for when a backend is gone, and enforces it.  A backend that was handed its device's memory is gone when
its process is dead, which a pidfd tells; the end of its connection only announces that.  Runs on the supervisor's
asyncio loop.
"""

import asyncio
import logging
import os
import secrets
import select
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import WireError
from ublkpool.daemon.backends.peer import Peer, peer_of
from ublkpool.daemon.backends.refusals import plain
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.beside import beside
from ublkpool.daemon.processes.guarded_socket import GuardedSocket, UndueDescriptors
from ublkpool.workers.credentials import peer_pidfd

LEAVE_PATIENCE_S = 10.0
"""A backend that has closed its connection is killed if it has not ended after this time."""
UNDUE_PACKETS_MAX = 16
"""A backend that sends more packets than this that the daemon does not expect is cut off."""
GROWN_PACKETS_MAX = 16
"""So many sizes a backend may announce at once; further ones, above one a second, are packets not expected."""
_log = logging.getLogger("ublkpool.attach")


class Session:
    """One attached backend: its connection, its process, its segment."""

    generation = 0
    """The generation of its attach; the device sets it."""
    is_detaching = False
    """Whether the daemon has asked it to leave."""
    is_replaced = False
    """Whether the daemon ends its process, so that one of another version follows."""
    has_said_end = False
    """Whether it has said that it ends because it was told to, as by a service manager."""
    was_cut_off = False
    """Whether the daemon has killed it."""
    on_blame: Callable[[str], None] | None = None
    """Takes what `blame` is told; the device sets it."""
    on_grown: Callable[[int], None] = staticmethod(lambda size_bytes: None)
    """Called with the size that its store has grown to, in bytes, unless `resize` awaits it; the device sets it."""
    grown_bytes = 0
    """The largest size that it has announced, also before `on_grown` was set; 0: none."""
    excluded = ""
    """Why no backend may serve the device after this one: another client has taken its store over."""
    _asked_bytes = 0
    _grown_left, _grown_at_s = float(GROWN_PACKETS_MAX), 0.0
    _growing: "asyncio.Future[wire.Resized] | None" = None

    def __init__(self, sock: socket.socket, peer: Peer, attach: wire.Attach, segment_fd: int | None) -> None:
        """Takes over `sock` and `segment_fd`, unless no pidfd of the process can be opened: then `OSError`.

        If the process has been reaped already, the session is gone from the start.
        """
        try:
            self._pidfd: int | None = peer_pidfd(sock)
        except ProcessLookupError:
            self._pidfd = None
        self.attach = attach
        self.segment_fd = segment_fd
        self.segment = wire.SEGMENT_NONE
        """The number by which it names its own segment; the device sets it."""
        self.pid, self.uid = peer.pid, peer.uid
        # Routing ids that begin with 0 are reserved to ZeroMQ.
        self.token = b"\x01" + secrets.token_bytes(wire.TOKEN_BYTES - 1)
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._sock = sock
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._left: asyncio.Future[None] = self._loop.create_future()
        self._has_memory = self._hung_up = False
        self._undue_packets = 0
        self._background = Background(attach.device)
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
        """Go on with the connection of a backend that an earlier daemon attached.  Raises `OSError`."""
        guarded = GuardedSocket(sock)
        guarded.refuse_descriptors()
        session = cls(guarded, peer_of(guarded), attach, segment_fd)
        session.token, session.segment, session.generation = token, segment, generation
        session._has_memory = True
        return session

    @property
    def is_gone(self) -> bool:
        """Whether it can touch no buffer any more: its process is dead, or it left before it was handed memory."""
        return self._gone.done()

    @property
    def is_leaving(self) -> bool:
        """Whether it has closed its connection or is being killed; its successor waits for its death."""
        return self._left.done() or self.was_cut_off

    def fileno(self) -> int:
        """The connection."""
        return self._sock.fileno()

    def entrust(self, message: wire.DaemonMessage, fds: Sequence[int]) -> None:
        """Hand over its device's memory with this message; from now on only the backend's death ends the session."""
        if self.is_gone or self._left.done() or self._is_dead():
            return
        self._has_memory = True
        self.say(message, list(fds))

    def _is_dead(self) -> bool:
        """Whether its process is dead, even if the loop has not run the callback for that yet."""
        return self._pidfd is None or _shows(self._pidfd, select.POLLIN)

    async def gone(self) -> None:
        """Wait until it can touch no buffer any more."""
        await asyncio.shield(self._gone)

    def say(self, message: wire.DaemonMessage, fds: list[int] | None = None) -> None:
        """Send it a packet.  A failure is ignored: the end of the connection is noticed by itself."""
        with suppress(OSError):
            if fds:
                socket.send_fds(self._sock, [wire.encode_message(message)], fds)
            else:
                self._sock.send(wire.encode_message(message))

    async def detach(self, reason: str, patience_s: float, keep: bool) -> None:
        """Ask it to end, and to `keep` or drop what it holds for a successor; kill it if it has not left in time.

        The end of its connection is enough here: the device ends, and no other backend uses its memory.
        """
        self.is_detaching = True
        self.say(wire.Detach(reason=reason, keep=keep))
        if not await self._leaves(patience_s):
            await self.cut_off()

    async def hung_up(self, patience_s: float) -> None:
        """Its connection to a queue has ended: cut it off, unless it leaves within `patience_s`."""
        if self._hung_up or self.is_detaching:
            return
        self._hung_up = True
        if await self._leaves(patience_s):
            return
        self.blame(f"backend cut off: process {self.pid} has hung up on a queue and stays")
        await self.cut_off()

    async def _leaves(self, patience_s: float) -> bool:
        """Whether it closes its connection or dies within `patience_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._left), patience_s)
            return True
        return False

    async def cut_off(self) -> None:
        """Kill its process, since shared memory cannot be taken back from it.

        Returns when the process is dead, however long that takes: its system calls may still read the buffers.
        """
        self._cut_off_soon()
        await self.gone()

    def _cut_off_soon(self) -> None:
        if not self.was_cut_off:
            self.was_cut_off = True
            self._kill()

    def blame(self, text: str) -> None:
        """Tell why it is to be cut off."""
        if self.on_blame is not None:
            self.on_blame(text)
        else:
            _log.error("%s: %s", self.attach.device, text)

    def _kill(self) -> None:
        if self._pidfd is not None and not self.is_gone:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self, is_kept: bool = False) -> None:
        """Let go of the connection and of all descriptors; `is_kept`: the holder's copy stays usable.

        Harmless twice.
        """
        if self._sock.fileno() < 0:
            return
        self._background.cancel()
        self._stop_listening()
        if is_kept and isinstance(self._sock, GuardedSocket):
            self._sock.release()
        else:
            self._sock.close()
        for fd in (self.segment_fd, self._pidfd):
            if fd is not None:
                os.close(fd)
        self.segment_fd = self._pidfd = None

    async def resize(self, size_bytes: int, patience_s: float) -> None:
        """Have its store grow to `size_bytes`.  One call at a time.

        Raises `DaemonError` with its reason if it refuses, or if it ends or does not answer within `patience_s`: then
        `on_grown` is called when its store has grown later.
        """
        kind = self.attach.kind
        growing = self._growing = self._loop.create_future()
        self._asked_bytes = size_bytes
        self.say(wire.Resize(size_bytes=size_bytes))
        try:
            async with beside(self.gone()) as gone:
                await asyncio.wait({growing, gone}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if not growing.done():
                how = (
                    "ended before it answered: try again"
                    if self.is_gone
                    else f"has not answered within {patience_s:g} s: if it does later, the device follows"
                )
                raise DaemonError(f"its backend {kind} {how}")
            if reason := growing.result().reason:
                raise DaemonError(f"its backend {kind} refuses: {plain(reason)}")
        finally:
            self._growing = None

    def _take(self, packet: bytes) -> bool:
        """Take a packet that a backend may send; whether it was one."""
        try:
            message = wire.decode_session_message(packet)
        except WireError:
            return False
        if isinstance(message, wire.Resized):
            return self._resized(message)
        if isinstance(message, wire.Excluded):
            return self._excluded(message)
        if isinstance(message, wire.Leaving):
            first, self.has_said_end = not self.has_said_end, True
            return first
        return self._grown(message.size_bytes)

    def _grown(self, size_bytes: int) -> bool:
        # A store that grows in small steps may say so again, but never twice the same.
        if not self.grown_bytes < size_bytes < 1 << 63:
            return False
        self.grown_bytes = size_bytes
        self.on_grown(size_bytes)
        return self._may_announce()

    def _excluded(self, message: wire.Excluded) -> bool:
        if self.excluded:
            return False
        self.excluded = plain(message.reason) or "another client has taken its store over"
        return True

    def _may_announce(self) -> bool:
        """Whether it has announced no more than it may; one more each second."""
        now_s = self._clock()
        self._grown_left = min(GROWN_PACKETS_MAX, self._grown_left + now_s - self._grown_at_s)
        self._grown_at_s = now_s
        if self._grown_left < 1:
            return False
        self._grown_left -= 1
        return True

    def _resized(self, answer: wire.Resized) -> bool:
        growing = self._growing
        if growing is None or growing.done() or answer.size_bytes != self._asked_bytes:
            # The answer to a question that was given up, perhaps by an earlier daemon: the store may have grown.
            return not answer.reason and self._grown(answer.size_bytes)
        growing.set_result(answer)
        return True

    def _hear(self) -> None:
        try:
            packet = self._sock.recv(wire.ATTACH_MESSAGE_BYTES_MAX)
        except BlockingIOError:
            return
        except UndueDescriptors:
            self.blame("backend cut off: it sends descriptors after its attach")
            if self._has_memory:
                self._cut_off_soon()
            self._on_close()
            return
        except ConnectionError:
            packet = b""
        if not packet:
            self._on_close()
            return
        if self._take(packet):
            return
        self._undue_packets += 1
        if self._undue_packets > UNDUE_PACKETS_MAX and not self.is_leaving:
            self.blame("backend cut off: it talks on its attach connection")
            if self._has_memory:
                self._cut_off_soon()
            else:
                self._on_close()

    def _on_close(self) -> None:
        """Its connection has ended: a backend without memory is gone; one with memory must end soon."""
        self._loop.remove_reader(self._sock)
        if not self._has_memory:
            self._end()
            return
        _resolve(self._left)
        if not self.is_gone and not self.was_cut_off:
            self._background.spawn(self._end_or_kill())

    async def _end_or_kill(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.gone(), LEAVE_PATIENCE_S)
            return
        self.blame(f"backend cut off: process {self.pid} has closed its connection and lives on")
        await self.cut_off()

    def _on_death(self) -> None:
        if self._has_memory and not _shows(self._sock.fileno(), select.POLLHUP):
            _log.warning(
                "%s: process %d has ended and another has its connection: a backend must attach after its last fork",
                self.attach.device,
                self.pid,
            )
        self._hear_last()
        self._end()

    def _hear_last(self) -> None:
        """Take what it has sent before its death, which the loop may see first."""
        for _ in range(UNDUE_PACKETS_MAX):
            try:
                packet = self._sock.recv(wire.ATTACH_MESSAGE_BYTES_MAX)
            except (OSError, UndueDescriptors):
                return
            if not packet:
                return
            self._take(packet)

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
