"""The attach server, with connections from a test and a device that accepts every backend."""

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from ublkpool.bufpool import wire
from ublkpool.daemon.backends.attach import AttachServer
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.errors import DaemonError

DEADLINE_S = 60
DEVICE = "vol0"
PAGE = 4096
ATTACH = wire.Attach(v=1, device=DEVICE, kind="test")


def open_files() -> list[str]:
    """The open descriptors of this process, without those that reading the list opens."""
    targets = []
    for each in Path("/proc/self/fd").iterdir():
        # The listing's own is closed by now, and another thread may close one of its own.
        with suppress(FileNotFoundError):
            targets.append(str(each.readlink()))
    return sorted(each for each in targets if not each.startswith("/proc/"))


def no_more_open_than(before: list[str]) -> bool:
    """Whether this process has opened nothing since `before`, of `open_files`; what was open then may have ended."""
    return Counter(open_files()) <= Counter(before)


class Door:
    """An attach server with connections from the test, and the sessions that it accepted."""

    def __init__(self, run_dir: Path, group: int | None = None) -> None:
        self.server = AttachServer(
            run_dir, group, self._describe, self._admit, self._lend_buffer, self._note_refusal
        )
        self.sessions: list[Session] = []
        self.clients: list[socket.socket] = []
        self.buffer_fd: int | None = None
        self.refusals: list[tuple[str, str]] = []
        self.opens = asyncio.Event()
        self.opens.set()

    def _note_refusal(self, device: str, reason: str) -> None:
        self.refusals.append((device, reason))

    def _describe(self, name: str) -> wire.Described:
        if name != DEVICE:
            raise DaemonError(f"no device {name!r}")
        return wire.Described(
            v=1,
            device=name,
            size_bytes=0,
            max_io_bytes=PAGE,
            need_get_data=True,
            placement="pool",
            read_only=False,
        )

    async def _admit(self, session: Session) -> None:
        self._describe(session.attach.device)
        await self.opens.wait()
        self.sessions.append(session)

    def _lend_buffer(self, name: str, sock: socket.socket) -> tuple[wire.BufferLeased, int | None]:
        self._describe(name)
        if self.buffer_fd is not None:
            self.clients.append(sock)
        size_bytes = 0 if self.buffer_fd is None else PAGE
        return wire.BufferLeased(path="/dev/ublkb7", size_bytes=size_bytes), self.buffer_fd

    def connect(self) -> socket.socket:
        """A new connection; returns the test's end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setblocking(False)
        ours.setblocking(False)
        self.server.receive(theirs)
        return ours

    async def say(self, packet: bytes | wire.BackendMessage, *files: int) -> wire.DaemonMessage | None:
        """The answer to a new connection; None if the server closes it without one."""
        with self.connect() as connection:
            data = packet if isinstance(packet, bytes) else wire.encode_message(packet)
            with suppress(BrokenPipeError):
                socket.send_fds(connection, [data], files)
            return await answer(connection)

    async def admit(self) -> tuple[Session, socket.socket]:
        """A session, and its backend's end."""
        connection = self.connect()
        connection.send(wire.encode_message(ATTACH))
        count = len(self.sessions)
        await until(lambda: len(self.sessions) > count, "it is admitted")
        return self.sessions[-1], connection

    def close(self) -> None:
        for each in self.sessions:
            each.close()
        self.server.close()


async def answer(connection: socket.socket) -> wire.DaemonMessage | None:
    async with asyncio.timeout(DEADLINE_S):
        packet = await asyncio.get_running_loop().sock_recv(connection, 65536)
    return wire.decode_daemon_message(packet) if packet else None


async def reason(answering: Coroutine[Any, Any, wire.DaemonMessage | None]) -> str:
    said = await answering
    assert isinstance(said, wire.Refused)
    return said.reason


async def until(check: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not check():
            await asyncio.sleep(0.002)
    assert check(), what


def at_the_door(run_dir: Path, scene: Callable[[Door], Coroutine[Any, Any, None]]) -> None:
    """Run a scene, and check that it leaves no descriptor open."""

    async def play() -> None:
        before = open_files()
        door = Door(run_dir)
        await scene(door)
        door.close()
        # Helper processes of the last packets may still run.
        await until(lambda: no_more_open_than(before), "no descriptor is left open")

    asyncio.run(play())
