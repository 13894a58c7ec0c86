"""A small NBD client, and the real nbdkit with a Python plugin at its other end.

Owns one connection: the handshake (fixed newstyle, NBD_OPT_GO, the default export) and simple replies, one request at a
time.  See the NBD protocol, doc/proto.md.
"""

import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

TEXTS = Path(__file__).parents[3] / "bufpool" / "sdk" / "nbdkit" / "texts.py"
DEADLINE_S = 60.0
_OPTION, _OPTION_REPLY = 0x49484156454F5054, 0x3E889045565A9
_REQUEST, _REPLY = 0x25609513, 0x67446698
_OPT_GO, _REP_ACK, _REP_INFO, _REP_ERROR = 7, 1, 3, 1 << 31
_INFO_EXPORT = 0
READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FLAG_FUA, FLAG_NO_HOLE = 1, 2
CAN_NOT_WRITE, CAN_FLUSH, CAN_FUA, IS_ROTATIONAL, CAN_TRIM = (1 << bit for bit in (1, 2, 3, 4, 5))


class NbdError(Exception):
    """The server refused the export or ended the connection."""


class Export(NamedTuple):
    """Size in bytes, and transmission flags."""

    size_bytes: int
    flags: int


class NbdClient:
    """One connection; raises `NbdError` if the server serves nothing."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.settimeout(DEADLINE_S)
        _magic, option, _flags = struct.unpack(">8sQH", self._take(18))
        assert option == _OPTION
        self._put(struct.pack(">IQIIIH", 3, _OPTION, _OPT_GO, 6, 0, 0))
        self.export = self._negotiate()

    def _negotiate(self) -> Export:
        export = None
        while True:
            magic, _, reply, length = struct.unpack(">QIII", self._take(20))
            assert magic == _OPTION_REPLY
            data = self._take(length)
            if reply == _REP_ACK and export is not None:
                return export
            if reply & _REP_ERROR:
                raise NbdError(data.decode())
            if reply == _REP_INFO and struct.unpack(">H", data[:2])[0] == _INFO_EXPORT:
                export = Export(*struct.unpack(">QH", data[2:]))

    def request(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> tuple[int, bytes]:
        """Returns the errno of the answer, and the data of a read."""
        self._put(struct.pack(">IHHQQI", _REQUEST, flags, command, 1, offset, length) + data)
        magic, error, _ = struct.unpack(">IIQ", self._take(16))
        assert magic == _REPLY
        return error, self._take(length) if command == READ and not error else b""

    def close(self) -> None:
        """Tell the server that the client leaves."""
        self._put(struct.pack(">IHHQQI", _REQUEST, 0, DISCONNECT, 1, 0, 0))
        self._socket.close()

    def _put(self, data: bytes) -> None:
        self._socket.sendall(data)

    def _take(self, length: int) -> bytes:
        taken = b""
        while len(taken) < length:
            piece = self._socket.recv(length - len(taken))
            if not piece:
                raise NbdError("the server ended the connection")
            taken += piece
        return taken


@contextmanager
def real_nbdkit(
    plugin: Path, options: Mapping[str, str], log: Path, environment: Mapping[str, str]
) -> Iterator[NbdClient]:
    """nbdkit with this plugin, and a connection to it; `log` gets what nbdkit says.  Raises `NbdError`."""
    ours, theirs = socket.socketpair()
    runner = Path(__file__).with_name("older_nbdkit.py")
    pairs = [f"{name}={value}" for name, value in options.items()]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            ["nbdkit", "-s", "python", str(runner), *pairs],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=stderr,
            env={**os.environ, "PLUGIN": str(plugin), "TEXTS": str(TEXTS), **environment},
        )
    theirs.close()
    try:
        client = NbdClient(ours)
        yield client
        client.close()
    finally:
        ours.close()
        assert process.wait(DEADLINE_S) is not None
