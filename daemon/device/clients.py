"""Who uses which slice of a device's client area as I/O buffers, and when a slice may be somebody else's.

A client's connection is its lease.  When it ends the slice rests: as long as an open file of that memory is left
somewhere, and then until every request that the disk had at that moment is answered, for what a dead client had under
way still reads or writes there.  The next client must be the same user's: pages that were pinned before they were
unmapped do not show, and a slice's memory cannot be replaced while there is a disk.  Runs on the supervisor's asyncio
loop; the driver is asked for nothing, see `ublk/control.py`.
"""

import asyncio
import os
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import NamedTuple

from ublkpool.daemon.backends.peer import peer_of
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.client_area import USER_UNKNOWN, ClientArea
from ublkpool.daemon.processes.background import Background, logged
from ublkpool.daemon.processes.held_names import client_name
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.open_files import is_open_elsewhere


class ClientContext(NamedTuple):
    """What slices lie in: the area, and the kernel's device."""

    area: ClientArea
    kernel: BlockDevice


def rested(slices: Mapping[int, int]) -> list[int]:
    """The slices, by number and descriptor, that no client has any more, wherever it might have put them."""
    return [number for number, fd in slices.items() if not is_open_elsewhere(fd)]


class Clients:
    """The slices of one device."""

    def __init__(self, name: str, holder: Holder, background: Background) -> None:
        """`name` is the device's.  There is no slice before `begin` or `resume`."""
        self._name = name
        self._holder = holder
        self._background = background
        self._client_context: ClientContext | None = None
        self._lent: dict[int, socket.socket] = {}
        self._free: list[int] = []
        self._resting: set[int] = set()
        self._settling = self._look_again = False

    def begin(self, client_context: ClientContext) -> None:
        """Nobody has ever had one of these slices."""
        self._client_context = client_context
        self._free = sorted(client_context.area.files)

    def resume(self, client_context: ClientContext, held: Mapping[str, int]) -> None:
        """Go on with an earlier daemon's; whose connection was not held may have a client all the same."""
        self._client_context = client_context
        for number in client_context.area.files:
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
        """A slice for the client that this connection leads to, which is ours then; None if there is none now.

        Its user is in `ClientArea.users` then, which is to be put on record before the client has the slice.
        """
        number = self._choose(peer_of(sock).uid)
        if number is None:
            self._settle()
            return None
        self._watch(number, sock)
        self._free.remove(number)
        return number

    def _choose(self, user: int) -> int | None:
        """A free slice that this user's clients had, or else one that no client has had."""
        if self._client_context is None:
            return None
        users = self._client_context.area.users
        fitting = [number for number in self._free if users.get(number, user) == user]
        number = min(fitting, key=lambda each: (each not in users, each), default=None)
        if number is not None:
            users[number] = user
        return number

    def close(self) -> None:
        """The device goes, and its clients' memory stays theirs."""
        for number in list(self._lent):
            self._unwatch(number)
        self._client_context = None
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
                while self._look_again and (client_context := self._client_context) is not None:
                    self._look_again = False
                    numbers = rested(self._lendable(client_context.area))
                    # Only now: whoever has the memory can still begin something in it.
                    if numbers:
                        await self._pass_requests(client_context)
                    self._give_back(numbers)
        finally:
            self._settling = False

    async def _pass_requests(self, client_context: ClientContext) -> None:
        try:
            await client_context.kernel.pass_requests()
        except DaemonError:
            # A device that has gone meanwhile has no request left.
            if self._client_context is not None:
                raise

    def _lendable(self, area: ClientArea) -> dict[int, int]:
        """Those that rest and may be lent again at all."""
        users = area.users
        return {n: area.files[n] for n in self._resting if users.get(n) != USER_UNKNOWN}

    def _give_back(self, numbers: Collection[int]) -> None:
        back = self._resting.intersection(numbers)
        self._resting -= back
        self._free = sorted({*self._free, *back})
