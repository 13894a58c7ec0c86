"""New settings for a device that serves: on record first, then in every worker.

Owns that order, so that whichever process dies meanwhile, its successor comes up with the settings on record.  Runs on
the supervisor's asyncio loop.
"""

import logging
from collections.abc import Mapping, Sequence

from ublkpool.daemon.device.limits import limits_of
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events.kinds import SettingsChanged
from ublkpool.daemon.settings.changes import APPLIES, Scalar, changed, differences, shown, wanted_now
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.settings.user_devices import check_fits
from ublkpool.daemon.status import Setting

_log = logging.getLogger("ublkpool.device")


async def apply(parts: DeviceParts, values: Mapping[str, Scalar]) -> None:
    """Give the device these values, by the user's keys, all or none.

    They hold in every worker when this returns.  Raises `ConfigError` for the user's mistakes, `DaemonError`, `OSError`
    if the device cannot be changed now; then it keeps what it had.
    """
    # Judged at once as well: a mistake need not wait for a recovery to end.
    wanted = changed(parts.config, values)
    if not parts.context.is_privileged:
        check_fits(wanted)
    async with parts.life.turn:
        await use(parts, changed(parts.config, values))


async def use_config(parts: DeviceParts, wanted: DeviceConfig) -> None:
    """Give the device what can change of this config.  Raises as `apply`."""
    async with parts.life.turn:
        await use(parts, wanted_now(parts.config, wanted))


async def use(parts: DeviceParts, config: DeviceConfig) -> None:
    """Give the device this config, which differs in what may change; the caller has the turn.  Raises as `apply`."""
    name, before, team = parts.config.name, parts.config, parts.resources.team
    if reason := _why_not(parts):
        raise DaemonError(f"{name}: {reason}")
    keys = differences(before, config)
    if not keys:
        return
    parts.use(config)
    try:
        parts.save()
    except BaseException:
        parts.use(before)
        raise
    parts.resources.set_limits(limits_of(config))
    if team is not None:
        await team.set_deadlines(config)
    parts.backend.note_new_deadlines()
    values = {key: shown(config, key) for key in keys}
    told = ", ".join(f"{key}={value}" for key, value in values.items())
    parts.events.tell(_log, SettingsChanged(values=values), f"set {told}")


def _why_not(parts: DeviceParts) -> str:
    """Why the device cannot be changed now; empty if it can."""
    life, team = parts.life, parts.resources.team
    if life.is_stopping:
        return "it is being deleted"
    if life.state == "failed":
        return "it has failed; what it needs is a new device: del it, then add it"
    if parts.left is not None:
        return "an earlier daemon left it, and it is being taken over: try again when it is live"
    if team is not None and not team.can_set_deadlines:
        return "its workers run an earlier version, which cannot be changed: try again when they have been replaced"
    return ""


def settings(parts: DeviceParts) -> Sequence[Setting]:
    """Every setting of the device, and what its config says."""
    config, configured = parts.in_use, parts.configured
    return [
        Setting(key=key, value=shown(config, key), configured=shown(configured, key), applies=applies)
        for key, applies in APPLIES.items()
    ]
