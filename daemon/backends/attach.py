"""The attach socket: which process may serve a device, the checks on its first message, and the limits on its cost.

Owns `RUN_DIR/attach.sock` and the checks on what a backend sends and brings.  Must not know queues or the kernel: the
`Device` decides whether it takes the backend.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import errno
import logging
import os
import socket
import stat
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused, PoolError, WireError
from ublkpool.bufpool.seals import is_sealed
from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.backends.peer import Peer, check_may_attach, peer_of
from ublkpool.daemon.backends.refusals import Refusals, plain
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.errors import DaemonError, one_line
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.guarded_socket import GuardedSocket, NotMemory
from ublkpool.daemon.processes.open_files import reopened
from ublkpool.daemon.processes.unix_socket import ReservedListener, listen

ATTACH_DEADLINE_S = 10.0
UNHEARD_MAX = 256
"""Connections that have not sent their first message."""
UNHEARD_PER_USER_MAX = 64
ADMITTED_AT_ONCE_MAX = 16
"""Backends that wait for one device to answer."""
ACCEPT_PAUSE_S = 1.0
_KIND_LENGTH_MAX = 255
IDENTITY_LENGTH_MAX = 1024
GENERATION_SEEN_MAX = 1 << 62
"""Leaves room in 64 bits for every generation that a device can reach after it."""
_DESCRIPTORS_MAX = 4
_NO_MEMFD = "its segment must be a memfd with F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_SEAL"
_BLOCK_BYTES = (512, 1024, 2048, 4096)
OPTIMAL_IO_BYTES_MAX = 32 << 20
"""The driver's longest request.  The kernel reads ahead twice the optimal length, so this also limits a disk's
read-ahead to 64 MiB."""
LendBuffer = Callable[[str, socket.socket], tuple[wire.BufferLeased, int | None]]
"""The answer to a client of this device, and memory that is the client's until its connection ends."""
_log = logging.getLogger("ublkpool.attach")


def check_attach(attach: wire.Attach, segment_fd: int | None) -> None:
    """Raise `AttachRefused` for sizes that no disk has, and for a segment that the backend could shrink or not fill."""
    if not 1 <= len(attach.kind) <= _KIND_LENGTH_MAX or not attach.kind.isprintable():
        raise AttachRefused(f"kind must be 1 to {_KIND_LENGTH_MAX} printable characters")
    logical, physical = attach.logical_block_bytes, attach.physical_block_bytes
    if logical not in _BLOCK_BYTES:
        raise AttachRefused(
            f"logical_block_bytes {logical} is not one of {', '.join(map(str, _BLOCK_BYTES))}"
        )
    if physical < logical or physical & (physical - 1) or physical > 1 << 20:
        raise AttachRefused(f"physical_block_bytes {physical} is not a power of two from {logical} to 1 MiB")
    _check_optimal_io(attach.optimal_io_bytes, physical)
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
    if not 0 <= attach.generation_seen < GENERATION_SEEN_MAX:
        raise AttachRefused(f"generation_seen {attach.generation_seen} is out of range")
    _check_text("owner", attach.owner)
    _check_identity(attach.identity or wire.Identity())
    if attach.size_bytes % logical:
        raise AttachRefused(f"size_bytes {attach.size_bytes} is no multiple of {logical}")
    _check_segment(attach.segment_bytes, segment_fd)
    if not attach.segment_bytes and (attach.placement == "backend" or attach.read_buffers == "own"):
        raise AttachRefused(
            "placement backend and read_buffers own need a segment: segment_bytes and its descriptor"
        )


def _check_optimal_io(optimal: int, physical: int) -> None:
    if optimal and not (physical <= optimal <= OPTIMAL_IO_BYTES_MAX and optimal & (optimal - 1) == 0):
        raise AttachRefused(
            f"optimal_io_bytes {optimal} is not 0 or a power of two from {physical} to {OPTIMAL_IO_BYTES_MAX >> 20} MiB"
        )


def _check_identity(identity: wire.Identity) -> None:
    texts = {"value": identity.value, "in_boot": identity.in_boot, "store": identity.store}
    for name, text in texts.items():
        _check_text(f"identity.{name}", text)


def _check_text(name: str, text: str) -> None:
    if len(text) > IDENTITY_LENGTH_MAX or not (text.isprintable() or not text):
        raise AttachRefused(f"{name} must be at most {IDENTITY_LENGTH_MAX} printable characters")


