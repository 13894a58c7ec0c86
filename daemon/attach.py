"""Attaching: who may serve a device, what of theirs is believed, and noticing that they are gone.

Owns the attach socket, each backend's connection and the checks on what it says and brings.  Must not know queues or
the kernel: a `Device` decides whether it wants the backend.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import fcntl
import logging
import os
import secrets
import signal
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused, PoolError, WireError
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.readable import readable

ATTACH_DEADLINE_S = 10.0
CONNECTIONS_MAX = 4096
_PEER_CREDENTIALS = struct.Struct("3i")
_BLOCK_BYTES = (512, 1024, 2048, 4096)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_log = logging.getLogger("ublkpool.attach")


class Session:
    """One attached backend: its connection, its process, its segment."""

    def __init__(self, sock: socket.socket, attach: wire.Attach, segment_fd: int | None) -> None:
        self.attach = attach
        self.segment_fd = segment_fd
        self.segment = wire.SEGMENT_NONE
        """The number by which it names its own segment; the device gives it."""
        self.pid, self.uid, _ = _PEER_CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        )
        # ZeroMQ keeps routing ids that begin with 0 for itself.
        self.token = b"\x01" + secrets.token_bytes(wire.TOKEN_BYTES - 1)
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._pidfd = _pidfd(self.pid)
        self._loop.add_reader(sock, self._hear)

    @classmethod
    def adopt(
        cls, sock: socket.socket, attach: wire.Attach, segment_fd: int | None, token: bytes, segment: int
    ) -> Self:
        """Go on with the connection of a backend that an earlier daemon brought to its device."""
        sock.setblocking(False)
        session = cls(sock, attach, segment_fd)
        session.token, session.segment = token, segment
        return session

    @property
    def is_gone(self) -> bool:
        return self._gone.done()

    def fileno(self) -> int:
        """The connection."""
        return self._sock.fileno()

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

    async def detach(self, reason: str, patience_s: float) -> None:
        """Ask it to go; kill it if it has not gone in time."""
        self.say(wire.Detach(reason=reason))
        with suppress(TimeoutError):
            await asyncio.wait_for(self.gone(), patience_s)
            return
        await self.cut_off()

    async def cut_off(self) -> None:
        """Make sure that it touches no buffer any more: shared memory cannot be taken back, so its process ends."""
        if not self.is_gone and self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self.gone()

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
        # After its first packet a backend has nothing to say here but that it is gone.
        if not packet:
            self._loop.remove_reader(self._sock)
            if not self._gone.done():
                self._gone.set_result(None)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def check_attach(attach: wire.Attach, segment_fd: int | None) -> None:
    """Raise `AttachRefused` for sizes that no disk has, and for a segment that could go away under us."""
    logical, physical = attach.logical_block_bytes, attach.physical_block_bytes
    if logical not in _BLOCK_BYTES:
        raise AttachRefused(f"logical_block_bytes {logical} is none of {', '.join(map(str, _BLOCK_BYTES))}")
    if physical < logical or physical & (physical - 1) or physical > 1 << 20:
        raise AttachRefused(f"physical_block_bytes {physical} is not a power of two from {logical} to 1 MiB")
    sizes = {
        "size_bytes": attach.size_bytes,
        "discard_max_bytes": attach.discard_max_bytes,
        "discard_granularity_bytes": attach.discard_granularity_bytes,
        "write_zeroes_max_bytes": attach.write_zeroes_max_bytes,
        "segment_bytes": attach.segment_bytes,
    }
    for name, value in sizes.items():
        if not 0 <= value < 1 << 63:
            raise AttachRefused(f"{name} {value} is out of range")
    if attach.size_bytes % logical:
        raise AttachRefused(f"size_bytes {attach.size_bytes} is no multiple of {logical}")
    _check_segment(attach.segment_bytes, segment_fd)
    if not attach.segment_bytes and (attach.placement == "backend" or attach.read_buffers == "own"):
        raise AttachRefused(
            "placement backend and read_buffers own need a segment: segment_bytes and its descriptor"
        )


def _check_segment(segment_bytes: int, fd: int | None) -> None:
    if (segment_bytes == 0) != (fd is None):
        raise AttachRefused("segment_bytes and a segment's descriptor go together")
    if fd is None:
        return
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_size < segment_bytes:
        raise AttachRefused(f"its segment has {about.st_size} bytes, not the {segment_bytes} it says")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & _SEALS != _SEALS:
        raise AttachRefused("its segment must be a memfd with F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_SEAL")
    if about.st_blocks * 512 < segment_bytes:
        raise AttachRefused("its segment is not allocated in full: posix_fallocate it")


class AttachServer:
    """Listens on `RUN_DIR/attach.sock` and brings each backend to its device."""

    def __init__(
        self,
        run_dir: Path,
        group: int | None,
        describe: Callable[[str], wire.Described],
        admit: Callable[[Session], Awaitable[None]],
    ) -> None:
        """`describe` knows a device by its name; `admit` takes the session over.

        Both raise `PoolError` or `DaemonError` with the reason to refuse.
        """
        self._path = run_dir / "attach.sock"
        self._group = group
        self._describe = describe
        self._admit = admit
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self.refused = 0

    def start(self) -> None:
        """Listen.  Raises `OSError`."""
        self._path.unlink(missing_ok=True)
        listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        listener.bind(str(self._path))
        if self._group is not None:
            os.chown(self._path, -1, self._group)
        self._path.chmod(0o600 if self._group is None else 0o660)
        listener.listen(64)
        asyncio.get_running_loop().add_reader(listener, self._accept)
        self._listener = listener

    def close(self) -> None:
        """Stop listening; attached backends stay."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(BlockingIOError, ConnectionError):
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            if len(self._tasks) >= CONNECTIONS_MAX:
                sock.close()
                return
            task = asyncio.get_running_loop().create_task(self._welcome(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _welcome(self, sock: socket.socket) -> None:
        fds: list[int] = []
        try:
            packet = await asyncio.wait_for(_first_packet(sock, fds), ATTACH_DEADLINE_S)
            message = wire.decode_backend_message(packet)
            if isinstance(message, wire.Describe):
                sock.send(wire.encode_message(self._describe(message.device)))
                sock.close()
                return
            check_attach(message, fds[0] if fds else None)
        except (PoolError, DaemonError, OSError, TimeoutError) as error:
            self._refuse(sock, str(error) or "no attach message came in time")
            for fd in fds:
                os.close(fd)
            return
        session = Session(sock, message, fds[0] if fds else None)
        try:
            await self._admit(session)
        except (PoolError, DaemonError) as error:
            self._refuse(None, str(error), session)

    def _refuse(self, sock: socket.socket | None, reason: str, session: Session | None = None) -> None:
        self.refused += 1
        _log.warning("backend refused: %s", reason)
        if session is not None:
            session.say(wire.Refused(reason=reason))
            session.close()
        elif sock is not None:
            with suppress(OSError):
                sock.send(wire.encode_message(wire.Refused(reason=reason)))
            sock.close()


async def _first_packet(sock: socket.socket, fds: list[int]) -> bytes:
    await readable(sock)
    packet, received, flags, _ = socket.recv_fds(
        sock, wire.ATTACH_MESSAGE_BYTES_MAX, 4, socket.MSG_CMSG_CLOEXEC
    )
    fds.extend(received)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > 1:
        raise WireError("attach: one packet of at most 64 KiB with at most one descriptor")
    return packet
