"""The daemon: all devices, the broker, the sockets, from start to a clean end.

Owns the run directory and the order in which its parts start and stop.  One process, one thread, one asyncio loop;
never in the data path.  Signal handlers only set an event.
"""

import asyncio
import grp
import hashlib
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress

from ublkpool.bufpool import wire
from ublkpool.daemon import notify
from ublkpool.daemon.admin import AdminServer
from ublkpool.daemon.admin_client import AdminClient
from ublkpool.daemon.attach import AttachServer
from ublkpool.daemon.broker_process import BrokerProcess
from ublkpool.daemon.config import DeviceConfig, ServeConfig
from ublkpool.daemon.control_process import ControlRunner
from ublkpool.daemon.device import Device
from ublkpool.daemon.errors import DaemonError, one_line, without_name
from ublkpool.daemon.holder import Holder
from ublkpool.daemon.measure import device_stats
from ublkpool.daemon.mounts import leave_for_own_view
from ublkpool.daemon.patient_loop import PatientLoop
from ublkpool.daemon.records import Records
from ublkpool.daemon.run_directory import RunDirectory
from ublkpool.daemon.session import Session
from ublkpool.daemon.status import DeviceStats, DeviceStatus
from ublkpool.daemon.surroundings import Surroundings
from ublkpool.daemon.takeover import TakeOver
from ublkpool.ublk import control
from ublkpool.workers.process import share_heap

SETTLE_DEADLINE_S = 60.0
_log = logging.getLogger("ublkpool.supervisor")
_Names = list[str]


class Supervisor:
    """The devices of one daemon: what the admin socket can ask for, and where backends come to."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._devices: dict[str, Device] = {}
        self.stopped = asyncio.Event()
        self.leaves = False

    async def add(self, cfg: DeviceConfig, progress: Callable[[str], None]) -> DeviceStatus:
        """Create a device; with a backend to run, return when it is live.  Raises `DaemonError` and leaves nothing.

        One that failed is made again, and its backend finds what its predecessor kept.
        """
        if self.stopped.is_set():
            raise DaemonError("the daemon is stopping")
        failed = self._devices.get(cfg.name)
        if failed is not None and failed.state != "failed":
            raise DaemonError(f"device {cfg.name} exists already: choose another name, or delete it")
        device = Device(cfg, self._around)
        self._devices[cfg.name] = device
        if failed is not None:
            await failed.settled()
        device.save()
        if not cfg.waits_for_backend:
            progress(
                f"{cfg.name}: starting {f'backend {cfg.backend.kind}' if cfg.backend else 'its workers'}"
            )
            try:
                await device.run()
            except BaseException:
                await device.delete(force=True, keep=failed is not None)
                self._devices.pop(cfg.name, None)
                if failed is not None:
                    self._devices[cfg.name] = failed
                raise
        return device.status()

    async def delete(self, names: _Names | None, force: bool) -> Sequence[str]:
        """Delete these devices, or all.  Raises `DaemonError` if one does not exist or is in use; then all stay."""
        wanted = list(self._devices) if names is None else names
        devices = [self._device(name) for name in wanted]
        if not force and len(devices) > 1:
            await _check_all_unused(devices)
        for name in wanted:
            await self._device(name).delete(force)
            del self._devices[name]
        return wanted

    async def wait_live(self, name: str, timeout_s: float | None) -> DeviceStatus:
        """Return when the device is live.  Raises `DaemonError` if it fails, or is not in time."""
        device = self._device(name)
        try:
            await asyncio.wait_for(device.live(), timeout_s)
        except TimeoutError:
            raise DaemonError(f"{name}: still {device.state} after {timeout_s:g} s") from None
        return device.status()

    def list(self) -> Sequence[DeviceStatus]:
        """All devices."""
        return [device.status() for device in self._devices.values()]

    def stats(self, name: str | None) -> Sequence[DeviceStats]:
        """The numbers of one device, or of all."""
        devices = self._devices.values() if name is None else [self._device(name)]
        return [device_stats(device) for device in devices]

    async def stop(self, leave: bool) -> None:
        """End the daemon, and its devices unless it is to leave them."""
        self.leaves = self.leaves or leave
        self.stopped.set()

    async def settled(self) -> None:
        """Return when no device changes."""
        await asyncio.gather(*(device.settled() for device in self._devices.values()))

    async def renew(self, names: _Names) -> None:
        """Have today's code serve what an earlier version of it serves: these devices, one after another."""
        await self._around.broker.renew()
        self._around.holder.renew()
        for name in names:
            if name in self._devices:
                await self._devices[name].renew()

    def take(self, device: Device) -> None:
        """A device that an earlier daemon left is ours now."""
        self._devices[device.config.name] = device
        device.save()

    def describe(self, name: str) -> wire.Described:
        """What a backend may know before it attaches.  Raises `DaemonError` if there is no such device."""
        return self._device(name).describe()

    async def admit(self, session: Session) -> None:
        """Bring a backend to its device.  Raises `DaemonError` if there is none."""
        await self._device(session.attach.device).attach(session)

    def lend_buffer(self, name: str, sock: socket.socket) -> tuple[wire.BufferLeased, int | None]:
        """Memory for a client's I/O.  Raises `DaemonError` if there is no such disk."""
        return self._device(name).lend_buffer(sock)

    async def broker_restarted(self) -> None:
        """Tell a new broker about every device."""
        for device in list(self._devices.values()):
            await device.broker_restarted()

    async def delete_all(self) -> None:
        """At the end: every device, in use or not; one that fails does not keep the others."""
        devices = list(self._devices.items())
        uses = await asyncio.gather(*(device.describe_use() for _, device in devices))
        for (name, device), use in zip(devices, uses, strict=True):
            if use:
                _log.warning("%s is in use and goes all the same: %s", name, use)
            try:
                await device.delete(force=True)
            except DaemonError as error:
                _log.error("%s: %s", name, without_name(name, one_line(error)))
            self._devices.pop(name, None)

    def _device(self, name: str) -> Device:
        if name not in self._devices:
            known = ", ".join(self._devices) or "none"
            raise DaemonError(f"no device {name!r}; there is {known}")
        return self._devices[name]


