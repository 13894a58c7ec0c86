"""The parts of one device, and the record of them that the next daemon reads.

Owns that each part is made once, and refers only to parts made before it, and that the record is written before the
step that it must outlive.  No part knows this module or `device.py`.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from contextlib import suppress

import msgspec

from ublkpool.daemon.backends.managed_backend import ManagedBackend
from ublkpool.daemon.device.attached_backend import AttachedBackend
from ublkpool.daemon.device.binding import Binding
from ublkpool.daemon.device.clients import Clients
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.inside import InsideStore
from ublkpool.daemon.device.lifecycle import Lifecycle
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.device.resources import DeviceResources
from ublkpool.daemon.device.succession import record_of
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError, one_line
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.backoff import Backoff
from ublkpool.daemon.processes.left_behind import Process
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import Drain, State
from ublkpool.workers.engine_inside import EngineSpec

SAVE_PAUSE_S = 1.0
SAVE_PAUSE_MAX_S = 30.0
_log = logging.getLogger("ublkpool.device")


class DeviceParts:
    """What one device consists of."""

    def __init__(self, config: DeviceConfig, context: DaemonContext) -> None:
        """Nothing runs yet."""
        self.config = config
        self.added = config
        """What the device was added with, before any `set`."""
        self.context = context
        self.background = Background(config.name)
        self.events = context.events.of(config.name)
        self.life = Lifecycle(config.name)
        self.backend = AttachedBackend(config, self.life, context.holder, self.background, self.events)
        self.backend.account = context.account
        self.resources = DeviceResources(config, context, self.backend)
        self.backend.replays = lambda: self.resources.counted("replays")
        self.managed = _managed(config, context, self.background)
        self.inside = _inside(config, context)
        """The store that the workers serve themselves; None: they do not."""
        self.clients = Clients(config.name, context.holder, self.background)
        self.growing = asyncio.Lock()
        """One resize at a time; taken before the turn."""
        self.binding = Binding(config.name, context.states, context.boot_id)
        self.drain: Drain = ""
        self.draining: asyncio.Task[None] | None = None
        """The last task that drains or drained the device."""
        self.leaving: asyncio.Task[None] | None = None
        """The last task that ends or ended the backend of the drained device."""
        self.left: Record | None = None
        """What an earlier daemon left of the device, until it is taken over or removed."""
        self._saving: asyncio.Task[None] | None = None
        """Saves the record that could not be written; None if none is owed."""

    @property
    def configured(self) -> DeviceConfig:
        """What the config file says of the device, or what it was added with if it is not in the file."""
        return self.context.configured.get(self.config.name, self.added)

    @property
    def resized_bytes(self) -> int:
        """The size that the device was given while it was live; 0: none."""
        disk = self.resources.disk
        return disk.resized_bytes if disk else self.binding.resized_bytes

    @property
    def in_use(self) -> DeviceConfig:
        """The settings with the size that the device has: one that it was given while it was live wins."""
        if self.resized_bytes <= (self.config.size_bytes or 0):
            return self.config
        return msgspec.structs.replace(self.config, size_bytes=self.resized_bytes)

    def use(self, config: DeviceConfig) -> None:
        """Have every part go on with this config; the workers are told separately."""
        self.config = self.backend.config = self.resources.config = config
        if self.managed is not None and config.backend is not None:
            self.managed.use(config.backend)

    def hold(self, drain: Drain) -> None:
        """The device is being drained, is drained, or neither; the workers are told separately."""
        self.drain = drain
        self.resources.holds = bool(drain)
        self.backend.may_attach = drain != "drained"
        # `on_absent` begins anew when the hold ends.
        self.backend.note_new_deadlines()
        self.life.changed()

    def tell_size(self) -> None:
        """Log that the size on record is used and not the config's, if they differ."""
        disk, asked_bytes = self.resources.disk, self.configured.size_bytes
        if disk is not None and asked_bytes is not None and disk.resized_bytes > asked_bytes:
            _log.info(
                "%s: its size on record, %d bytes, is used, and not the config's %d: it was resized",
                self.config.name,
                disk.size_bytes,
                asked_bytes,
            )

    def enter(self, state: State) -> None:
        """The device is in this state: first on record, then to clients."""
        self.life.state = state
        self.save_or_retry()
        self.life.changed()

    def save_or_retry(self) -> None:
        """As `save`, but a failure is logged, and tried again until it succeeds; meanwhile the device goes on.

        If the daemon is killed before that, the next one recovers the device instead of going on with it.
        """
        try:
            self.save()
        except (DaemonError, OSError) as error:
            _log.error("%s: %s; it goes on, and this is tried again", self.config.name, one_line(error))
            if self._saving is None:
                self._saving = self.background.spawn(self._save_again())

    async def saved(self) -> None:
        """Return when what `save_or_retry` could not write is on record, or the device is gone."""
        if (saving := self._saving) is not None:
            await asyncio.wait({saving})

    async def _save_again(self) -> None:
        delays = Backoff(asyncio.get_running_loop().time, SAVE_PAUSE_S, SAVE_PAUSE_MAX_S)
        while True:
            await asyncio.sleep(delays.ended())
            # Another step has saved it, or the device is gone.
            if self._saving is None:
                return
            with suppress(DaemonError, OSError):
                self.save()
                _log.info("%s: on record again", self.config.name)

    def forget(self) -> None:
        """Remove the record: the device is gone."""
        self._saving = None
        self.context.records.forget(self.config.name)

    def save(self) -> None:
        """Write down what the next daemon must know if this one is killed.  Raises `DaemonError`, `OSError`."""
        resources, life = self.resources, self.life
        has_kernel = resources.kernel is not None or resources.mark != 0
        if not has_kernel and (life.state == "failed" or not self.config.waits_for_backend):
            self._saving = None
            return
        self.context.records.save(
            record_of(
                self.config,
                resources.kernel,
                resources.disk,
                resources.team,
                self.backend.session,
                self.managed.pid if self.managed else None,
                mark=resources.mark,
                epoch=resources.epoch,
                state=life.state,
                going=life.is_stopping,
                broker=self._broker(),
                segments=self.backend.segments,
                clients=resources.area.record() if resources.area else None,
                build=self.context.build,
                data_lost=self.backend.data_lost,
                added=self.added,
                drained=self.drain == "drained",
                drain_is_open=self.drain == "drained" and self.resources.hold_gate is not None,
            )
        )
        self._saving = None

    def _broker(self) -> Process | None:
        return None if self._broker_pid() is None else self.context.broker.child.identified("broker")

    def _broker_pid(self) -> int | None:
        """The broker's process; None while it does not know of the device: the next daemon must not go on with it."""
        leases, broker = self.resources.leases, self.context.broker
        return broker.child.pid if leases is None or leases.are_told else None

    async def fork(self, epoch: int) -> Team:
        """The workers of this epoch.  Raises `DaemonError`, `PoolError`, `OSError`."""
        if self.config.asks_the_broker:
            await self.context.broker.be_reachable()
        team = self.resources.new_team(epoch, self.engine())
        # An epoch that has begun is never begun again, whichever process dies now.
        self.save()
        await team.fork()
        if self.inside is not None:
            self.inside.forked()
        self.save()
        team.recorded()
        self.entrust(team)
        return team

    def engine(self) -> EngineSpec | None:
        """What the workers run themselves, of a store that is open."""
        if self.inside is None:
            return None
        assert self.resources.disk is not None
        return self.inside.engine(self.resources.disk, self.binding.generation)

    def entrust(self, team: Team) -> None:
        """The workers on record go on if this daemon ends."""
        self.resources.hold_workers(team)


def _inside(config: DeviceConfig, context: DaemonContext) -> InsideStore | None:
    if config.isolation == "process":
        return None
    return InsideStore(config, context.runner, context.holder)


def _managed(config: DeviceConfig, context: DaemonContext, background: Background) -> ManagedBackend | None:
    if config.backend is None or config.isolation == "none":
        return None
    return ManagedBackend(
        config.name,
        config.backend,
        context.run_dir,
        context.holder,
        context.live_mounts,
        background,
        context.group,
        context.template,
    )