def _check_segment(segment_bytes: int, fd: int | None) -> None:
    if (segment_bytes == 0) != (fd is None):
        raise AttachRefused("segment_bytes and a segment's descriptor go together")
    if fd is None:
        return
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_size < segment_bytes:
        raise AttachRefused(f"its segment has {about.st_size} bytes, not the {segment_bytes} it says")
    if not is_sealed(fd):
        raise AttachRefused(_NO_MEMFD)
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
        lend_buffer: LendBuffer,
        note_refusal: Callable[[str, str], None] = lambda device, reason: None,
    ) -> None:
        """`describe` returns a device by name; `admit` takes a session over, `lend_buffer` a client's connection.

        All raise `PoolError` or `DaemonError` with the reason to refuse.  `note_refusal` is called with a device's name
        and why a backend for it was refused.
        """
        self._path = run_dir / "attach.sock"
        self._group = group
        self._describe = describe
        self._admit = admit
        self._lend_buffer = lend_buffer
        self._note_refusal = note_refusal
        self._background = Background("attach")
        self._unheard: Counter[int] = Counter()
        self._admitting: Counter[str] = Counter()
        self._listener: ReservedListener | None = None
        self.refusals = Refusals(asyncio.get_running_loop().time)

    def start(self) -> None:
        """Listen.  Raises `DaemonError`."""
        self._listener = ReservedListener(listen(self._path, socket.SOCK_SEQPACKET, self._group))
        self._listen()

    def close(self) -> None:
        """Stop listening; attached backends stay."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)
        self._background.cancel()

    def _listen(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            # Out of descriptors: a waiting connection would make the listener readable again at once.
            _log.error("no backend can attach: %s; trying again in %g s", explain(error), ACCEPT_PAUSE_S)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(ACCEPT_PAUSE_S, self._listen)
            return
        if self._listener.was_short:
            # No descriptor would be left to watch its process by.
            self._refuse(sock, one_line(OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
            return
        self.receive(sock)

    def receive(self, sock: socket.socket) -> None:
        """Take a connection over: receive its first message, and answer."""
        sock = sock if isinstance(sock, GuardedSocket) else GuardedSocket(sock)
        try:
            peer = peer_of(sock)
            check_may_attach(peer, self._group)
            self._check_room(peer)
        except (PoolError, OSError) as error:
            self._refuse(sock, one_line(error))
            return
        self._unheard[peer.uid] += 1
        self._background.spawn(self._welcome(sock, peer))

    def _check_room(self, peer: Peer) -> None:
        # One user's connections must leave room for other users'.
        if self._unheard[peer.uid] >= UNHEARD_PER_USER_MAX or self._unheard.total() >= UNHEARD_MAX:
            raise AttachRefused(
                f"user {peer.uid} has {self._unheard[peer.uid]} connections that have said nothing: try later"
            )

    async def _welcome(self, sock: GuardedSocket, peer: Peer) -> None:
        files: list[int] = []
        session, is_client = None, False
        try:
            message = await self._first_message(sock, peer, files)
            if isinstance(message, wire.Describe):
                sock.send(wire.encode_message(self._describe(message.device)))
            elif isinstance(message, wire.LeaseBuffer):
                is_client = self._lend(sock, message)
            else:
                self._check(message, peer, files[0] if files else None)
                session = Session(sock, peer, message, files[0] if files else None)
                files.clear()
        except (PoolError, DaemonError, OSError, TimeoutError) as error:
            self._refuse(sock, one_line(error) if str(error) else "no attach message came in time")
        finally:
            for fd in files:
                os.close(fd)
            if session is None and not is_client:
                sock.close()
        if session is not None:
            await self._bring(session)

    def _check(self, attach: wire.Attach, peer: Peer, segment_fd: int | None) -> None:
        try:
            check_attach(attach, segment_fd)
        except AttachRefused as error:
            self._note_refusal(
                attach.device, f"process {peer.pid} was refused as its backend: {plain(str(error))}"
            )
            raise

    def _lend(self, sock: socket.socket, message: wire.LeaseBuffer) -> bool:
        """Whether the client was lent memory; then `lend_buffer` has taken its connection over."""
        leased, fd = self._lend_buffer(message.device, sock)
        # A client that is gone by now is noticed by the connection's new owner.
        with suppress(OSError):
            if fd is None:
                sock.send(wire.encode_message(leased))
            else:
                _hand_out(sock, leased, fd)
        return fd is not None

    async def _first_message(self, sock: GuardedSocket, peer: Peer, files: list[int]) -> wire.BackendMessage:
        try:
            packet = await asyncio.wait_for(_first_packet(sock, files), ATTACH_DEADLINE_S)
        finally:
            self._unheard[peer.uid] -= 1
            self._unheard += Counter()
        sock.refuse_descriptors()
        return wire.decode_backend_message(packet)

    async def _bring(self, session: Session) -> None:
        device = session.attach.device
        self._admitting[device] += 1
        try:
            if self._admitting[device] > ADMITTED_AT_ONCE_MAX:
                raise AttachRefused(f"device {device} has {ADMITTED_AT_ONCE_MAX} backends attaching already")
            await self._admit(session)
        except (PoolError, DaemonError, OSError) as error:
            reason = self._noted(one_line(error))
            who = f"backend {plain(session.attach.kind)}, process {session.pid},"
            self._note_refusal(device, f"{who} was refused: {reason}")
            session.say(wire.Refused(reason=reason))
            session.close()
        finally:
            self._admitting[device] -= 1
            self._admitting += Counter()

    def _refuse(self, sock: GuardedSocket, reason: str) -> None:
        with suppress(OSError):
            sock.send(wire.encode_message(wire.Refused(reason=self._noted(reason))))
        sock.close()

    def _noted(self, reason: str) -> str:
        reason = plain(reason)
        self.refusals.note(reason)
        return reason


def _hand_out(sock: socket.socket, leased: wire.BufferLeased, fd: int) -> None:
    """Send a client its slice as a separate open file (see `open_files.is_open_elsewhere`).  Raises `OSError`."""
    try:
        handed = reopened(fd)
    except OSError:
        # Its lease ends with its connection; an answer never comes, so it must not wait for one.
        sock.shutdown(socket.SHUT_RDWR)
        raise
    try:
        socket.send_fds(sock, [wire.encode_message(leased)], [handed])
    finally:
        os.close(handed)


async def _first_packet(sock: GuardedSocket, files: list[int]) -> bytes:
    try:
        packet = await sock.receive(wire.ATTACH_MESSAGE_BYTES_MAX, _DESCRIPTORS_MAX)
    except NotMemory as error:
        raise AttachRefused(_NO_MEMFD) from error
    files.extend(packet.files)
    if packet.is_cut or len(files) > 1:
        raise WireError("attach: one packet of at most 64 KiB with at most one descriptor")
    return packet.data
