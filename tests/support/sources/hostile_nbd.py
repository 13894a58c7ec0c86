"""An NBD server that does what no server should, on a thread of the test."""

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

_OPTION_REPLY, _REQUEST, _SIMPLE, _STRUCTURED = 0x3E889045565A9, 0x25609513, 0x67446698, 0x668E33EF
_ACK, _INFO, _UNSUPPORTED = 1, 3, 0x80000001
_STRUCTURED_REPLY, _GO = 8, 7
_HAS_FLAGS, _SEND_FLUSH = 1, 4
READ, WRITE = 0, 1


class HostileNbd:
    """One server at a unix socket; a context manager.  Each connection has a thread."""

    def __init__(
        self,
        path: Path,
        *,
        size_bytes: int = 1 << 20,
        block_sizes: tuple[int, int, int] | None = None,
        structured: bool = False,
        answer: Callable[[int, int, int, int], bytes | None] | None = None,
        talks_without_end: bool = False,
    ) -> None:
        """`answer` gets type, cookie, offset and length of a request; it returns the reply, None to hang up."""
        self.path, self._size_bytes, self._block_sizes = path, size_bytes, block_sizes
        self._structured, self._answer, self._talks_without_end = structured, answer, talks_without_end
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._connections: list[socket.socket] = []
        self.requests: list[tuple[int, int, int]] = []
        """Type, offset and length of each request."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    @property
    def options(self) -> dict[str, str]:
        """The options that lead the backend nbd here."""
        return {"socket": str(self.path)}

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, EOFError), connection:
            self._negotiate(connection)
            while True:
                magic, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", _take(connection, 28))
                assert magic == _REQUEST
                if kind == WRITE:
                    _take(connection, length)
                self.requests.append((kind, offset, length))
                reply = self._reply(kind, cookie, offset, length)
                if reply is None:
                    return
                connection.sendall(reply)

    def _reply(self, kind: int, cookie: int, offset: int, length: int) -> bytes | None:
        if self._answer is not None:
            return self._answer(kind, cookie, offset, length)
        return simple(cookie, data=bytes(length) if kind == READ else b"")

    def _negotiate(self, connection: socket.socket) -> None:
        connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        _take(connection, 4)
        while True:
            _, option, length = struct.unpack(">QII", _take(connection, 16))
            _take(connection, length)
            if option == _GO:
                self._describe(connection)
                return
            is_known = option == _STRUCTURED_REPLY and self._structured
            connection.sendall(_option_reply(option, _ACK if is_known else _UNSUPPORTED))

    def _describe(self, connection: socket.socket) -> None:
        export = struct.pack(">HQH", 0, self._size_bytes, _HAS_FLAGS | _SEND_FLUSH)
        connection.sendall(_option_reply(_GO, _INFO, export))
        while self._talks_without_end:
            connection.sendall(_option_reply(_GO, _INFO, export))
        if self._block_sizes is not None:
            connection.sendall(_option_reply(_GO, _INFO, struct.pack(">HIII", 3, *self._block_sizes)))
        connection.sendall(_option_reply(_GO, _ACK))


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    """A simple reply."""
    return struct.pack(">IIQ", _SIMPLE, error, cookie) + data


def empty(cookie: int) -> bytes:
    """A structured reply to a read that says that it is complete, without data."""
    return struct.pack(">IHHQI", _STRUCTURED, 1, 0, cookie, 0)


def _option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", _OPTION_REPLY, option, kind, len(data)) + data


def _take(connection: socket.socket, length: int) -> bytes:
    taken = b""
    while len(taken) < length:
        piece = connection.recv(length - len(taken))
        if not piece:
            raise EOFError
        taken += piece
    return taken
