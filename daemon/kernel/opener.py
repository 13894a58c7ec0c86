"""The process that opens /dev/ublkcN of an ordinary user's device, and lives as long as that is served.

The driver takes the process that opened the node for the device's server.  Of a user's device it kills the server
(SIGKILL) as soon as a request is 30 s old (ublk_timeout): if the supervisor had opened it, that would end the daemon
with all of its devices.  It finds the server by the number of its process, so this process must not end before the
device: the number would be another process's soon.

Runs: `Opener` on the supervisor's asyncio loop, `_serve` in the process.  It ends when the last process closes the
life pipe: the supervisor has an end of it, the holder for the next supervisor, and each worker.  The next supervisor
watches the process by its pidfd, which the holder has as well.
"""

import asyncio
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.held_names import opener_names
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.reserve import with_room_for_one
from ublkpool.workers.process import fork_child

TITLE = "ublkpool-open"
SERVER_KILLED = "a request was 30 s old: then the kernel ends the disk of an ordinary user"
_TEXT_BYTES_MAX = 4096
_POLL_S = 0.02


class Opener:
    """One such process."""

    def __init__(self, child: Child, life: int) -> None:
        """Called by `start` and `adopt`; `life` is this process's end of the pipe."""
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

    @classmethod
    def adopt(cls, device: str, held: Mapping[str, int]) -> Self | None:
        """The process that an earlier daemon started for the device; None unless its holder had it.  Raises `OSError`.

        It may have ended: the driver may have killed it meanwhile.
        """
        pidfd, life = (held.get(name) for name in opener_names(device))
        if pidfd is None or life is None:
            return None
        own = os.dup(life)
        try:
            watched = os.dup(pidfd)
        except BaseException:
            os.close(own)
            raise
        return cls(Child(_number(watched), watched), own)

    def hold(self, device: str, holder: Holder) -> None:
        """Have the holder keep what the next supervisor needs; nothing once the process has ended, its pidfd closed."""
        if self._child.exit_status is not None:
            return
        for name, fd in zip(opener_names(device), (self._child.fileno(), self.life), strict=True):
            holder.hold(name, fd)

    async def ended(self) -> None:
        """Return when the process has ended."""
        await self._child.wait()

    def let_end(self) -> None:
        """The supervisor serves the device no more; the process ends with the last worker."""
        if self.life >= 0:
            os.close(self.life)
            self.life = -1


def _number(pidfd: int) -> int:
    """The number of the pidfd's process; -1 if that has ended and was reaped (pidfd_open(2))."""
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))


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
