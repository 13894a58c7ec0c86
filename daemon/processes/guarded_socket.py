"""A connection from an untrusted peer: no descriptor that the peer sends is ever closed in this process.

The last close of a file may wait for ever: for a socket that lingers, or for a FUSE server's answer to FLUSH.  A read
without room for descriptors closes those of the packet, and so does the close of a socket with unread packets.  Hence
each packet is looked at first (MSG_PEEK, which drops duplicates only), and a forked process reads what carries
descriptors: it passes on those of sealable memory, whose close waits for nothing, and its end closes the others.
Runs on the supervisor's asyncio loop.
"""

import asyncio
import errno
import fcntl
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from ublkpool.bufpool.packets import receive_descriptors
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.readable import readable
from ublkpool.daemon.processes.reserve import with_room_for_one
from ublkpool.workers.process import fork_child

HELPER_TITLE = "ublkpool-peer"
ENDING_MAX = 16
"""Processes that end connections; if these hang, one more begins every `RETRY_S`, for all connections that wait."""
RETRY_S = 1.0
END_PATIENCE_S = 1.0
_DRAIN_MAX = 1024
_READ_BYTES = 65536
_CREDENTIALS_BYTES = 12
_SO_PASSRIGHTS = 83
"""Since Linux 6.16; include/uapi/asm-generic/socket.h."""
_WHOLE, _CUT, _FOREIGN = 0, 1, 2
_log = logging.getLogger("ublkpool.attach")


class UndueDescriptors(ConnectionAbortedError):
    """The peer's next packet carries descriptors where it must not; it is left unread."""


class NotMemory(Exception):
    """The peer sent a descriptor that is no memfd."""


class Packet(NamedTuple):
    """A peer's packet with the memfds that came with it; `is_cut` if it was longer, or had more."""

    data: bytes
    files: list[int]
    is_cut: bool


class _Head(NamedTuple):
    is_packet: bool
    has_descriptors: bool


class GuardedSocket(socket.socket):
    """A connected unix socket whose `recv` and `close` close no descriptor of the peer's here."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes the socket over."""
        super().__init__(fileno=sock.detach())
        self.setblocking(False)
        # Each packet then comes with credentials, which tells an empty packet from the end.
        self._ask_for_credentials(True)

    def _ask_for_credentials(self, wanted: bool) -> None:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, wanted)

    def _head(self) -> _Head:
        return _next(self, 1, socket.MSG_PEEK)

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """As `socket.socket.recv`; raises `UndueDescriptors`."""
        if self._head().has_descriptors:
            raise UndueDescriptors(errno.ECONNABORTED, "descriptors came where none are expected")
        return super().recv(bufsize, flags)

    def refuse_descriptors(self) -> None:
        """From now on the peer cannot send descriptors, where the kernel supports that."""
        with suppress(OSError):
            self.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)

    async def receive(self, bytes_max: int, files_max: int) -> Packet:
        """The next packet.  Raises `OSError`, `NotMemory`; `TimeoutError` never by itself: the caller has a clock."""
        await readable(self)
        if not self._head().has_descriptors:
            data, _, flags, _ = self.recvmsg(bytes_max)
            return Packet(data, [], bool(flags & socket.MSG_TRUNC))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        # They would take the room of the descriptors.
        self._ask_for_credentials(False)
        with ours:
            with theirs:
                helper = _fork(lambda: _sift(self, theirs, bytes_max, files_max), [self, theirs])
            try:
                await readable(ours)
                verdict, files, flags = receive_descriptors(ours, 1 + bytes_max, files_max)
                data = verdict[1:]
                # Nothing is left to close where the helper passed everything on.
                with suppress(TimeoutError):
                    await asyncio.wait_for(helper.wait(), END_PATIENCE_S)
            finally:
                helper.send(signal.SIGKILL)
                self._ask_for_credentials(True)
        return _judge(verdict, Packet(data, files, verdict[:1] == bytes([_CUT])), flags)

    def close(self) -> None:
        """End the connection: the peer can send nothing more, and what it has sent is not closed here."""
        if self.fileno() >= 0 and not self._is_drained():
            _end_aside(socket.socket(fileno=self.detach()))
        super().close()

    def release(self) -> None:
        """Close this descriptor only, while another process keeps the connection."""
        super().close()

    def _is_drained(self) -> bool:
        """Read everything that carries no descriptor; whether nothing is left."""
        with suppress(OSError):
            self.shutdown(socket.SHUT_RD)
        for _ in range(_DRAIN_MAX):
            try:
                head = self._head()
                if head.has_descriptors:
                    return False
                if not head.is_packet:
                    return True
                super().recv(_READ_BYTES)
            except ConnectionError:
                # Said once, before the packets that are left.
                continue
            except OSError:
                return True
        return False


