"""Taking over, at the start of a daemon, what an earlier one in this run directory left.

Decides by the records which processes go on and ends the others, before anything new listens where they did.  Runs
once, on the supervisor's asyncio loop.
"""

import logging
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from ublkpool.bufpool.arena import arena_prefix, list_orphans, unlink_arena
from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon.broker_process import HELD
from ublkpool.daemon.device import Device
from ublkpool.daemon.errors import DaemonError, one_line, without_name
from ublkpool.daemon.records import Process, Record, end_left, is_alive
from ublkpool.daemon.succession import may_go_on
from ublkpool.daemon.surroundings import Surroundings

_log = logging.getLogger("ublkpool.takeover")


class TakeOver:
    """What was left, and what becomes of it."""

    def __init__(
        self,
        around: Surroundings,
        left: Sequence[Record],
        held: Mapping[str, int],
        configured: Collection[str],
    ) -> None:
        """`configured`: devices that the config names, which are added anew if the kernel does not have them."""
        self._around = around
        self._configured = configured
        self._left = left
        self._held = held
        self._going_on = [record for record in left if may_go_on(record, held)]
        self.outdated: list[str] = []
        """The devices that go on with workers of another version of the code."""

    async def clear(self) -> None:
        """End what cannot go on, and have a broker.  Raises `PoolError`, `OSError`."""
        around, brokers = self._around, self._brokers()
        spare = {each for record in self._going_on for each in record.processes}
        # Before a new broker listens where the old one did, and before pools go that old backends still look at.
        await end_left(self._left, [each for each in spare if each.role != "broker"] + brokers)
        numbers = [record.device_number for record in self._going_on if record.device_number is not None]
        self._remove_sockets(numbers)
        self._remove_pools(numbers)
        for broker in brokers:
            if await around.broker.adopt(broker.pid, socket.socket(fileno=os.dup(self._held[HELD]))):
                await around.broker.forget_all_but(numbers)
                return
        around.broker.start()

    async def devices(self, add: Callable[[Device], None]) -> None:
        """Every device of the earlier daemon's that is not cleared away goes to `add`."""
        for record in self._left:
            try:
                if device := await self._device(record):
                    add(device)
            except (DaemonError, PoolError, OSError) as error:
                name = record.config.name
                _log.error("%s: left by an earlier daemon: %s", name, without_name(name, one_line(error)))
        for fd in self._held.values():
            os.close(fd)

    async def _device(self, record: Record) -> Device | None:
        if record in self._going_on:
            device = Device(record.config, self._around)
            try:
                await device.go_on(record, self._held)
                if record.build != self._around.build:
                    self.outdated.append(record.config.name)
                return device
            except (DaemonError, PoolError, OSError) as error:
                _log.warning("%s: cannot go on as it is: %s", record.config.name, one_line(error))
                device.abandon()
                await self._give_up(record)
        # What led to the dead must not be taken for what leads to their successors.
        self._around.holder.drop(record.config.name)
        if record.device_number is None and record.config.name in self._configured:
            return None
        device = Device(record.config, self._around)
        return device if await device.recover_left(record, self._held) else None

    async def _give_up(self, record: Record) -> None:
        self._going_on.remove(record)
        await end_left([record], [each for each in record.processes if each.role == "broker"])
        numbers = [each.device_number for each in self._going_on if each.device_number is not None]
        self._remove_sockets(numbers)
        self._remove_pools(numbers)
        # One that has just died knows none of them, and its successor is not told.
        with suppress(PoolError):
            await self._around.broker.forget_all_but(numbers)

    def _brokers(self) -> list[Process]:
        """The broker that those who go on know, if it lives and can be reached."""
        known = {each for record in self._going_on for each in record.processes if each.role == "broker"}
        return [each for each in known if is_alive(each)] if HELD in self._held and len(known) == 1 else []

    def _remove_sockets(self, numbers: Sequence[int]) -> None:
        for path in self._around.queue_dir.iterdir():
            number = path.name.partition(".")[0]
            # What has another name is not a worker's socket.
            if number.isdecimal() and int(number) not in numbers:
                path.unlink()

    def _remove_pools(self, numbers: Sequence[int]) -> None:
        spared = {arena_prefix(self._around.instance, number) for number in numbers}
        for prefix in list_orphans(self._around.instance):
            if prefix not in spared:
                _log.info("removing the pool %s that an earlier daemon left", prefix)
                unlink_arena(prefix)
