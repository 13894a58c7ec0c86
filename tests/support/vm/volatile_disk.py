"""A virtual disk with a volatile cache, as an NBD export; its model knows exactly what survives a power failure.

Owns the model.  A write is durable once it was sent with FUA and answered, or once a FLUSH was answered that arrived
after the write's answer; NBD, virtio and real disks promise no more.  Answers to writes come late and out of order, so
that a FLUSH that overtakes a write is noticed.  At a power failure each other write is kept or lost.
The protocol is fixed newstyle with simple replies (the NetworkBlockDevice project's proto.md).
"""

import random
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_OPTION_MAGIC = 0x49484156454F5054
_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC, _SIMPLE_MAGIC = 0x25609513, 0x67446698
_GO, _ABORT = 7, 2
_ACK, _INFO, _UNSUPPORTED = 1, 3, (1 << 31) + 1
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_FUA = 1
_HAS_FLAGS, _SENDS_FLUSH, _SENDS_FUA = 1, 4, 8
_EINVAL = 22
_REQUEST = struct.Struct(">IHHQQI")
_IDLE_S = 0.001


@dataclass
class Write:
    """One write, in the order of arrival."""

    offset: int
    data: bytes
    cookie: int
    is_answered: bool = False
    is_durable: bool = False


class VolatileDisk:
    """The disk, which serves one connection."""

    def __init__(self, content: bytes, seed: int) -> None:
        self.flush_count = 0
        self._durable = bytearray(content)
        self._current = bytearray(content)
        self._writes: list[Write] = []
        self._unanswered: list[Write] = []
        self._random = random.Random(seed)

    def after_power_failure(self, seed: int | None) -> bytes:
        """The disk after a power failure: of the other writes it has none (None), or those that the seed picks."""
        choice = random.Random(seed)
        image = bytearray(self._durable)
        for write in self._writes:
            if write.is_durable or (seed is not None and choice.random() < 0.5):
                image[write.offset : write.offset + len(write.data)] = write.data
        return bytes(image)

    @property
    def volatile_count(self) -> int:
        """The number of writes that a power failure now may lose."""
        return sum(1 for write in self._writes if not write.is_durable)

    @contextmanager
    def served(self, path: Path) -> Iterator[None]:
        """Serve one client at this socket, in a thread, until it disconnects or the block ends."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            thread = threading.Thread(target=self._serve, args=(listener,))
            thread.start()
            try:
                yield
            finally:
                # Wakes an accept(2) that still waits for a connection.
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()

    def _serve(self, listener: socket.socket) -> None:
        with suppress(OSError, EOFError):
            connection, _ = listener.accept()
            with connection:
                if _negotiate(connection, len(self._current)):
                    while self._serve_one(connection):
                        pass

    def _serve_one(self, connection: socket.socket) -> bool:
        readable, _, _ = select.select([connection], [], [], _IDLE_S if self._unanswered else None)
        if not readable:
            self._answer_writes(connection, len(self._unanswered))
            return True
        magic, flags, kind, cookie, offset, length = _REQUEST.unpack(_receive(connection, _REQUEST.size))
        if magic != _REQUEST_MAGIC or kind == _DISCONNECT:
            return False
        if kind == _READ:
            _answer(connection, cookie, bytes(self._current[offset : offset + length]))
        elif kind == _WRITE:
            self._write(connection, Write(offset, _receive(connection, length), cookie), bool(flags & _FUA))
        elif kind == _FLUSH:
            self._flush(connection, cookie)
        else:
            _answer(connection, cookie, error=_EINVAL)
        return True

    def _write(self, connection: socket.socket, write: Write, fua: bool) -> None:
        self._current[write.offset : write.offset + len(write.data)] = write.data
        self._writes.append(write)
        if fua:
            write.is_answered = write.is_durable = True
            _answer(connection, write.cookie)
            return
        self._unanswered.append(write)
        self._answer_writes(connection, self._random.randrange(2))

    def _answer_writes(self, connection: socket.socket, count: int) -> None:
        for _ in range(min(count, len(self._unanswered))):
            write = self._unanswered.pop(self._random.randrange(len(self._unanswered)))
            write.is_answered = True
            _answer(connection, write.cookie)

    def _flush(self, connection: socket.socket, cookie: int) -> None:
        self.flush_count += 1
        for write in self._writes:
            write.is_durable = write.is_durable or write.is_answered
        self._settle()
        _answer(connection, cookie)

    def _settle(self) -> None:
        """Merge the leading durable writes into the base image."""
        count = next((i for i, write in enumerate(self._writes) if not write.is_durable), len(self._writes))
        for write in self._writes[:count]:
            self._durable[write.offset : write.offset + len(write.data)] = write.data
        del self._writes[:count]


def _negotiate(connection: socket.socket, size_bytes: int) -> bool:
    """The handshake up to transmission; False if the client leaves."""
    connection.sendall(b"NBDMAGIC" + struct.pack(">QH", _OPTION_MAGIC, 1))
    _receive(connection, 4)
    while True:
        magic, option, length = struct.unpack(">QII", _receive(connection, 16))
        _receive(connection, length)
        if magic != _OPTION_MAGIC or option == _ABORT:
            return False
        if option != _GO:
            _reply(connection, option, _UNSUPPORTED)
            continue
        flags = _HAS_FLAGS | _SENDS_FLUSH | _SENDS_FUA
        _reply(connection, option, _INFO, struct.pack(">HQH", 0, size_bytes, flags))
        _reply(connection, option, _ACK)
        return True


def _reply(connection: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    connection.sendall(struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(data)) + data)


def _answer(connection: socket.socket, cookie: int, data: bytes = b"", error: int = 0) -> None:
    connection.sendall(struct.pack(">IIQ", _SIMPLE_MAGIC, error, cookie) + data)


def _receive(connection: socket.socket, length: int) -> bytes:
    """Raises `EOFError` at the end of the connection."""
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
