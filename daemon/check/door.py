"""The attach socket of a check: it describes the device, and hands the backend that attaches to the check.

Owns `RUN_DIR/attach.sock`.  The backend is the user's own, so it is not guarded against as the daemon's socket is; its
attach message passes the daemon's own judgement.  Runs on the check's asyncio loop.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.packets import receive_descriptors
from ublkpool.daemon.backends.attach import check_attach
from ublkpool.daemon.backends.peer import peer_of
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.processes.unix_socket import listen

_DESCRIPTORS_MAX = 4


class Door:
    """Listens for one backend after the other."""

    def __init__(
        self,
        run_dir: Path,
        describe: Callable[[str], wire.Described],
        check: Callable[[wire.Attach], None],
    ) -> None:
        """`check` raises `AttachRefused` for a backend that cannot serve the device."""
        self._describe, self._check = describe, check
        self._listener = listen(run_dir / "attach.sock", socket.SOCK_SEQPACKET)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener, self._accept)
        self._asking: set[socket.socket] = set()
        self.sessions: asyncio.Queue[Session] = asyncio.Queue()
        """The backends that attached."""
        self.refusal = ""
        """Why the last one was refused; empty once one has attached."""

    def _accept(self) -> None:
        with suppress(BlockingIOError, ConnectionError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._asking.add(connection)
            self._loop.add_reader(connection, self._hear, connection)

    def _hear(self, connection: socket.socket) -> None:
        self._loop.remove_reader(connection)
        self._asking.discard(connection)
        files: list[int] = []
        try:
            packet, files, _ = receive_descriptors(
                connection, wire.ATTACH_MESSAGE_BYTES_MAX, _DESCRIPTORS_MAX
            )
            if self._answer(connection, packet, files):
                return
        except (PoolError, OSError) as error:
            self.refusal = " ".join(str(error).split())
            with suppress(OSError):
                connection.send(wire.encode_message(wire.Refused(reason=self.refusal)))
        for fd in files:
            os.close(fd)
        connection.close()

    def _answer(self, connection: socket.socket, packet: bytes, files: list[int]) -> bool:
        """Whether the connection and its descriptors are a session's now."""
        if not packet:
            return False
        message = wire.decode_backend_message(packet)
        if isinstance(message, wire.Describe):
            connection.send(wire.encode_message(self._describe(message.device)))
        if not isinstance(message, wire.Attach):
            return False
        segment_fd = files[0] if files else None
        check_attach(message, segment_fd)
        self._check(message)
        self.refusal = ""
        self.sessions.put_nowait(Session(connection, peer_of(connection), message, segment_fd))
        return True

    def close(self) -> None:
        """Stop listening."""
        for each in (self._listener, *self._asking):
            self._loop.remove_reader(each)
            each.close()
