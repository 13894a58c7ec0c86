"""A prepared device: kernel device, pool and workers with every tag fetched, but no disk and no store yet.

Owns which device may take one.  It has everything that takes time and that devices of one shape have in common; what
differs between them, a worker is told later (`messages.Become`) and the kernel with START_DEV.  Until then it is a
device of a reserved name in the records, so that the next daemon deletes it as any device that was never live; its
workers' sockets are not with the holder, so they end with their daemon.  Runs on the supervisor's asyncio loop.
"""

import secrets
from typing import Any

import msgspec

from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.settings.changes import WHILE_LIVE
from ublkpool.daemon.settings.config import CONNECTED_KINDS, BackendConfig, DeviceConfig
from ublkpool.workers.engine_awaited import AWAITED
from ublkpool.workers.engine_inside import EngineSpec

RESERVED = "_prepared."
"""How the name of a prepared device begins."""
_NO_DISK = Disk(size_bytes=0, block_bytes=512, volatile_cache=False, read_only=False)
_PLAIN = DeviceConfig(name="plain")
_TOLD_LATER = ("size_bytes", "read_only", *WHILE_LIVE)
"""Settings that neither ADD_DEV nor a worker's fork needs.  Any other, also one that is new, is part of the shape."""
_ANY_STORE = BackendConfig(kind="null")


def is_reserved(name: str) -> bool:
    """Whether this is the name of a prepared device, which no other device may have."""
    return name.startswith(RESERVED)


def shape_of(config: DeviceConfig) -> DeviceConfig | None:
    """The device without what is told later; None for one that is never taken from the prepared."""
    needs_more = config.client_buffers_bytes or config.zero_copy or config.answers == "worker"
    if config.id is not None or needs_more or not _may_be_told(config):
        return None
    later: dict[str, Any] = {field: getattr(_PLAIN, field) for field in _TOLD_LATER}
    if config.isolation == "none":
        # Without a backend's process no rings are made.
        later["rings"] = True
    return msgspec.structs.replace(config, name=RESERVED, backend=_ANY_STORE, **later)


def _may_be_told(config: DeviceConfig) -> bool:
    """Whether workers can be told of the backend; of a process they are told when it attaches."""
    if config.isolation == "process":
        return True
    return (
        config.backend is not None
        and config.backend.kind not in CONNECTED_KINDS
        and config.placement == "pool"
    )


class PreparedParts(DeviceParts):
    """The parts of one prepared device."""

    def __init__(self, wanted: DeviceConfig, context: DaemonContext) -> None:
        """For devices of this one's shape."""
        shape = shape_of(wanted)
        assert shape is not None
        super().__init__(msgspec.structs.replace(shape, name=f"{RESERVED}{secrets.token_hex(4)}"), context)
        self._shape = shape
        self.resources.is_prepared = True
        self.resources.disk = _NO_DISK

    def engine(self) -> EngineSpec | None:
        """The place of one, unless a backend's process is to come."""
        return AWAITED if self.config.isolation == "none" else None

    def entrust(self, team: Team) -> None:
        """Nothing is held: without a device to serve, the workers end with this daemon."""

    def forget(self) -> None:
        """Remove the record, after what the holder has by its name."""
        self.context.holder.drop(self.config.name)
        super().forget()

    def fits(self, config: DeviceConfig, disk: Disk) -> bool:
        """Whether a device with these settings, and this disk, can take it now."""
        team = self.resources.team
        lives = team is not None and all(each.child.exit_status is None for each in team.workers)
        return lives and shape_of(config) == self._shape and disk.block_bytes == _NO_DISK.block_bytes
