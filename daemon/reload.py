"""Reading the config file again while the daemon runs, and what becomes of each device.

Owns that the file is checked as a whole before anything of it is used, and what is said of a device whose change needs
more than that.  The file is read by a process of its own, since its file system may not answer, in the mount namespace
in which backends run: the file and the programs that it names may be on mounts that the daemon's own namespace has not
(`daemon/processes/mounts.py`).  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.table import DeviceTable
from ublkpool.daemon.errors import ConfigError, DaemonError, one_line, without_name
from ublkpool.daemon.settings.changes import APPLIES, differences, user_key
from ublkpool.daemon.settings.config import DaemonTable, DeviceConfig, MetricsTable, PrepareTable, ServeConfig
from ublkpool.daemon.settings.config_file import load_config
from ublkpool.daemon.settings.user_devices import all_fitted
from ublkpool.daemon.status import Reloaded
from ublkpool.ublk import process_calls

_log = logging.getLogger("ublkpool.supervisor")


class Read(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says, or the mistakes in it."""

    problems: list[str] = []
    devices: list[DeviceConfig] = []
    table: DaemonTable = DaemonTable()
    metrics: MetricsTable | None = None
    prepare: PrepareTable = PrepareTable()


class Reload:
    """The config file of one daemon."""

    def __init__(self, config: ServeConfig, context: DaemonContext, table: DeviceTable) -> None:
        self._config = config
        self._context = context
        self._table = table
        self._turn = asyncio.Lock()
        self._named = {device.name for device in config.devices}
        """The devices that are in the file, or were and have not been deleted since."""
        self.problem = ""
        """Why the file was not used when it was last read; empty if it was."""

    async def reload(self) -> Sequence[Reloaded]:
        """Use the config file as it is now: what became of each device, and of the daemon's own settings.

        Raises `ConfigError` with a line for each mistake in the file, `DaemonError`; then nothing has changed.
        """
        async with self._turn:
            try:
                read = await self._read()
            except DaemonError as error:
                self.problem = f"the config was not read again: {one_line(error)}"
                _log.error("%s", self.problem)
                raise
            self.problem = ""
            self._context.configured = {device.name: device for device in read.devices}
            budget = self._set_budget(read.table.memory_max_bytes)
            gone = [name for name in self._named - self._context.configured.keys() if name in self._table]
            self._named = {*self._context.configured, *gone}
            # Side by side: one of them may be in a long recovery.
            done = await asyncio.gather(*(self._apply(device) for device in read.devices))
            done += map(_gone, sorted(gone))
            done += budget
            done += _of_daemon(self._config, read)
            for each in done:
                _say(each)
            return done

    def _set_budget(self, memory_max_bytes: int) -> list[Reloaded]:
        """Use this budget, before any device of the file is added; devices that exist are served in any case."""
        budget = self._context.budget
        if budget.max_bytes == memory_max_bytes:
            return []
        budget.max_bytes = memory_max_bytes
        return [Reloaded(name="daemon", done=f"set memory_max to {memory_max_bytes}", needs=budget.excess)]

    async def _read(self) -> Read:
        file = self._config.file
        if file is None:
            raise DaemonError("the daemon was started without a config file: nothing to read again")
        live, what = self._context.live_mounts, f"the config file {file}"
        is_privileged = self._context.is_privileged
        read = await self._context.runner.look(
            "the config",
            what,
            lambda: _load(file, live, is_privileged),
            Read,
            keep_fds=() if live is None else (live,),
        )
        if read.problems:
            raise ConfigError(read.problems)
        return read

    async def _apply(self, wanted: DeviceConfig) -> Reloaded:
        name = wanted.name
        try:
            if name not in self._table or self._table.device(name).state == "failed":
                refusal = self._table.add_configured(wanted, _log.info)
                return Reloaded(name=name, done="" if refusal else "is being added", needs=refusal)
            return await _change(self._table.device(name), wanted)
        except (DaemonError, OSError) as error:
            return Reloaded(name=name, needs=without_name(name, one_line(error)))


def _load(file: Path, live_mounts: int | None, is_privileged: bool) -> Read:
    """Runs in the look's process.  Raises `OSError` if it cannot enter the mount namespace."""
    if live_mounts is not None:
        process_calls.enter_mounts(live_mounts)
    try:
        config = load_config(file)
        devices = config.devices if is_privileged else all_fitted(config.devices)
    except ConfigError as error:
        return Read(problems=error.lines)
    return Read(
        devices=list(devices), table=config.table, metrics=config.metrics_table, prepare=config.prepare_table
    )


async def _change(device: Device, wanted: DeviceConfig) -> Reloaded:
    """Have the device use what can change; what it needs for the rest."""
    before = device.config
    await device.use_config(wanted)
    changed = differences(before, device.config)
    notes = [f"{key} (at its next start)" if APPLIES[key] != "now" else key for key in changed]
    done = f"set {', '.join(notes)}" if notes else ""
    return Reloaded(name=device.name, done=done, needs=_needs(device, wanted))


def _needs(device: Device, wanted: DeviceConfig) -> str:
    """What is left to do for the device to have this config; empty if nothing."""
    name, status = device.name, device.status()
    fixed, needs = differences(device.config, wanted), []
    has_bytes, wanted_bytes = status.size_bytes, wanted.size_bytes
    # A resize has given the disk another size than its config's.
    if "size" in fixed and has_bytes is not None and wanted_bytes is not None:
        if wanted_bytes > has_bytes and device.state == "live":
            needs.append(f"size: grow it with: ublkpool resize {name} {wanted_bytes}")
        if needs or wanted_bytes == has_bytes:
            fixed.remove("size")
    if fixed:
        way_out = f"ublkpool del {name}, then read the config again"
        needs.insert(0, f"{', '.join(fixed)}: needs a new device: {way_out}")
    return "; ".join(needs)


def _gone(name: str) -> Reloaded:
    return Reloaded(name=name, needs=f"is no longer in the config; delete it with: ublkpool del {name}")


def _of_daemon(before: ServeConfig, now: Read) -> list[Reloaded]:
    fields = [each for each in DaemonTable.__struct_fields__ if each != "memory_max_bytes"]
    keys = [user_key(each) for each in fields if getattr(before.table, each) != getattr(now.table, each)]
    keys += ["metrics"] if before.metrics_table != now.metrics else []
    keys += ["prepare"] if before.prepare_table != now.prepare else []
    return (
        [Reloaded(name="daemon", needs=f"{', '.join(keys)}: needs a restart of the daemon")] if keys else []
    )


def _say(each: Reloaded) -> None:
    if each.done:
        _log.info("%s: %s", each.name, each.done)
    if each.needs:
        _log.warning("%s: %s", each.name, each.needs)
