"""The socket on which metrics are served, and its removal.

Owns that a unix socket there replaces a dead process's socket and nothing else, for the daemon's user and its group
alone.
"""

import socket
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes import unix_socket
from ublkpool.daemon.settings.listen import ListenAddress

BACKLOG = 64


def listen_at(address: ListenAddress, group: int | None = None) -> socket.socket:
    """A socket that listens there; a unix socket also for members of `group`.  Raises `DaemonError`."""
    if address.path is not None:
        if _is_listened_on(address.path):
            raise DaemonError(f"{address}: cannot listen: another process does")
        try:
            return unix_socket.listen(address.path, socket.SOCK_STREAM, group, BACKLOG)
        except OSError as error:
            raise DaemonError(f"{address.path}: cannot listen: {explain(error)}") from error
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # A connection of an earlier exporter, in TIME_WAIT, keeps no port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise DaemonError(f"{address}: cannot listen: {explain(error)}") from error
    return listener


def _is_listened_on(path: Path) -> bool:
    """Whether a process would accept a connection there; returns at once."""
    with socket.socket(
        socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    ) as probe:
        try:
            probe.connect(str(path))
        except BlockingIOError:
            # So many connections wait that no more fit.
            return True
        except OSError:
            return False
    return True


def shown(listener: socket.socket) -> str:
    """Where the socket listens, for users."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics"


def remove_left(path: Path) -> None:
    """Remove a unix socket that is not listened on any more; other files stay."""
    with suppress(OSError, DaemonError):
        unix_socket.remove_socket(path)
