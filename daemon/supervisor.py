"""The daemon: all devices, the broker, the sockets, from start to a clean end.

Owns the run directory and the order in which the daemon's parts start and stop.  One process, one thread, one asyncio
loop; never in the data path.  Signal handlers only set an event.
"""

import asyncio
import hashlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial

from ublkpool import __version__
from ublkpool.bufpool import wire
from ublkpool.daemon import notify
from ublkpool.daemon.admin.client import Client
from ublkpool.daemon.admin.measure import device_stats
from ublkpool.daemon.admin.server import AdminServer
from ublkpool.daemon.backends.attach import AttachServer
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.backends.template_process import BackendTemplate
from ublkpool.daemon.device.binding import Binding
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.records import Record, Records
from ublkpool.daemon.device.state import StateDirectory, candidates
from ublkpool.daemon.device.table import DeviceTable
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events.kinds import BrokerReplaced, CommandHung, MachineGoesDown, StoreRebound
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.events_kept import EventsKept
from ublkpool.daemon.going_down import GoingDown
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.lost_devices import LostDevices
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.beside import beside
from ublkpool.daemon.processes.broker_process import BrokerProcess
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.metrics_process import MetricsProcess, end_left
from ublkpool.daemon.processes.mounts import leave_for_own_view
from ublkpool.daemon.processes.patient_loop import PatientLoop
from ublkpool.daemon.processes.reserve import Reserve, raise_descriptor_limit
from ublkpool.daemon.reload import Reload
from ublkpool.daemon.replacement import check_before, check_sockets, group_number
from ublkpool.daemon.settings.changes import Scalar
from ublkpool.daemon.settings.config import DeviceConfig, ServeConfig
from ublkpool.daemon.settings.run_directory import RunDirectory, let_workers_connect
from ublkpool.daemon.settings.user_devices import NO_DRAIN, NOTE, all_fitted, fitted
from ublkpool.daemon.settings.worker_account import choose_account, wanted_accounts
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
from ublkpool.daemon.watchdog import period_us, petting
from ublkpool.ublk import control
from ublkpool.ublk.privilege import is_privileged
from ublkpool.workers.process import share_heap

SETTLE_DEADLINE_S = 60.0
TAKEOVER_PATIENCE_S = 10.0
"""How long READY waits for the takeover of an earlier daemon's devices, which rarely takes a second."""
_log = logging.getLogger("ublkpool.supervisor")
_Names = list[str]


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
            lambda cfg: Device(cfg, context), self._tell_status, context.events, context.budget.refusal_of
        )
        context.budget.devices = self._table.devices
        self.config_file = Reload(config or ServeConfig(), context, self._table)
        self.lost = LostDevices(context, lambda: {each.mark for each in self._table.devices()})
        self.stopped = asyncio.Event()
        self.metrics: MetricsProcess | None = None
        """None where no metrics are served."""
        self.leaves = False
        self.ends = False
        """Whether the devices end with the daemon, whatever `on_stop` says."""
        self._is_going_down = False
        self._is_ready = False

    def ready(self) -> None:
        """Tell the service manager that the daemon serves, and from now on which devices do not."""
        self._is_ready = True
        notify.ready(self._status())

    def _tell_status(self) -> None:
        if self._is_ready:
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
        found = (
            ("supervisor", os.getpid()),
            ("broker", context.broker.child.pid if context.broker.is_started else None),
            ("holder", context.holder.pid or None),
            ("metrics", metrics.pid if metrics is not None else None),
        )
        return DaemonStatus(
            version=__version__,
            processes=tuple(ProcessStatus(role=role, pid=pid) for role, pid in found if pid is not None),
            memory_bytes=context.budget.used_bytes,
            memory_max_bytes=context.budget.max_bytes,
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

    async def delete_all(self) -> None:
        """At the daemon's end: remove every device, in use or not; one that stays is left to the next daemon."""
        await self._table.delete_all()


async def _check_all_unused(devices: Sequence[Device]) -> None:
    """Raise `DaemonError` that names the users of every one of these devices that is in use."""
    found = await asyncio.gather(*(device.check_unused() for device in devices), return_exceptions=True)
    refusals = [each for each in found if isinstance(each, DaemonError)]
    for each in found:
        if isinstance(each, BaseException) and not isinstance(each, DaemonError):
            raise each
    if refusals:
        is_in_use = all(each.code == "in-use" for each in refusals)
        text = f"nothing was deleted: {'; '.join(map(str, refusals))}"
        raise DaemonError(text, code="in-use" if is_in_use else "")


class _Ending(AsyncExitStack):
    """Ends what could outlive the daemon, or leaves it to the next one."""

    keeper: EventsKept | None = None
    """None until the state directory is open."""

    async def leave(self) -> None:
        """Leave everything to the next daemon, and write what has happened."""
        self.pop_all()
        if self.keeper is not None:
            await self.keeper.end(leaves=True)


def serve(config: ServeConfig) -> int:
    """Run the daemon until SIGTERM or SIGINT; its exit status.  Raises `DaemonError`, `UblkError`, `OSError`."""
    # Fails without the driver or the rights, with a better reason than any later step would give.
    control.get_features()
    raise_descriptor_limit()
    state_dirs = candidates(config.run_dir, config.state_dir)
    socket_dirs = [config.metrics.path.parent] if config.metrics and config.metrics.path else []
    live_mounts = None
    if is_privileged():
        live_mounts = leave_for_own_view([config.run_dir, *state_dirs, *socket_dirs])
    else:
        config = config._replace(devices=all_fitted(config.devices))
        _log.info("an ordinary user's daemon: each device is %s", NOTE)
    share_heap()
    with asyncio.Runner(loop_factory=PatientLoop) as runner:
        return runner.run(_serve(config, live_mounts))


async def _serve(config: ServeConfig, live_mounts: int | None) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    hung_up = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, hung_up.set)
    async with _Ending() as ending, AsyncExitStack() as leaving:
        supervisor = await _start(config, live_mounts, ending, leaving, stop)
        supervisor.ready()
        loop.add_signal_handler(signal.SIGHUP, supervisor.reload_soon)
        if hung_up.is_set():
            supervisor.reload_soon()
        _log.info("serving in %s", config.run_dir)
        with petting(period_us(os.environ, os.getpid()), notify.alive):
            await _first_of(stop, supervisor.stopped)
        notify.stopping()
        supervisor.end()
        if not supervisor.ends and (supervisor.leaves or config.on_stop == "leave"):
            await _leave(supervisor, ending)
        else:
            _log.info("stopping")
    return 0


