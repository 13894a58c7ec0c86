"""The devices of one daemon by name, and the task that changes each.

Owns that one task at a time makes, takes over or removes the device of a name.  Requests for one name may come in any
order and at once; each ends with a listed device or with a free name.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.errors import DaemonError, one_line, without_name
from ublkpool.daemon.events.kinds import DeviceAdded, DeviceDeleted
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.settings.config import DeviceConfig

DELETE_DEADLINE_S = 100.0
"""For one device at the daemon's end: a service manager kills the daemon after 120 s."""
DELETED_AT_ONCE_MAX = 64
"""Devices at the daemon's end: each needs a few processes, whose number must not grow with the devices."""
_log = logging.getLogger("ublkpool.supervisor")
Show = Callable[[Device], None]
"""Takes the device that stands for the name from now on."""


class _Entry:
    """A name: its device, and the tasks that make and remove it."""

    def __init__(self, device: Device, before: Device | None = None) -> None:
        self.device = device
        self.before = before
        """The failed device that this one replaces."""
        self.making: asyncio.Task[None] | None = None
        self.has_begun = self.has_made = self.is_undoing = self.is_taken_over = False
        self.forgets = False
        """Whether the name may have another store when the device is gone."""
        self.removing: asyncio.Task[None] | None = None

    @property
    def is_free(self) -> bool:
        """Whether no task makes or removes the device."""
        return not any(task is not None and not task.done() for task in (self.making, self.removing))

    def begin(self) -> None:
        """The making task's first step.  Raises `CancelledError` if the add has been given up."""
        self.has_begun = True
        if self.is_undoing:
            raise asyncio.CancelledError

    def stop_making(self) -> None:
        """Have the making task give up and undo, once: a second cancellation would interrupt the undoing."""
        if self.making is not None and not self.making.done() and not self.is_undoing:
            self.is_undoing = True
            # A task that is cancelled before its first step runs none of its code, so it would undo nothing.
            if self.has_begun:
                self.making.cancel()


