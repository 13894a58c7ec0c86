"""The address on which metrics are served: what users write, checked and taken apart.

Owns the three forms: `ADDRESS:PORT` for HTTP, `unix` for a socket in the run directory, `unix:PATH` for one elsewhere.
Resolves no names, since a resolver may hang: an address is numeric, or `localhost`, which stands for 127.0.0.1.
"""

import ipaddress
from pathlib import Path
from typing import NamedTuple

SOCKET_NAME = "metrics.sock"
SOCKET_PATH_BYTES_MAX = 107
"""Of `sun_path`, without its NUL (unix(7))."""
_PORT_MAX = 65535
_FORMS = "ADDRESS:PORT such as 127.0.0.1:9847, or unix, or unix:PATH"


class ListenAddress(NamedTuple):
    """A unix socket's `path`, or a numeric `host` and a `port`, of which 0 lets the kernel choose."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_listen(text: str, run_dir: Path) -> ListenAddress:
    """The address that `text` names.  Raises `ValueError` with one line that names the value and the forms."""
    if text == "unix":
        return ListenAddress(path=run_dir / SOCKET_NAME)
    if text.startswith("unix:"):
        return ListenAddress(path=_socket_path(text))
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise ValueError(f"expected {_FORMS}, got {text!r}")
    return ListenAddress(host=_host(host, text), port=_port(port, text))


def _socket_path(text: str) -> Path:
    path = text.removeprefix("unix:")
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ValueError(f"expected an absolute path after unix:, got {text!r}")
    if len(path.encode(errors="surrogateescape")) > SOCKET_PATH_BYTES_MAX:
        raise ValueError(
            f"{path}: too long for a socket, whose path has at most {SOCKET_PATH_BYTES_MAX} bytes"
        )
    return Path(path)


def _host(host: str, text: str) -> str:
    if host == "localhost":
        return "127.0.0.1"
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        raise ValueError(f"expected a numeric address or localhost before the port, got {text!r}") from None
    if (address.version == 6) != (bare != host):
        raise ValueError(f"an IPv6 address has brackets and no other has, as in [::1]:9847, got {text!r}")
    return bare


def _port(port: str, text: str) -> int:
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= _PORT_MAX):
        raise ValueError(f"expected a port from 0 to {_PORT_MAX} after the last colon, got {text!r}")
    return int(port)