async def _leave(supervisor: Supervisor, ending: _Ending) -> None:
    """End the daemon; workers, broker and backends serve on until the next daemon."""
    _log.info("leaving the devices to the next daemon")
    try:
        await asyncio.wait_for(supervisor.settled(), SETTLE_DEADLINE_S)
    except TimeoutError:
        # The next daemon recovers the device, as after a crash.
        _log.warning("a device is still changing after %.0f s; leaving it so", SETTLE_DEADLINE_S)
    await ending.leave()


async def _start(
    config: ServeConfig,
    live_mounts: int | None,
    ending: _Ending,
    leaving: AsyncExitStack,
    stop: asyncio.Event,
) -> Supervisor:
    """Start the parts; first `leaving` stops what ends with this daemon, then `ending` what could outlive it."""
    run_dir = config.run_dir
    if config.replace:
        directory = await RunDirectory.replace(run_dir, partial(_ask_to_leave, config))
    else:
        directory = RunDirectory.claim(run_dir)
    ending.callback(directory.remove)
    try:
        records = Records(directory.devices).load()
    except BaseException:
        # What is there serves on, for a daemon that can read its records.
        await ending.leave()
        raise
    try:
        return await _begin(config, directory, records, live_mounts, ending, leaving, stop)
    except BaseException:
        if records:
            # The earlier daemon's processes serve on, and the next start may succeed.
            await ending.leave()
        raise


def _ask_to_leave(config: ServeConfig) -> None:
    """Ask the daemon that runs here to leave.  Raises what `check_before` raises; then it goes on."""
    check_before(config)
    Client(config.run_dir).stop(leave=True)