class DeviceTable:
    """The devices by name."""

    def __init__(
        self,
        make: Callable[[DeviceConfig], Device],
        changed: Callable[[], None],
        events: Events | None = None,
        refusal: Callable[[DeviceConfig], str] = lambda _: "",
    ) -> None:
        """`make` makes a device that runs nothing yet; `changed` is called at each new, removed or changed device;
        `refusal` says why a new device cannot be made, or nothing.
        """
        self._make = make
        self._changed = changed
        self._events = events or Events()
        self._refusal = refusal
        self._entries: dict[str, _Entry] = {}
        self._background = Background("device table")
        self._closed = False

    def devices(self) -> Sequence[Device]:
        """All devices, including those that are being made or removed."""
        return [entry.device for entry in self._entries.values()]

    def device(self, name: str) -> Device:
        """The device of this name.  Raises `DaemonError` for an unknown name."""
        return self._entry(name).device

    async def live(self, name: str) -> Device:
        """The device of this name, when it is live.  Raises `DaemonError` with the reason if it fails first."""
        while True:
            device = self.device(name)
            try:
                await device.live()
                return device
            except DaemonError:
                entry = self._entries.get(name)
                # Only a takeover replaces the `Device` of a name, and then the wait goes on.
                if entry is None or entry.device is device or not entry.is_taken_over:
                    raise

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def close(self) -> None:
        """Refuse every add from now on, and undo those that are under way."""
        self._closed = True
        for entry in self._entries.values():
            if not entry.is_taken_over:
                entry.stop_making()

    async def add(self, cfg: DeviceConfig, progress: Callable[[str], None]) -> Device:
        """Make a device; one with a backend of the daemon's is live at the return.  A failed device is made again.

        Raises `DaemonError` and leaves the name as it was, also if the device is deleted meanwhile.  If the caller is
        cancelled, the add is undone.
        """
        before = self._replaceable(cfg.name)
        if reason := self._refusal(cfg):
            raise DaemonError(f"{cfg.name}: {reason}")
        entry = self._begin(cfg, progress, before, keeps_failed=False)
        making = entry.making
        assert making is not None
        try:
            await asyncio.shield(making)
        except asyncio.CancelledError:
            if making.cancelled():
                raise DaemonError(f"{cfg.name}: deleted while it was being added") from None
            entry.stop_making()
            raise
        return entry.device

    def add_configured(
        self, cfg: DeviceConfig, progress: Callable[[str], None], was_there: bool = False
    ) -> str:
        """The same without waiting; a device that cannot start stays in the list, failed, with its reason.

        Returns why the device is not even tried; empty if it is being made.  One that `was_there` under the daemon
        before this one is always tried.
        """
        before = self._replaceable(cfg.name)
        if not was_there and (reason := self._refusal(cfg)):
            _log.error("device %s of the config: %s", cfg.name, reason)
            entry = self._entries.get(cfg.name) or self._enter(cfg, None)
            if not entry.has_made:
                entry.device.note_failure(reason)
                self._changed()
            return reason
        self._begin(cfg, progress, before, keeps_failed=True)
        return ""

    def take_over(self, left: Record, work: Callable[[Show], Awaitable[bool]]) -> "asyncio.Task[None]":
        """Have `work` take over what an earlier daemon left of this device; its result says whether a device is left.

        A device that cannot be taken over stays in the list, failed, with its reason.
        """
        entry = self._enter(left.config, None)
        entry.is_taken_over = True
        entry.device.await_takeover(left)
        entry.making = self._background.spawn(self._take_over(entry, work))
        return entry.making

    async def delete(self, name: str, force: bool, forget: bool = False) -> None:
        """Remove the device; return when the name is free.  Raises `DaemonError` if it is in use and not forced.

        With `forget` the name may have another store from now on.  An add that is under way is given up.  Several
        callers wait for the same removal.
        """
        entry = self._entry(name)
        entry.forgets |= forget
        while self._entries.get(name) is entry:
            if entry.making is not None and not entry.making.done():
                if entry.is_taken_over and not force:
                    # A takeover that is given up leaves the disk without workers: not if the disk is in use.
                    await entry.device.check_unused()
                entry.stop_making()
                await asyncio.wait({entry.making})
                continue
            if entry.removing is not None and not entry.removing.done():
                # A failure is raised to the removal's own caller; this caller then tries again.
                await asyncio.wait({entry.removing})
                continue
            entry.removing = self._background.spawn_awaited(self._remove(entry, force))
            await asyncio.shield(entry.removing)

    async def delete_lost(self, left: Record, force: bool) -> None:
        """Remove a kernel device that is on no record, which has a name only until this returns.

        Raises `DaemonError` if it is in use and not forced, or if the name is another device's.
        """
        name = left.config.name
        self._replaceable(name)
        entry = self._enter(left.config, None)
        entry.device.await_takeover(left)
        entry.device.note_failure("on no record")
        try:
            await self.delete(name, force)
        finally:
            if self._entries.get(name) is entry and entry.is_free:
                # At the daemon's end its own devices are deleted, and this may be another daemon's.
                del self._entries[name]
                self._changed()

    async def delete_all(self) -> bool:
        """At the daemon's end: remove every device, in use or not, side by side; whether all have gone."""
        self.close()
        names, turns = list(self._entries), asyncio.Semaphore(DELETED_AT_ONCE_MAX)
        return all(await asyncio.gather(*(self._delete_at_end(name, turns) for name in names)))

    async def at_rest(self, name: str) -> Device | None:
        """The device of this name when no task makes, takes over or removes it; None if there is none then."""
        while (entry := self._entries.get(name)) is not None and (busy := _running(entry)):
            await asyncio.wait(busy)
        return None if entry is None else entry.device

    def running_adds(self) -> list["asyncio.Task[None]"]:
        """The tasks that make or take over a device now."""
        making = [each.making for each in self._entries.values()]
        return [each for each in making if each is not None and not each.done()]

    async def settled(self) -> None:
        """Return when no task changes a device."""
        while busy := [each for entry in self._entries.values() for each in _running(entry)]:
            await asyncio.wait(busy)
        await asyncio.gather(*(device.settled() for device in self.devices()))

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            known = ", ".join(self._entries) or "none"
            raise DaemonError(f"no device {name!r}; there is {known}", code="no-device")
        return self._entries[name]

    def _begin(
        self, cfg: DeviceConfig, progress: Callable[[str], None], before: Device | None, keeps_failed: bool
    ) -> _Entry:
        entry = self._enter(cfg, before)
        kind = cfg.backend.kind if cfg.backend else ""
        text = f"added, {f'backend {kind}' if kind else 'without a backend of the daemon'}"
        self._events.record(DeviceAdded(backend=kind, queues=cfg.queues), text, device=cfg.name)
        entry.making = self._background.spawn_awaited(self._add(entry, cfg, progress, keeps_failed))
        return entry

    def _replaceable(self, name: str) -> Device | None:
        """The failed device of this name, None if the name is free.  Raises `DaemonError` otherwise."""
        if self._closed:
            raise DaemonError("the daemon is stopping", code="stopping")
        entry = self._entries.get(name)
        if entry is None:
            return None
        if entry.removing is not None and not entry.removing.done():
            raise DaemonError(f"device {name} is being deleted: try again when it is gone", code="exists")
        if entry.device.state != "failed" or not entry.is_free:
            raise DaemonError(
                f"device {name} exists already: choose another name, or delete it", code="exists"
            )
        return entry.device

    def _enter(self, cfg: DeviceConfig, before: Device | None) -> _Entry:
        entry = self._entries[cfg.name] = _Entry(self._make(cfg), before)
        entry.device.on_change(self._changed)
        self._changed()
        return entry

    async def _add(
        self, entry: _Entry, cfg: DeviceConfig, progress: Callable[[str], None], keeps_failed: bool
    ) -> None:
        try:
            entry.begin()
            if entry.before is not None:
                await self._remove_failed(entry.before)
            entry.has_made = True
            entry.device.save()
            if not cfg.waits_for_backend:
                what = f"backend {cfg.backend.kind}" if cfg.backend else "its workers"
                progress(f"{cfg.name}: starting {what}")
                await entry.device.run()
        except BaseException as error:
            entry.is_undoing = True
            await self._undo(entry, error, keeps_failed and isinstance(error, Exception))
            if keeps_failed and isinstance(error, Exception):
                return
            raise
        finally:
            self._changed()

    async def _remove_failed(self, failed: Device) -> None:
        """Remove what the kernel still has of a failed device, before its successor's record replaces the one of it.

        What its backend kept stays for the successor.  Raises `DaemonError` if the kernel's device stays or is in use.
        """
        await failed.settled()
        try:
            await failed.delete(force=False, keep=True)
        except (DaemonError, OSError) as error:
            name = failed.config.name
            reason = without_name(name, one_line(error))
            raise DaemonError(f"{name}: the failed device of this name is still there: {reason}") from error

    async def _undo(self, entry: _Entry, error: BaseException, keeps_failed: bool) -> None:
        name, before = entry.device.config.name, entry.before
        if before is not None and not entry.has_made:
            # The record is still the failed device's, and perhaps its only trace.
            entry.device = before
            if keeps_failed:
                _log.error("device %s of the config: %s", name, without_name(name, one_line(error)))
            return
        try:
            keep = before is not None or keeps_failed
            await entry.device.delete(force=True, keep=keep, forget=entry.forgets)
        except Exception as leak:
            # The list shows the device with what is left of it, and `del` tries again.
            _log.error("%s: %s", name, without_name(name, one_line(leak)))
            entry.device.note_failure(one_line(leak))
            return
        if keeps_failed:
            _log.error("device %s of the config: %s", name, without_name(name, one_line(error)))
            entry.device.note_failure(one_line(error))
        elif before is not None:
            entry.device = before
        else:
            self._leave_out(name)

    async def _take_over(self, entry: _Entry, work: Callable[[Show], Awaitable[bool]]) -> None:
        name = entry.device.config.name

        def show(device: Device) -> None:
            device.on_change(self._changed)
            entry.device = device

        try:
            entry.begin()
            if not await work(show):
                self._leave_out(name)
        except asyncio.CancelledError:
            # A `del` comes next, and may be refused.
            entry.device.note_failure("left by an earlier daemon, and its takeover was given up")
            raise
        except Exception as error:
            reason = without_name(name, one_line(error))
            _log.error("%s: left by an earlier daemon: %s", name, reason)
            entry.device.note_failure(f"left by an earlier daemon: {reason}")
        finally:
            self._changed()

    async def _remove(self, entry: _Entry, force: bool) -> None:
        device = entry.device
        try:
            await self._delete(entry, force)
            if self._entries.get(device.config.name) is entry:
                self._leave_out(device.config.name)
        finally:
            self._changed()

    def _leave_out(self, name: str) -> None:
        """The device is off the list."""
        if self._entries.pop(name, None) is not None:
            self._events.record(DeviceDeleted(), "deleted", device=name)

    async def _delete(self, entry: _Entry, force: bool) -> None:
        try:
            await entry.device.delete(force, forget=entry.forgets)
        except BaseException:
            # The device stays, and so does its store.
            entry.forgets = False
            raise

    async def _delete_at_end(self, name: str, turns: asyncio.Semaphore) -> bool:
        entry = self._entries.get(name)
        try:
            async with turns, asyncio.timeout(DELETE_DEADLINE_S):
                if entry is not None and entry.is_free and (use := await entry.device.describe_use()):
                    _log.warning("%s is in use and goes all the same: %s", name, use)
                while name in self._entries:
                    await self.delete(name, force=True)
            return True
        except TimeoutError:
            _log.error("%s: not deleted after %.0f s: left to the next daemon", name, DELETE_DEADLINE_S)
        except Exception as error:
            _log.error("%s: %s", name, without_name(name, one_line(error)))
        return False


def _running(entry: _Entry) -> list["asyncio.Task[None]"]:
    return [task for task in (entry.making, entry.removing) if task is not None and not task.done()]