def _next(sock: socket.socket, bytes_max: int, flags: int = 0) -> _Head:
    """Read, with room for a packet's credentials only, which close no descriptor if `flags` has MSG_PEEK."""
    room = socket.CMSG_LEN(_CREDENTIALS_BYTES)
    data, ancillary, found, _ = sock.recvmsg(bytes_max, room, flags)
    # A stream has credentials at its end, too (`unix_stream_read_generic`, net/unix/af_unix.c), and no empty packets.
    is_packet = bool(data) if sock.type == socket.SOCK_STREAM else bool(ancillary)
    return _Head(is_packet, bool(found & socket.MSG_CTRUNC))


def _judge(verdict: bytes, packet: Packet, flags: int) -> Packet:
    if flags & socket.MSG_CTRUNC:
        for fd in packet.files:
            os.close(fd)
        # This process has reached its limit of descriptors.
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    if not verdict:
        raise ConnectionResetError(errno.ECONNRESET, "the process that reads its descriptors has ended")
    if verdict[0] == _FOREIGN:
        raise NotMemory
    return packet


def _sift(sock: GuardedSocket, theirs: socket.socket, bytes_max: int, files_max: int) -> int:
    """Runs in the forked process: pass on the packet, with its descriptors if all are of sealable memory."""
    data, files, flags = receive_descriptors(sock, bytes_max, files_max)
    verdict = _CUT if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) else _WHOLE
    if not all(map(_is_memory, files)):
        verdict = _FOREIGN
    socket.send_fds(theirs, [bytes([verdict]), data], files if verdict == _WHOLE else [])
    return 0


def _is_memory(fd: int) -> bool:
    """Whether the file's kind has seals (mm/memfd.c); asks no file system."""
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        return True
    return False


def _fork(main: Callable[[], int], keep: Sequence[socket.socket]) -> Child:
    """Raises `OSError`."""
    numbers = [each.fileno() for each in keep]
    return Child(with_room_for_one(lambda: fork_child(main, numbers, HELPER_TITLE))())


_ending: set[Child] = set()
_waiting: list[socket.socket] = []


def _end_aside(sock: socket.socket) -> None:
    """Leave a connection, which is taken over, to a forked process that reads what is left."""
    _waiting.append(sock)
    _ending.difference_update([each for each in _ending if each.exit_status is not None])
    if len(_ending) < ENDING_MAX:
        _end_waiting()
    elif len(_waiting) == 1:
        asyncio.get_running_loop().call_later(RETRY_S, _end_waiting)


def _end_waiting() -> None:
    ended, _waiting[:] = list(_waiting), []
    if not ended:
        return
    try:
        _ending.add(_fork(lambda: _read_all(ended), ended))
    except OSError as error:
        _log.error("connections cannot be ended: no process for it: %s; trying again in %g s", error, RETRY_S)
        _waiting.extend(ended)
        asyncio.get_running_loop().call_later(RETRY_S, _end_waiting)
        return
    for each in ended:
        each.close()


def _read_all(socks: Sequence[socket.socket]) -> int:
    """Runs in the forked process: read every packet, so that whose close is the last does not matter."""
    for sock in socks:
        while True:
            try:
                if not _next(sock, _READ_BYTES).is_packet:
                    break
            except ConnectionError:
                continue
            except OSError:
                break
    return 0