async def _begin(
    config: ServeConfig,
    directory: RunDirectory,
    records: Sequence[Record],
    live_mounts: int | None,
    ending: _Ending,
    leaving: AsyncExitStack,
    stop: asyncio.Event,
) -> Supervisor:
    context, held = await _make_context(config, directory, live_mounts, ending)
    context.configured = {device.name: device for device in config.devices}
    context.budget.max_bytes = config.memory_max_bytes
    run_dir, broker = context.run_dir, context.broker
    left = TakeOver(context, records, held, {device.name for device in config.devices})
    await left.clear()
    ending.push_async_callback(broker.stop)
    background = Background("the daemon")
    supervisor = Supervisor(context, background, config)
    ending.push_async_callback(supervisor.delete_all)
    ending.callback(background.cancel)
    for restarting in (broker.keep_running(supervisor.broker_restarted), context.holder.keep_running()):
        background.spawn(restarting)
    attach = AttachServer(
        run_dir,
        context.group,
        supervisor.describe,
        supervisor.admit,
        supervisor.lend_buffer,
        supervisor.note_refusal,
    )
    attach.start()
    leaving.callback(attach.close)
    taking = supervisor.take_over(left)
    supervisor.add_configured(config.devices)
    background.spawn(_after_takeover(taking, left, supervisor, config))
    background.spawn(supervisor.lost.report())
    await _within_patience(taking, stop)
    admin = AdminServer(supervisor, run_dir)
    await admin.start()
    leaving.push_async_callback(admin.close)
    _begin_metrics(config, context, supervisor, admin, background, ending)
    return supervisor


def _begin_metrics(
    config: ServeConfig,
    context: DaemonContext,
    supervisor: Supervisor,
    admin: AdminServer,
    background: Background,
    ending: _Ending,
) -> None:
    """Have metrics served if the config says so, and an earlier daemon's exporter ended in any case."""
    if config.metrics is None:
        background.spawn(end_left(context.run_dir))
        return
    log = (config.log_level, config.log_format)
    metrics = MetricsProcess(context.run_dir, config.metrics, context.group, admin.serve_watcher, log)
    ending.push_async_callback(metrics.stop)
    supervisor.metrics = metrics
    metrics.begin()


async def _make_context(
    config: ServeConfig, directory: RunDirectory, live_mounts: int | None, ending: _Ending
) -> tuple[DaemonContext, dict[str, int]]:
    """The parts that all devices share, and the descriptors that an earlier daemon's holder kept.

    The holder runs then, the broker does not.
    """
    run_dir = config.run_dir
    group = group_number(config)
    wanted = wanted_accounts(config.user, group)
    directory.prepare(group, workers_enter=any(each.user for each in wanted))
    check_sockets(run_dir)
    reserve = Reserve()
    ending.callback(reserve.close)
    runner = ControlRunner(reserve, lambda what, text: events.record(CommandHung(what=what), text))
    states = await StateDirectory.open(candidates(run_dir, config.state_dir), runner)
    ending.callback(states.close)
    keeper = ending.keeper = EventsKept(states.directory, runner, config.events_bytes)
    ending.push_async_callback(keeper.end, leaves=False)
    events = keeper.events
    instance = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
    account = choose_account(wanted, config.user, run_dir)
    if account is not None:
        let_workers_connect(run_dir / "pool.sock", account)
    holder = Holder(run_dir)
    held = holder.take_over()
    holder.start()
    ending.push_async_callback(holder.stop)
    broker = BrokerProcess(f"ipc://{run_dir}/pool.sock", holder, account)
    template = BackendTemplate(live_mounts)
    ending.push_async_callback(template.stop)
    context = DaemonContext(
        *(run_dir, instance, group, runner, broker, holder),
        *(states, live_mounts, keeper.events, account, template),
    )
    context.is_privileged = is_privileged()
    return context, held


async def _within_patience(taking: Sequence["asyncio.Task[None]"], stop: asyncio.Event) -> None:
    """Return when the earlier daemon's devices are taken over, after `TAKEOVER_PATIENCE_S`, or at the daemon's end.

    A client that asks right after the start then finds the devices as they are.
    """
    if not taking:
        return
    async with (
        beside(stop.wait()) as stopping,
        beside(asyncio.wait(taking, timeout=TAKEOVER_PATIENCE_S)) as all_taken,
    ):
        await asyncio.wait({stopping, all_taken}, return_when=asyncio.FIRST_COMPLETED)


async def _after_takeover(
    taking: Sequence["asyncio.Task[None]"], left: TakeOver, supervisor: Supervisor, config: ServeConfig
) -> None:
    if taking:
        begun_s = asyncio.get_running_loop().time()
        await asyncio.wait(taking)
        left.tell_end(asyncio.get_running_loop().time() - begun_s)
        supervisor.tell_memory()
    left.close()
    # Devices of the config that the kernel no longer has are made anew.
    if not supervisor.stopped.is_set():
        devices = [each for each in config.devices if each.name in left.gone]
        supervisor.add_configured(devices, were_there=True)
    if left.outdated:
        await supervisor.renew(left.outdated)


async def _first_of(one: asyncio.Event, other: asyncio.Event) -> None:
    async with beside(one.wait()) as first, beside(other.wait()) as second:
        await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
