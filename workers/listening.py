"""The unix sockets on which a worker listens for its backend: mode, group, and what a peer may send.

Owns that no peer can send descriptors where the kernel can refuse them (Linux 6.16): the last close of one may wait,
for a socket that lingers or for a FUSE server, and the worker or its ZeroMQ thread would wait there.
"""

import os
import socket
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.way_out import naming

_SO_PASSRIGHTS = 83
"""Since Linux 6.16, for the connections of a listening socket as well; include/uapi/asm-generic/socket.h."""


def socket_mode(group: int | None) -> int:
    """The mode of a unix socket for this process's user and, unless that is None, for `group`."""
    return 0o600 if group is None else 0o660


def listen(path: Path, kind: socket.SocketKind, mode: int, group: int | None, backlog: int) -> socket.socket:
    """A socket that listens at `path`, with `mode` and, unless that is None, `group`; it replaces an earlier worker's.

    Never waits.  Raises `OSError`.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with naming(path):
            listener.bind(str(path))
        with suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        path.chmod(mode)
        if group is not None:
            os.chown(path, -1, group)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener
