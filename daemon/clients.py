"""Who uses which slice of a device's client area as I/O buffers, and when a slice may be somebody else's.

A client's connection is its lease.  When it ends the slice rests: as long as somebody still has that memory, and then
until every request that the disk had at that moment is answered, for what a dead client had under way still reads or
writes there.  Runs on the supervisor's asyncio loop; the driver is asked for nothing, see `ublk/control.py`.
"""

import asyncio
import os
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import NamedTuple

from ublkpool.daemon.background import Background, logged
from ublkpool.daemon.block_device import BlockDevice
from ublkpool.daemon.client_area import ClientArea
from ublkpool.daemon.control_process import ControlRunner
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.holder import Holder
from ublkpool.daemon.open_files import FileId, file_id, holders_of
from ublkpool.daemon.peer import peer_of


class Ground(NamedTuple):
    """What slices lie in: the area, the kernel's device, and the pool, by which a backend is known."""

    area: ClientArea
    kernel: BlockDevice
    pool_fd: int


def client_name(device: str, number: int) -> str:
    """Under which the holder has the connection of a slice's client."""
    return f"{device}/client/{number}"


def unused(slices: Mapping[int, FileId], pool: FileId, spared: Collection[int]) -> list[int]:
    """The slices that nobody has open or mapped but those who have the device's pool too: its backend."""
    serving = {*spared, *holders_of({pool})}
    # Mostly nobody has any, and one look is enough.
    if not set(holders_of(set(slices.values()))) - serving:
        return list(slices)
    return [number for number, each in slices.items() if not set(holders_of({each})) - serving]


class Clients:
    """The slices of one device."""

    def __init__(self, name: str, runner: ControlRunner, holder: Holder, background: Background) -> None:
        """`name` is the device's.  There is no slice before `begin` or `resume`."""
        self._name = name
        self._runner = runner
        self._holder = holder
        self._background = background
        self._ground: Ground | None = None
        self._lent: dict[int, socket.socket] = {}
        self._free: list[int] = []
        self._resting: set[int] = set()
        self._settling = self._look_again = False

    def begin(self, ground: Ground) -> None:
        """Nobody has ever had one of these slices."""
        self._ground = ground
        self._free = sorted(ground.area.files)

    def resume(self, ground: Ground, held: Mapping[str, int]) -> None:
        """Go on with an earlier daemon's; whose connection was not held may have a client all the same."""
        self._ground = ground
        for number in ground.area.files:
            fd = held.get(client_name(self._name, number))
            if fd is None:
                self._resting.add(number)
            else:
                sock = socket.socket(fileno=os.dup(fd))
                sock.setblocking(False)
                self._watch(number, sock)
        self._settle()

    def counts(self) -> tuple[int, int, int]:
        """Slices that are lent, resting and free."""
        return len(self._lent), len(self._resting), len(self._free)

    def names(self) -> list[str]:
        """The processes that have a slice, in words."""
        return [f"client process {peer_of(sock).pid}" for sock in self._lent.values()]

    def lend(self, sock: socket.socket) -> int | None:
        """A slice for the client that this connection leads to, which is ours then; None if there is none now."""
        if not self._free:
            self._settle()
            return None
        number = self._free[0]
        self._watch(number, sock)
        self._free.remove(number)
        return number

    def close(self) -> None:
        """The device goes, and its clients' memory stays theirs."""
        for number in list(self._lent):
            self._unwatch(number)
        self._ground = None
        self._free, self._resting = [], set()

    def _watch(self, number: int, sock: socket.socket) -> None:
        self._holder.hold(client_name(self._name, number), sock.fileno())
        self._lent[number] = sock
        asyncio.get_running_loop().add_reader(sock, self._hear, number)

    def _unwatch(self, number: int) -> None:
        sock = self._lent.pop(number)
        asyncio.get_running_loop().remove_reader(sock)
        self._holder.drop(client_name(self._name, number))
        sock.close()

    def _hear(self, number: int) -> None:
        """A client has nothing to say: its first word, too, ends the lease."""
        with suppress(BlockingIOError, ConnectionError):
            self._lent[number].recv(1)
        self._unwatch(number)
        self._resting.add(number)
        self._settle()

    def _settle(self) -> None:
        # Whoever comes while others are looked at was not among them.
        self._look_again = bool(self._resting)
        if self._look_again and not self._settling:
            self._settling = True
            self._background.spawn(self._let_rest())

    async def _let_rest(self) -> None:
        try:
            with logged(self._name):
                while self._look_again and (ground := self._ground) is not None:
                    self._look_again = False
                    rested = await self._unused(ground)
                    # Only now: whoever has the memory can still begin something in it.
                    if rested:
                        await self._pass_requests(ground)
                    self._give_back(rested)
        finally:
            self._settling = False

    async def _pass_requests(self, ground: Ground) -> None:
        try:
            await ground.kernel.pass_requests()
        except DaemonError:
            # A device that has gone meanwhile has no request left.
            if self._ground is not None:
                raise

    async def _unused(self, ground: Ground) -> list[int]:
        files, spared = ground.area.files, {os.getpid(), self._holder.pid}
        slices = {number: file_id(os.fstat(files[number])) for number in self._resting}
        pool = file_id(os.fstat(ground.pool_fd))
        # Looking at every process of the machine takes its time.
        return await self._runner.run_beside(
            f"{self._name}: clients", lambda: unused(slices, pool, spared), list[int]
        )

    def _give_back(self, rested: Collection[int]) -> None:
        back = self._resting.intersection(rested)
        self._resting -= back
        self._free = sorted({*self._free, *back})
