"""The daemon's life: its parts started in order, and ended or left to the next daemon in the reverse order.

Owns the run directory.  One process, one thread, one asyncio loop; never in the data path.  Signal handlers only set an
event.
"""

import asyncio
import hashlib
import logging
import os
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import NamedTuple

from ublkpool.daemon import notify
from ublkpool.daemon.admin.client import Client
from ublkpool.daemon.admin.server import AdminServer
from ublkpool.daemon.backends.attach import AttachServer
from ublkpool.daemon.backends.template_process import BackendTemplate
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.records import Record, Records
from ublkpool.daemon.device.state import StateDirectory, candidates
from ublkpool.daemon.events.kinds import CommandHung
from ublkpool.daemon.events_kept import EventsKept
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.beside import beside
from ublkpool.daemon.processes.broker_process import BrokerProcess
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.metrics_process import MetricsProcess, end_left
from ublkpool.daemon.processes.mounts import leave_for_own_view
from ublkpool.daemon.processes.patient_loop import PatientLoop
from ublkpool.daemon.processes.reserve import Reserve, raise_descriptor_limit
from ublkpool.daemon.processes.worker_template import WorkerTemplate
from ublkpool.daemon.replacement import check_before, check_sockets, group_number
from ublkpool.daemon.settings.config import ServeConfig
from ublkpool.daemon.settings.run_directory import RunDirectory, let_workers_connect
from ublkpool.daemon.settings.user_devices import NOTE, all_fitted
from ublkpool.daemon.settings.worker_account import choose_account, wanted_accounts
from ublkpool.daemon.supervisor import Supervisor
from ublkpool.daemon.takeover import TakeOver
from ublkpool.daemon.watchdog import period_us, petting
from ublkpool.ublk import control
from ublkpool.ublk.privilege import is_privileged
from ublkpool.workers.process import share_heap

SETTLE_DEADLINE_S = 60.0
TAKEOVER_PATIENCE_S = 10.0
"""How long READY waits for the takeover of an earlier daemon's devices, which rarely takes a second."""
_log = logging.getLogger("ublkpool.supervisor")


class Machine(NamedTuple):
    """What the daemon has of the machine before its loop begins."""

    live_mounts: int | None
    offered: int
    """What the driver offers (GET_FEATURES)."""


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
    offered = control.get_features()
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
        return runner.run(_serve(config, Machine(live_mounts, offered)))


async def _serve(config: ServeConfig, machine: Machine) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    hung_up = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, hung_up.set)
    async with _Ending() as ending, AsyncExitStack() as leaving:
        supervisor = await _start(config, machine, ending, leaving, stop)
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
    await supervisor.prepared.end()
    await ending.leave()


async def _start(
    config: ServeConfig,
    machine: Machine,
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
        return await _begin(config, directory, records, machine, ending, leaving, stop)
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
    machine: Machine,
    ending: _Ending,
    leaving: AsyncExitStack,
    stop: asyncio.Event,
) -> Supervisor:
    context, held = await _make_context(config, directory, machine, ending, leaving)
    context.configured = {device.name: device for device in config.devices}
    context.budget.max_bytes = config.memory_max_bytes
    run_dir, broker = context.run_dir, context.broker
    left = TakeOver(context, records, held, {device.name for device in config.devices})
    await left.clear()
    ending.push_async_callback(broker.stop)
    background = Background("the daemon")
    supervisor = Supervisor(context, background, config)
    ending.push_async_callback(supervisor.delete_all)
    ending.push_async_callback(supervisor.prepared.end)
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
    config: ServeConfig,
    directory: RunDirectory,
    machine: Machine,
    ending: _Ending,
    leaving: AsyncExitStack,
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
    ending.callback(runner.close)
    states = await StateDirectory.open(candidates(run_dir, config.state_dir), runner)
    ending.callback(states.close)
    keeper = ending.keeper = EventsKept(states.directory, runner, config.events_bytes)
    ending.push_async_callback(keeper.end, leaves=False)
    events = keeper.events
    instance = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
    account = choose_account(wanted, config.user, run_dir)
    if account is not None:
        let_workers_connect(run_dir / "pool.sock", account)
    worker_template = WorkerTemplate()
    worker_template.start()
    # Its workers outlive it, and the next daemon has one of its own.
    leaving.push_async_callback(worker_template.stop)
    holder = Holder(run_dir)
    held = holder.take_over()
    holder.start()
    ending.push_async_callback(holder.stop)
    broker = BrokerProcess(f"ipc://{run_dir}/pool.sock", holder, account)
    template = BackendTemplate(machine.live_mounts)
    ending.push_async_callback(template.stop)
    context = DaemonContext(
        *(run_dir, instance, group, runner, broker, holder),
        *(states, machine.live_mounts, keeper.events, account, template, worker_template),
    )
    context.is_privileged, context.offered = is_privileged(), machine.offered
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
