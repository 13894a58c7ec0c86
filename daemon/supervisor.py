"""All devices of the daemon: what the admin socket asks for, and where backends attach.

Owns the table of devices.  `lifetime.py` starts and ends it; never in the data path.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from ublkpool import __version__
from ublkpool.bufpool import wire
from ublkpool.daemon import notify
from ublkpool.daemon.admin.measure import device_stats
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.binding import Binding
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.prepared import RESERVED, is_reserved
from ublkpool.daemon.device.table import DeviceTable
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events.kinds import BrokerReplaced, MachineGoesDown, StoreRebound
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.going_down import GoingDown
from ublkpool.daemon.kernel.disk_parameters import refusal_of
from ublkpool.daemon.lost_devices import LostDevices
from ublkpool.daemon.prepared_stock import PreparedStock
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.metrics_process import MetricsProcess
from ublkpool.daemon.reload import Reload
from ublkpool.daemon.settings.changes import Scalar
from ublkpool.daemon.settings.config import DeviceConfig, ServeConfig
from ublkpool.daemon.settings.user_devices import NO_DRAIN, NOTE, fitted
from ublkpool.daemon.status import (
    DaemonStatus,
    DeviceStats,
    DeviceStatus,
    ProcessStatus,
    Reloaded,
    ResizeResult,
    Setting,
)
from ublkpool.daemon.takeover import TakeOver

_log = logging.getLogger("ublkpool.supervisor")
_Names = list[str]
LOOKED_AT_ONCE_MAX = 8
"""Devices whose users are looked for at the same time: a look reads what every process of the machine has open."""


class Supervisor:
    """The devices of one daemon: what the admin socket asks for, and where backends attach."""

    def __init__(
        self,
        context: DaemonContext,
        background: Background,
        config: ServeConfig | None = None,
    ) -> None:
        """`background` ends with the daemon."""
        self._context = context
        self._background = background
        self._table = DeviceTable(
            lambda cfg: Device(cfg, context, self.prepared.take),
            self._tell_status,
            context.events,
            self._refusal,
        )
        context.budget.devices = self._table.devices
        prepare = config.prepare if config is not None else None
        if prepare is not None and not context.is_privileged:
            _log.warning("no devices are prepared: the driver gives an ordinary user's daemon few")
            prepare = None
        self.prepared = PreparedStock(context, prepare, self._table.running_adds)
        self.config_file = Reload(config or ServeConfig(), context, self._table)
        self.lost = LostDevices(context, self._marks)
        self.stopped = asyncio.Event()
        self.metrics: MetricsProcess | None = None
        """None where no metrics are served."""
        self.leaves = False
        self.ends = False
        """Whether the devices end with the daemon, whatever `on_stop` says."""
        self._is_going_down = False
        self._is_ready = False

    def _refusal(self, cfg: DeviceConfig) -> str:
        if is_reserved(cfg.name):
            return f"names that begin with {RESERVED} are those of prepared devices: choose another"
        # It is in the table when the stock comes to look.
        self.prepared.look()
        # Before a backend or an engine is asked for the store, which makes a file that is not there.
        context = self._context
        return refusal_of(cfg, context.offered, context.is_privileged) or context.budget.refusal_of(cfg)

    def _marks(self) -> set[int]:
        return {each.mark for each in self._table.devices()} | self.prepared.marks

    def ready(self) -> None:
        """Tell the service manager that the daemon serves, and from now on which devices do not."""
        self._is_ready = True
        notify.ready(self._status())

    def _tell_status(self) -> None:
        # The text is about all devices, and each has several changes in its start.
        if self._is_ready and notify.is_heard():
            notify.status(self._status())

    def _status(self) -> str:
        devices = [(each.config.name, each.shown) for each in self._table.devices()]
        return "; ".join(filter(None, (notify.describe(devices), self.config_file.problem)))

    async def add(
        self, cfg: DeviceConfig, progress: Callable[[str], None], take_over: bool = False
    ) -> DeviceStatus:
        """Create a device; one with a backend of the daemon's is live at the return.

        A failed device of that name is made again, and its backend finds what the one before kept.  With `take_over`
        its backend breaks its store's lock, no matter which client holds it.  Raises `DaemonError`, and
        leaves nothing then.
        """
        if not self._context.is_privileged:
            cfg = fitted(cfg)
            progress(f"{cfg.name}: {NOTE}")
            _log.info("%s: %s", cfg.name, NOTE)
        if not take_over:
            return (await self._table.add(cfg, progress)).status()
        binding = self._binding(cfg.name)
        await binding.take_over(True)
        try:
            return (await self._table.add(cfg, progress)).status()
        except BaseException:
            # A later add must not break a lock without the operator's word.
            await asyncio.shield(binding.take_over(False))
            raise

    def add_configured(self, devices: Sequence[DeviceConfig], were_there: bool = False) -> None:
        """Add the config's devices side by side, without waiting; a failed one stays in the list with its reason.

        Those that `were_there` under the daemon before this one are added whatever the budget of memory is.
        """
        for cfg in devices:
            if cfg.name not in self._table:
                self._table.add_configured(cfg, _log.info, were_there)

    def take_over(self, left: TakeOver) -> Sequence["asyncio.Task[None]"]:
        """Take over every device of an earlier daemon, side by side."""
        self.prepared.begin(left.prepared, left.remove_prepared)
        return [self._table.take_over(record, partial(left.device, record)) for record in left.records]

    async def delete(self, names: _Names | None, force: bool, *, forget: bool = True) -> Sequence[str]:
        """Delete these devices, or all, and forget their stores; returns the names.

        Raises `DaemonError` if one does not exist or is in use; then all stay.
        """
        if names is not None and await self._delete_lost(names, force):
            return names
        wanted = [each.config.name for each in self._table.devices()] if names is None else names
        for name in wanted:
            self._check_known(name)
        # A client may name a device twice.
        devices = {name: self._table.device(name) for name in wanted if name in self._table}
        if not force and len(devices) > 1:
            await _check_all_unused(list(devices.values()))
        gone: _Names = []
        for name in dict.fromkeys(wanted):
            try:
                await self._delete_one(name, force, forget=forget, is_known=name in devices)
            except DaemonError as error:
                if gone:
                    # The same error, so that it keeps its class and its code.
                    error.args = (f"{error} (deleted before that: {', '.join(gone)})",)
                raise
            gone.append(name)
        return wanted

    async def _delete_lost(self, names: _Names, force: bool) -> bool:
        """Whether the only name is that of a kernel device on no record; it is deleted then.  Raises `DaemonError`."""
        if len(names) != 1 or names[0] in self._table or (left := await self.lost.record(names[0])) is None:
            return False
        await self._table.delete_lost(left, force)
        return True

    async def _delete_one(self, name: str, force: bool, *, forget: bool, is_known: bool) -> None:
        # Another client may have removed the device meanwhile.
        if name in self._table:
            await self._table.delete(name, force, forget=forget)
        elif forget and not is_known:
            await self._binding(name).forget(lambda: name in self._table)

    async def rebind(self, name: str) -> None:
        """Make the next store that attaches this name's.  Raises `DaemonError` for a name without device and store."""
        self._check_known(name)
        if name in self._table:
            await self._table.device(name).rebind()
        else:
            await self._binding(name).rebind()
        text = "the next store that attaches becomes its own"
        self.events.record(StoreRebound(), text, device=name)

    @property
    def events(self) -> Events:
        """What happens to the daemon and to its devices."""
        return self._context.events

    async def resize(self, name: str, size_bytes: int, is_relative: bool) -> ResizeResult:
        """Give a live device this size, or that many bytes more.  Raises `DaemonError` that says why not."""
        return await self._table.device(name).resize(size_bytes, is_relative)

    def _check_known(self, name: str) -> None:
        """Raise `DaemonError` for an unknown name.  After a refused add a name has a store and no device."""
        if not self._context.states.knows(name):
            self._table.device(name)

    def _binding(self, name: str) -> Binding:
        return Binding(name, self._context.states, self._context.boot_id)

    async def set(self, name: str, values: Mapping[str, Scalar]) -> Sequence[Setting]:
        """Change settings of a device, all or none; all of its settings then.  Raises `DaemonError`, `OSError`."""
        device = self._table.device(name)
        if values:
            await device.set(values)
        return device.settings()

    async def reload(self) -> Sequence[Reloaded]:
        """Read the config file again.  Raises `ConfigError`, `DaemonError`; then nothing has changed."""
        notify.reloading()
        try:
            return await self.config_file.reload()
        finally:
            self.prepared.look()
            if self._is_ready:
                notify.ready(self._status())

    def reload_soon(self) -> None:
        """SIGHUP: the same, with the result in the log."""

        async def reload() -> None:
            # The reason is in the log already.
            with suppress(DaemonError):
                await self.reload()

        self._background.spawn(reload())

    async def drain(self, name: str, flush: bool, timeout_s: float | None) -> None:
        """See `drain.drain`.  Raises `DaemonError`, `OSError`."""
        device = self._table.device(name)
        if self._is_going_down:
            raise DaemonError(f"{name}: the machine goes down, so its requests must not wait")
        if not self._context.is_privileged:
            raise DaemonError(f"{name}: {NO_DRAIN}")
        await device.drain(flush, timeout_s)

    async def resume(self, name: str) -> None:
        """See `drain.resume`.  Raises `DaemonError`, `OSError`."""
        await self._table.device(name).resume()

    async def wait_live(self, name: str, timeout_s: float | None) -> DeviceStatus:
        """Return when the device is live.  Raises `DaemonError` if it fails, or is not live after `timeout_s`."""
        try:
            device = await asyncio.wait_for(self._table.live(name), timeout_s)
        except TimeoutError:
            device = self._table.device(name)
            why = f": {device.trouble}" if device.trouble else ""
            text = f"{name}: still {device.shown} after {timeout_s:g} s{why}"
            raise DaemonError(text, code="timeout") from None
        return device.status()

    def list(self) -> Sequence[DeviceStatus]:
        """All devices."""
        return [device.status() for device in self._table.devices()]

    def daemon(self) -> DaemonStatus:
        """The version, and the processes that belong to no device."""
        context, metrics = self._context, self.metrics
        template = context.worker_template
        found = (
            ("supervisor", os.getpid()),
            ("broker", context.broker.child.pid if context.broker.is_started else None),
            ("holder", context.holder.pid or None),
            ("worker-template", template.pid if template is not None else None),
            ("metrics", metrics.pid if metrics is not None else None),
        )
        return DaemonStatus(
            version=__version__,
            processes=tuple(ProcessStatus(role=role, pid=pid) for role, pid in found if pid is not None),
            memory_bytes=context.budget.used_bytes,
            memory_max_bytes=context.budget.max_bytes,
            prepared=self.prepared.ready_count,
            prepared_wanted=self.prepared.wanted_count,
        )

    def tell_memory(self) -> None:
        """Log that the devices have more memory than the budget, if they have."""
        if excess := self._context.budget.excess:
            _log.warning("%s", excess)

    def stats(self, name: str | None) -> Sequence[DeviceStats]:
        """The numbers of one device, or of all."""
        devices = self._table.devices() if name is None else [self._table.device(name)]
        return [device_stats(device) for device in devices]

    async def stop(self, leave: bool) -> None:
        """End the daemon, and its devices unless it is to leave them."""
        self.leaves = self.leaves or leave
        self.end()

    def end(self) -> None:
        """Refuse every add from now on, and undo those that are under way."""
        self.stopped.set()
        self._table.close()

    async def shut_down(self, final: bool) -> None:
        """The machine goes down: no device waits for a backend any more; with `final` devices and daemon end."""
        if not self._is_going_down:
            self._is_going_down = True
            self.events.tell(_log, MachineGoesDown(), "the machine goes down")
            watch = GoingDown(self._table.devices, asyncio.get_running_loop().time)
            self._background.spawn(watch.watch())
            for device in self._table.devices():
                self._background.spawn(self._end_drain(device.name))
        if final:
            self.ends = True
            await self.delete_all()
            self.end()

    async def _end_drain(self, name: str) -> None:
        """See `DeviceService.end_drain`; a device that is being taken over is resumed after that."""
        if (device := await self._table.at_rest(name)) is not None:
            await device.end_drain()

    async def settled(self) -> None:
        """Return when no task changes a device, and the holder has what the next daemon needs."""
        await self._table.settled()
        await self._context.holder.settled()

    async def renew(self, names: _Names) -> None:
        """Replace the processes that run an earlier version: broker, holder, then these devices' workers in turn."""
        await self._context.broker.renew()
        self._context.holder.renew()
        for name in names:
            if name in self._table:
                await self._table.device(name).renew()

    def describe(self, name: str) -> wire.Described:
        """What a backend may know before it attaches.  Raises `DaemonError` for an unknown device."""
        return self._table.device(name).describe()

    async def admit(self, session: Session) -> None:
        """Bring a backend to its device.  Raises `DaemonError` for an unknown device, else see `Device.attach`."""
        await self._table.device(session.attach.device).attach(session)

    def note_refusal(self, name: str, reason: str) -> None:
        """A backend for this device was refused; harmless for an unknown device."""
        if name in self._table:
            self._table.device(name).note_refusal(reason)

    def lend_buffer(self, name: str, sock: socket.socket) -> tuple[wire.BufferLeased, int | None]:
        """Memory for a client's I/O.  Raises `DaemonError` if the device is unknown or has no disk."""
        return self._table.device(name).lend_buffer(sock)

    async def broker_restarted(self) -> None:
        """Tell a new broker about every device."""
        broker = self._context.broker
        replaced = BrokerReplaced(pid=broker.child.pid, reason=broker.last_end)
        text = f"another pool broker runs (process {broker.child.pid}), since the one before ended: {broker.last_end}"
        self.events.record(replaced, text, severity="info" if broker.was_replaced else None)
        for device in self._table.devices():
            await device.broker_restarted()
        await self.prepared.broker_restarted()

    async def delete_all(self) -> None:
        """At the daemon's end: remove every device, in use or not; one that stays is left to the next daemon."""
        await self._table.delete_all()


async def _check_all_unused(devices: Sequence[Device]) -> None:
    """Raise `DaemonError` that names the users of every one of these devices that is in use."""
    turns = asyncio.Semaphore(LOOKED_AT_ONCE_MAX)

    async def check(device: Device) -> None:
        async with turns:
            await device.check_unused()

    found = await asyncio.gather(*map(check, devices), return_exceptions=True)
    refusals = [each for each in found if isinstance(each, DaemonError)]
    for each in found:
        if isinstance(each, BaseException) and not isinstance(each, DaemonError):
            raise each
    if refusals:
        is_in_use = all(each.code == "in-use" for each in refusals)
        text = f"nothing was deleted: {'; '.join(map(str, refusals))}"
        raise DaemonError(text, code="in-use" if is_in_use else "")
