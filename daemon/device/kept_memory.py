"""Ends the keeper of a memory backend's memory, when its device is deleted while no backend is attached.

The keeper (`bufpool/sdk/keeper.py`) is a process that a backend started: it may hang, and other processes may connect
at the same time.  So the supervisor's loop never blocks in a call on its socket.
"""

import asyncio
import errno
import logging
import socket
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.sdk.keeper import DROP
from ublkpool.daemon.processes.readable import readable

PATIENCE_S = 10.0
_POLL_S = 0.05
_log = logging.getLogger("ublkpool.device")


async def drop_kept(path: Path) -> None:
    """End the keeper that listens at `path`, if one does.  Logs one that does not answer, and leaves it."""
    if not path.is_socket():
        return
    try:
        async with asyncio.timeout(PATIENCE_S):
            with await _new_socket() as connection:
                await _drop(connection, path)
    except (FileNotFoundError, ConnectionRefusedError):
        return
    except TimeoutError:
        _log.warning("%s: what keeps this memory does not answer; its process is left alone", path)
    except OSError as error:
        _log.warning("%s: what keeps this memory cannot be told to end: %s", path, error)


async def _new_socket() -> socket.socket:
    """A socket, once a descriptor is free: the device being deleted may have used the last.  Raises `OSError`."""
    while True:
        try:
            return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        await asyncio.sleep(_POLL_S)


async def _drop(connection: socket.socket, path: Path) -> None:
    """Return when the keeper has ended.  Raises `OSError`."""
    while not _is_connected(connection, path):
        await asyncio.sleep(_POLL_S)
    with suppress(ConnectionError):
        connection.send(DROP)
        await readable(connection)
        connection.recv(1)


def _is_connected(connection: socket.socket, path: Path) -> bool:
    """Whether it is; not yet while the listener's backlog is full (connect(2): EAGAIN of a unix socket)."""
    try:
        connection.connect(str(path))
    except BlockingIOError:
        return False
    return True
