"""The options of the backend nbd."""

from pathlib import Path
from typing import Literal

import msgspec

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sizes import ByteSize

CONNECTIONS_MAX = 64


class NbdOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where the export is: `uri`, `socket` or `host`; docs/BACKENDS.md has the table.

    `unflushed` is how many bytes of answered writes are kept for a server that loses them; `timeout`, in seconds, how
    long a lost server is awaited, 0 for ever.
    """

    uri: str = ""
    socket: Path | None = None
    host: str = ""
    port: int = 10809
    export: str = ""
    connections: int = 1
    readonly: bool = False
    unflushed: ByteSize = 64 << 20
    timeout: float = 0.0
    tls: Literal["auto", "off", "allow", "require"] = "auto"
    tls_certificates: Path | None = None
    tls_verify_peer: bool = True
    tls_username: str = ""
    tls_psk_file: Path | None = None

    @property
    def server(self) -> str:
        """The server for people, and as its identity."""
        if self.uri:
            return self.uri
        if self.socket is not None:
            return f"nbd+unix:///{self.export}?socket={self.socket.absolute()}"
        return f"nbd://{self.host}:{self.port}/{self.export}"


def check_options(options: NbdOptions) -> None:
    """Raise `BackendError` for options that contradict each other."""
    places = [bool(options.uri), options.socket is not None, bool(options.host)]
    if sum(places) != 1:
        raise BackendError("nbd: give one of uri=URI, socket=PATH and host=NAME: they name the server")
    if options.uri and options.export:
        raise BackendError("nbd: uri= names the export itself: leave export= out")
    if not 0 < options.port < 65536:
        raise BackendError(f"nbd: port={options.port} is not 1 to 65535")
    if not 1 <= options.connections <= CONNECTIONS_MAX:
        raise BackendError(f"nbd: connections={options.connections} is not 1 to {CONNECTIONS_MAX}")
    if not 0 <= options.timeout < float("inf"):
        raise BackendError(f"nbd: timeout={options.timeout} is not a number of seconds")
