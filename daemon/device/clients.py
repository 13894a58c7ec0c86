"""The clients that use slices of a device's client area as I/O buffers, and when a slice may be lent again.

A client's connection is its lease.  After the connection's end the slice rests: while any process has an open file of
that memory, and then until every request that the disk had at that moment is answered, since a dead client's requests
still read or write there.  The next client must run as the same user: pages that were pinned before they were unmapped
do not show, and a slice's memory cannot be replaced while the disk exists.  Runs on the supervisor's asyncio loop, and
asks the driver for nothing, see `ublk/control.py`.
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
from ublkpool.daemon.processes.guarded_socket import GuardedSocket
from ublkpool.daemon.processes.held_names import client_name
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.open_files import is_open_elsewhere


class ClientContext(NamedTuple):
    """The area that the slices lie in, and the kernel's device that has it registered."""

    area: ClientArea
    kernel: BlockDevice


def rested(slices: Mapping[int, int]) -> list[int]:
    """The numbers of those slices, given with their descriptors, whose memory is open nowhere else."""
    return [number for number, fd in slices.items() if not is_open_elsewhere(fd)]


class Clients:
    """The slices of one device."""

    def __init__(self, name: str, holder: Holder, background: Background) -> None:
        """`name` is the device's.  Without slices until `begin` or `resume`."""
        self._name = name
        self._holder = holder
        self._background = background
        self._client_context: ClientContext | None = None
        self._lent: dict[int, socket.socket] = {}
        self._free: list[int] = []
        self._resting: set[int] = set()
        self._settling = self._look_again = False

    def begin(self, client_context: ClientContext) -> None:
        """The slices are new: no client has had one."""
        self._client_context = client_context
        self._free = sorted(client_context.area.files)

    def resume(self, client_context: ClientContext, held: Mapping[str, int]) -> None:
        """Go on with an earlier daemon's slices; one without a held connection rests, since it may have a client."""
        self._client_context = client_context
        for number in client_context.area.files:
            fd = held.get(client_name(self._name, number))
            if fd is None:
                self._resting.add(number)
            else:
                self._watch(number, GuardedSocket(socket.socket(fileno=os.dup(fd))))
        self._settle()

    def counts(self) -> tuple[int, int, int]:
        """Slices that are lent, resting and free."""
        return len(self._lent), len(self._resting), len(self._free)

    def names(self) -> list[str]:
        """The processes that have a slice, in words."""
        return [f"client process {peer_of(sock).pid}" for sock in self._lent.values()]

    def lend(self, sock: socket.socket) -> int | None:
        """The number of a slice for the client at this connection, whose socket is taken over; None if none is free.

        The caller puts `ClientArea.users`, which has the slice's user then, on record before the client has the slice.
        """
        number = self._choose(peer_of(sock).uid)
        if number is None:
            self._settle()
            return None
        self._watch(number, sock)
        self._free.remove(number)
        return number

    def take_back(self, sock: socket.socket) -> None:
        """The slice of this connection was not handed out after all: it is free, and the socket is the caller's.

        The slice keeps its user.
        """
        number = next(each for each, lent in self._lent.items() if lent is sock)
        del self._lent[number]
        asyncio.get_running_loop().remove_reader(sock)
        self._holder.drop(client_name(self._name, number))
        self._free = sorted({*self._free, number})

    def _choose(self, user: int) -> int | None:
        """A free slice that clients of this user had, else one that no client has had."""
        if self._client_context is None:
            return None
        users = self._client_context.area.users
        fitting = [number for number in self._free if users.get(number, user) == user]
        number = min(fitting, key=lambda each: (each not in users, each), default=None)
        if number is not None:
            users[number] = user
        return number

    def close(self) -> None:
        """The device ends; clients keep the memory that they have mapped."""
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
        """The connection has ended, or the client sent something, which ends the lease as well."""
        with suppress(BlockingIOError, ConnectionError):
            self._lent[number].recv(1)
        self._unwatch(number)
        self._resting.add(number)
        self._settle()

    def _settle(self) -> None:
        # A slice that comes to rest during a scan was not covered by it: scan again.
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
                    # Not earlier: a process that has the memory open can still begin requests in it.
                    if numbers:
                        await self._pass_requests(client_context)
                    self._give_back(numbers)
        finally:
            self._settling = False

    async def _pass_requests(self, client_context: ClientContext) -> None:
        try:
            await client_context.kernel.pass_requests()
        except DaemonError:
            # A device that was removed meanwhile has no request left.
            if self._client_context is not None:
                raise

    def _lendable(self, area: ClientArea) -> dict[int, int]:
        """The resting slices whose user is known: only these may be lent again."""
        users = area.users
        return {n: area.files[n] for n in self._resting if users.get(n) != USER_UNKNOWN}

    def _give_back(self, numbers: Collection[int]) -> None:
        back = self._resting.intersection(numbers)
        self._resting -= back
        self._free = sorted({*self._free, *back})
