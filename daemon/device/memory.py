"""How much memory the daemon makes for its devices, and the budget that they share (`memory_max`).

Owns what is counted.  For a device, by its config or as it was made: the pool's data and control segment, the client
area, for each queue the worker's scratch buffer and the rings to a backend; and the segment that its backend has
brought, which workers lock as well.  Each of these is made as a whole and stays for the device's life.  Not counted are
the processes' own memory, and the pool that is made for a moment while a backend's memory is replaced.

The budget decides only whether a device is made.  A device that exists is served, whatever the budget.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.memory_room import mib
from ublkpool.bufpool.pool.control import control_bytes
from ublkpool.bufpool.pool.limits import Geometry, pool_geometry
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk import _native
from ublkpool.ublk.mappings import SINK_BYTES

POSSIBLE_CPUS = Path("/sys/devices/system/cpu/possible")
WAY_OUT = (
    "lower its queues, depth, max_io, pool or client_buffers, delete a device, or raise memory_max and reload"
)


class Made(NamedTuple):
    """What a device has been given: its pool's geometry and number of queues."""

    geometry: Geometry
    queues: int


class Counted(Protocol):
    """A device, as far as the budget sees it."""

    @property
    def name(self) -> str: ...

    @property
    def memory_bytes(self) -> int: ...


def queues_max() -> int:
    """How many hardware queues the driver gives to a device at most: one for each CPU that there can be."""
    try:
        return int(POSSIBLE_CPUS.read_text().replace("-", ",").split(",")[-1]) + 1
    except (OSError, ValueError):
        return 1 << 12


def memory_of(config: DeviceConfig, slices_bytes: int, made: Made | None = None) -> int:
    """Bytes that the daemon makes for this device; without `made` the bytes that it would make.

    `slices_bytes` is the size of the client area.  0 for a config of which no pool can be made: that is refused.
    """
    made = made or _planned(config)
    if made is None:
        return 0
    lib = _native.lib
    has_rings = config.rings and config.has_backend_process
    rings_bytes = int(lib.uq_port_bytes(lib.uq_port_entries(config.depth))) if has_rings else 0
    pool_bytes = made.geometry.total_bytes + control_bytes(made.queues, made.geometry.slot_count)
    return pool_bytes + slices_bytes + made.queues * (min(config.max_io_bytes, SINK_BYTES) + rings_bytes)


def pool_of(
    config: DeviceConfig, queues: int, depth: int, max_io_bytes: int
) -> tuple[Geometry, tuple[int, ...]]:
    """The geometry of a device's pool and the reserves; with zero copy, where no request takes a buffer, the smallest.

    Raises `PoolError`.
    """
    if config.zero_copy:
        return pool_geometry(queues, 1, max_io_bytes, need_get_data=False, placement="pool")
    return pool_geometry(
        queues, depth, max_io_bytes, config.need_get_data, config.placement, config.pool_bytes
    )


def _planned(config: DeviceConfig) -> Made | None:
    queues = min(config.queues, queues_max())
    try:
        geometry, _ = pool_of(config, queues, config.depth, config.max_io_bytes)
    except PoolError:
        return None
    return Made(geometry, queues)


class MemoryBudget:
    """What all devices of a daemon may have together.

    Prepared devices have only what is left: none is made beyond the budget, and they give way to devices.
    """

    def __init__(self, max_bytes: int = 0, devices: Callable[[], Sequence[Counted]] = tuple) -> None:
        """`max_bytes` 0 is no budget; `devices` are those that exist."""
        self.max_bytes = max_bytes
        self.devices = devices
        self.prepared_bytes: Callable[[], int] = lambda: 0
        """What prepared devices have."""

    @property
    def used_bytes(self) -> int:
        """What the devices have, and the prepared ones."""
        return self._devices_bytes + self.prepared_bytes()

    @property
    def _devices_bytes(self) -> int:
        return sum(each.memory_bytes for each in self.devices())

    def has_room(self, more_bytes: int) -> bool:
        """Whether the budget leaves so much more for prepared devices."""
        return not self.max_bytes or self.used_bytes + more_bytes <= self.max_bytes

    def refusal(self, name: str, needed_bytes: int) -> str:
        """Why this device cannot be made beside the others; empty if it can."""
        if not self.max_bytes:
            return ""
        used_bytes = sum(each.memory_bytes for each in self.devices() if each.name != name)
        if used_bytes + needed_bytes <= self.max_bytes:
            return ""
        return (
            f"it needs {mib(needed_bytes)} of memory, and {mib(used_bytes)} of the {mib(self.max_bytes)} "
            f"of memory_max are in use: {WAY_OUT}"
        )

    def refusal_of(self, config: DeviceConfig) -> str:
        """The same of a device that is to be made with this config; its backend is not known yet."""
        if not self.max_bytes:
            return ""
        return self.refusal(config.name, memory_of(config, config.client_buffers_bytes))

    @property
    def excess(self) -> str:
        """In words, that the devices have more than the budget; empty if they have not."""
        used_bytes = self._devices_bytes
        if not self.max_bytes or used_bytes <= self.max_bytes:
            return ""
        return (
            f"the devices have {mib(used_bytes)} of memory, and memory_max is {mib(self.max_bytes)}: "
            "they are served, and no device is added"
        )
