"""Taking over, at a daemon's start, what an earlier daemon left in its run directory.

Owns the choice, by the records, of the processes that go on; the others end before a new process listens where they
did.  Runs once, on the supervisor's asyncio loop.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool.arena import arena_prefix, list_orphans, unlink_arena
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.prepared import is_reserved
from ublkpool.daemon.device.records import Record, end_brokers, end_left
from ublkpool.daemon.device.succession import may_go_on
from ublkpool.daemon.errors import DaemonError, is_shortage, one_line
from ublkpool.daemon.events.kinds import TakeoverEnded
from ublkpool.daemon.processes.broker_process import EARLIER_HELD, HELD, HELD_PROCESS
from ublkpool.daemon.processes.left_behind import Process, is_alive, kill_process, user_of

SHORTAGE_PAUSE_S = 1.0
CLEAR_PAUSE_S = 0.5
NAMES_MAX = 50
"""In an event."""
_log = logging.getLogger("ublkpool.takeover")


class TakeOver:
    """What an earlier daemon left."""

    def __init__(
        self,
        context: DaemonContext,
        left: Sequence[Record],
        held: Mapping[str, int],
        configured: Collection[str],
    ) -> None:
        """`held` are the holder's descriptors; devices in `configured` are added anew if the kernel has lost them."""
        self._context = context
        self._configured = configured
        self.records = [each for each in left if not is_reserved(each.config.name)]
        owned = {each.device_mark for each in self.records}
        self._given = [each for each in left if is_reserved(each.config.name) and each.device_mark in owned]
        """Prepared devices that a device had just taken: what is left of them is on that device's record, too."""
        self.prepared = [each for each in left if each not in self.records and each not in self._given]
        """Prepared devices, which are removed."""
        self._held = dict(held)
        self._broker_socket = held.get(HELD, held.get(EARLIER_HELD))
        self._said: dict[str, str] = {}
        self._going_on = [record for record in left if may_go_on(record, held)]
        self.gone: list[str] = []
        """The devices that are not taken over, since the kernel has lost them or the config adds them anew."""
        self.adopted: list[str] = []
        """The devices that go on as they were."""
        self.recovered: list[str] = []
        self.outdated: list[str] = []
        """The devices that go on with workers of another version of the code, or of another user."""

    async def clear(self) -> None:
        """Remove what belongs to no recorded device, and adopt or start a broker.

        Raises `PoolError`, `DaemonError`, `OSError`.
        """
        context, brokers = self._context, self._brokers()
        for record in self._given:
            context.holder.drop(record.config.name)
            context.records.forget(record.config.name)
        # A new broker will listen where the old one does.
        await end_brokers([*self.records, *self.prepared], brokers)
        numbers = [each.device_number for each in self.records if each.device_number is not None]
        self._remove_sockets(lambda number: number not in numbers)
        spared = {arena_prefix(context.instance, number) for number in numbers}
        for prefix in list_orphans(context.instance):
            if prefix not in spared:
                self._remove_pool(prefix)
        for broker in brokers:
            assert self._broker_socket is not None
            if await context.broker.adopt(broker.pid, socket.socket(fileno=os.dup(self._broker_socket))):
                known = [each.device_number for each in self._going_on if each.device_number is not None]
                await context.broker.forget_all_but(known)
                return
        if (pidfd := self._held.get(HELD_PROCESS)) is not None:
            # It may be on no record, if that daemon had just started it: two brokers would grant the same buffers.
            await kill_process("an earlier daemon's pool broker", pidfd)
        context.broker.start()

    async def device(self, record: Record, show: Callable[[Device], None]) -> bool:
        """Take over one device; whether it exists then.  `show` is told each `Device` that stands for it.

        Raises `DaemonError`, `PoolError`, `OSError`; then the kernel may or may not have it.
        """
        device = self._new_device(record, show)
        if record in self._going_on:
            while (failure := await self._goes_on(device, record)) is not None:
                # Replaced without an await, so that a caller that waits for the device goes on waiting for the new one.
                device.abandon()
                device = self._new_device(record, show)
                if not await self._may_pass(record, failure):
                    break
            else:
                self.adopted.append(record.config.name)
                return True
            # If the broker has just died its successor never knew the device.
            with suppress(PoolError):
                await self._context.broker.forget(record.device_number)
        await self._clear_away(record)
        # The next daemon must not take a dead process's socket for its successor's.
        self._context.holder.drop(record.config.name)
        there = await device.recover_left(record, self._held)
        if not there or (record.device_number is None and record.config.name in self._configured):
            self.gone.append(record.config.name)
            return False
        device.save_or_retry()
        if device.state != "failed" and record.device_number is not None:
            self.recovered.append(record.config.name)
        return True

    async def remove_prepared(self, record: Record) -> None:
        """Remove a prepared device.  Raises `DaemonError`, `PoolError`, `OSError`; then its record stays."""
        await self._clear_away(record)
        self._context.holder.drop(record.config.name)
        device = Device(record.config, self._context)
        device.await_takeover(record)
        await device.recover_left(record, self._held)

    def tell_end(self, seconds: float) -> None:
        """Every device was taken over or given up, after `seconds`."""
        names = [each.config.name for each in self.records]
        failed = [each for each in names if each not in (*self.adopted, *self.recovered, *self.gone)]
        text = f"took over: {len(self.adopted)} go on, {len(self.recovered)} recovered, {len(failed)} failed"
        ended = TakeoverEnded(
            adopted=tuple(self.adopted[:NAMES_MAX]),
            recovered=tuple(self.recovered[:NAMES_MAX]),
            failed=tuple(failed[:NAMES_MAX]),
            adopted_count=len(self.adopted),
            recovered_count=len(self.recovered),
            failed_count=len(failed),
            seconds=round(seconds, 3),
        )
        self._context.events.record(ended, text, severity="warning" if failed else "info")

    def close(self) -> None:
        """Close the descriptors of the earlier daemon, once every device was taken over or given up."""
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()

    async def _goes_on(self, device: Device, record: Record) -> Exception | None:
        """Go on with the device as it is; the failure if that cannot be."""
        try:
            await device.go_on(record, self._held)
        except Exception as error:
            # Every exception: a nonsensical record may raise any, and recovery relies on less of the record.
            return error
        if record.build != self._context.build or not self._has_account(record):
            self.outdated.append(record.config.name)
        return None

    def _has_account(self, record: Record) -> bool:
        """Whether its workers are of the user that this daemon's are."""
        account = self._context.account
        workers = [each for each in record.processes if each.role == "worker"]
        return account is None or all(user_of(each.pid) in (account.user, None) for each in workers)

    async def _may_pass(self, record: Record, failure: Exception) -> bool:
        """Return after a pause if going on may succeed later; its workers serve meanwhile.

        A lack of descriptors, processes or memory is no reason to end workers that serve: recovery needs more of them.
        """
        name, reason = record.config.name, one_line(failure)
        if not is_shortage(failure) or not self._still_serves(record):
            _log.warning("%s: cannot go on as it is: %s", name, reason)
            return False
        if self._said.get(name) != reason:
            self._said[name] = reason
            _log.error("%s: cannot be taken over yet, its workers go on: %s; trying again", name, reason)
        await asyncio.sleep(SHORTAGE_PAUSE_S)
        return True

    def _still_serves(self, record: Record) -> bool:
        try:
            return may_go_on(record, self._held)
        except OSError:
            # It cannot be told for want of a descriptor: the processes are not ended for that.
            return True

    def _new_device(self, record: Record, show: Callable[[Device], None]) -> Device:
        device = Device(record.config, self._context)
        device.await_takeover(record)
        show(device)
        return device

    async def _clear_away(self, record: Record) -> None:
        """End the device's processes, however long one waits in the kernel; then remove the pool that they map."""
        spared = [each for each in record.processes if each.role == "broker"]
        said = ""
        while True:
            try:
                await end_left([record], spared)
                break
            except DaemonError as error:
                # The process may still write to the store: its successor must not start before its end.
                if str(error) != said:
                    said = str(error)
                    _log.error("%s: %s; waiting for its end", record.config.name, said)
                await asyncio.sleep(CLEAR_PAUSE_S)
        if record.device_number is not None:
            self._remove_sockets(lambda number: number == record.device_number)
            self._remove_pool(arena_prefix(self._context.instance, record.device_number))

    def _brokers(self) -> list[Process]:
        """The broker of the devices that go on, if it is one, lives and can be reached."""
        known = {_broker_of(record) for record in self._going_on}
        if self._broker_socket is None or len(known) != 1:
            return []
        return [each for each in known if each is not None and is_alive(each)]

    def _remove_sockets(self, is_gone: Callable[[int], bool]) -> None:
        for path in self._context.queue_dir.iterdir():
            number = path.name.partition(".")[0]
            # A worker's socket is named NUMBER.QUEUE; other files and directories stay.
            if number.isdecimal() and is_gone(int(number)) and not path.is_dir():
                path.unlink()

    def _remove_pool(self, prefix: str) -> None:
        if prefix in list_orphans(self._context.instance):
            _log.info("removing the pool %s that an earlier daemon left", prefix)
            unlink_arena(prefix)


def _broker_of(record: Record) -> Process | None:
    """The broker that knows of this device; None if none did when the record was written."""
    return next((each for each in record.processes if each.role == "broker"), None)