async def _check_all_unused(devices: Sequence[Device]) -> None:
    """Raise `DaemonError` that names the users of every one of these devices that is in use."""
    found = await asyncio.gather(*(device.check_unused() for device in devices), return_exceptions=True)
    refusals = [str(each) for each in found if isinstance(each, DaemonError)]
    for each in found:
        if isinstance(each, BaseException) and not isinstance(each, DaemonError):
            raise each
    if refusals:
        raise DaemonError(f"nothing was deleted: {'; '.join(refusals)}")


def serve(config: ServeConfig) -> int:
    """Run the daemon until SIGTERM or SIGINT; its exit status.  Raises `DaemonError`, `UblkError`, `OSError`."""
    # Without the driver or the rights nothing else is worth trying, and the reason is the best there is.
    control.get_features()
    live_mounts = leave_for_own_view([config.run_dir])
    share_heap()
    with asyncio.Runner(loop_factory=PatientLoop) as runner:
        return runner.run(_serve(config, live_mounts))


async def _serve(config: ServeConfig, live_mounts: int) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as ending, AsyncExitStack() as leaving:
        supervisor = await _start(config, live_mounts, ending, leaving)
        await _add_configured(supervisor, config, stop)
        notify.ready(f"serving {len(config.devices)} devices")
        _log.info("serving in %s", config.run_dir)
        await _first_of(stop, supervisor.stopped)
        notify.stopping()
        supervisor.stopped.set()
        if supervisor.leaves or config.on_stop == "leave":
            await _leave(supervisor, ending)
        else:
            _log.info("stopping")
    return 0


async def _leave(supervisor: Supervisor, ending: AsyncExitStack) -> None:
    """Let everything go on without us."""
    _log.info("leaving the devices to the next daemon")
    try:
        await asyncio.wait_for(supervisor.settled(), SETTLE_DEADLINE_S)
    except TimeoutError:
        # The next daemon sorts it out, as after a crash.
        _log.warning("a device is still changing after %.0f s; leaving it so", SETTLE_DEADLINE_S)
    ending.pop_all()


async def _start(
    config: ServeConfig, live_mounts: int, ending: AsyncExitStack, leaving: AsyncExitStack
) -> Supervisor:
    """Bring up the parts.

    `leaving` takes down, in the opposite order, what ends with this daemon; then `ending` what would outlive it.
    """
    run_dir = config.run_dir
    group = grp.getgrnam(config.group).gr_gid if config.group else None
    if config.replace:
        directory = await RunDirectory.replace(run_dir, lambda: AdminClient(run_dir).stop(leave=True))
    else:
        directory = RunDirectory.claim(run_dir)
    ending.callback(directory.remove)
    directory.prepare(group)
    instance = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
    records = Records(directory.devices).load()
    holder = Holder(run_dir)
    held = holder.take_over()
    holder.start()
    ending.push_async_callback(holder.stop)
    broker = BrokerProcess(f"ipc://{run_dir}/pool.sock", holder)
    around = Surroundings(run_dir, instance, group, ControlRunner(), broker, holder, live_mounts)
    configured = {device.name for device in config.devices}
    left = TakeOver(around, records, held, configured)
    await left.clear()
    ending.push_async_callback(broker.stop)
    supervisor = Supervisor(around)
    ending.push_async_callback(supervisor.delete_all)
    for keeper in (broker.keep_running(supervisor.broker_restarted), holder.keep_running()):
        ending.callback(asyncio.ensure_future(keeper).cancel)
    attach = AttachServer(run_dir, group, supervisor.describe, supervisor.admit, supervisor.lend_buffer)
    attach.start()
    leaving.callback(attach.close)
    await left.devices(supervisor.take)
    if left.outdated:
        ending.callback(asyncio.ensure_future(supervisor.renew(left.outdated)).cancel)
    admin = AdminServer(supervisor, run_dir)
    await admin.start()
    leaving.push_async_callback(admin.close)
    return supervisor


async def _add_configured(supervisor: Supervisor, config: ServeConfig, stop: asyncio.Event) -> None:
    """Add the config's devices side by side; one that fails is logged and does not keep the others from serving."""
    adopted = {status.name for status in supervisor.list()}
    adding = [
        asyncio.ensure_future(_add_one(supervisor, device))
        for device in config.devices
        if device.name not in adopted
    ]
    if not adding:
        return
    stopping = asyncio.ensure_future(stop.wait())
    everything = asyncio.gather(*adding)
    await asyncio.wait((everything, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not everything.done():
        everything.cancel()
        with suppress(asyncio.CancelledError):
            await everything


async def _add_one(supervisor: Supervisor, device: DeviceConfig) -> None:
    try:
        await supervisor.add(device, _log.info)
    except Exception as error:
        _log.error("device %s of the config: %s", device.name, without_name(device.name, one_line(error)))


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
