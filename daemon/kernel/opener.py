"""The process that opens /dev/ublkcN of an ordinary user's device, and lives as long as that is served.

The driver takes the process that opened the node for the device's server.  Of a user's device it kills the server
(SIGKILL) as soon as a request is 30 s old (ublk_timeout): if the supervisor had opened it, that would end the daemon
with all of its devices.  It finds the server by the number of its process, so this process must not end before the
device: the number would be another process's soon.

Runs: `Opener` on the supervisor's asyncio loop, `_serve` in the process.  It ends when the last process closes the
life pipe: the supervisor has an end of it, and each worker.
"""

import asyncio
import os
import socket
import time
from contextlib import suppress
from typing import Self

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.reserve import with_room_for_one
from ublkpool.workers.process import fork_child

TITLE = "ublkpool-open"
SERVER_KILLED = "a request was 30 s old: then the kernel ends the disk of an ordinary user"
_TEXT_BYTES_MAX = 4096
_POLL_S = 0.02


class Opener:
    """One such process."""

    def __init__(self, child: Child, life: int) -> None:
        """Called by `start`; `life` is this process's end of the pipe."""
        self._child = child
        self.life = life

    @property
    def pid(self) -> int:
        """The process that the driver takes for the server."""
        return self._child.pid

    @classmethod
    async def start(cls, path: str, deadline_s: float) -> tuple[Self, int]:
        """The process, and the descriptor of the node that it opened.  Raises `DaemonError`, `OSError`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end, life = os.pipe()
        try:
            fork = with_room_for_one(
                lambda: fork_child(
                    lambda: _serve(path, deadline_s, theirs, end), [theirs.fileno(), end], TITLE
                )
            )
            opener = cls(Child(fork()), life)
        except BaseException:
            ours.close()
            os.close(life)
            raise
        finally:
            theirs.close()
            os.close(end)
        try:
            return opener, await _received(ours, path)
        except BaseException:
            opener.let_end()
            raise
        finally:
            ours.close()

    async def ended(self) -> None:
        """Return when the process has ended."""
        await self._child.wait()

    def let_end(self) -> None:
        """The supervisor serves the device no more; the process ends with the last worker."""
        if self.life >= 0:
            os.close(self.life)
            self.life = -1


async def _received(ours: socket.socket, path: str) -> int:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    ours.setblocking(False)
    loop.add_reader(ours, ready.set_result, None)
    ready.add_done_callback(lambda _: loop.remove_reader(ours))
    await ready
    # Nothing is awaited from here on: see `Team.fork`.
    text, descriptors, _, _ = socket.recv_fds(ours, _TEXT_BYTES_MAX, 1)
    for fd in descriptors:
        os.set_inheritable(fd, False)
        return fd
    raise DaemonError(f"{path}: {text.decode() or 'the process that opens it has ended'}")


def _serve(path: str, deadline_s: float, theirs: socket.socket, end: int) -> int:
    """Open the node, hand its descriptor over, then live until the pipe's other ends are closed."""
    try:
        node = _opened(path, deadline_s)
    except OSError as error:
        theirs.send((error.strerror or str(error)).encode())
        return 1
    socket.send_fds(theirs, [b"opened"], [node])
    # As long as this process had the node open the device could not be deleted.
    os.close(node)
    theirs.close()
    while os.read(end, 1):
        pass
    return 0


def _opened(path: str, deadline_s: float) -> int:
    """The node, which udev may still be reading.  Raises `OSError` after the deadline."""
    until_s = time.monotonic() + deadline_s
    while True:
        with suppress(OSError):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if time.monotonic() > until_s:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        time.sleep(_POLL_S)
