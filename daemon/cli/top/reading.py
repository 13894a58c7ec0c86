"""What the daemon tells at the end of an interval, and the CPU time of processes in it.  Pure."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ublkpool.daemon.events.event import Event
from ublkpool.daemon.metrics.usage import Owner, ProcessUsage
from ublkpool.daemon.rates import Interval
from ublkpool.daemon.status import DaemonStatus, DeviceStatus


class Share(NamedTuple):
    """A process: how many CPUs it used in the interval (None: not known yet), and its resident memory in bytes."""

    cpu: float | None
    resident_bytes: int


class Reading(NamedTuple):
    """Everything at the end of one interval.

    `shares`: of the daemon's own processes, and of those of the one device that is looked at in depth.  `events`: those
    since the last reading, oldest first.
    """

    interval: Interval
    statuses: Sequence[DeviceStatus]
    daemon: DaemonStatus | None = None
    shares: Mapping[Owner, Share] = MappingProxyType({})
    events: Sequence[Event] = ()


class Shares:
    """Remembers the processes' CPU times, so that the next reading has their share."""

    def __init__(self) -> None:
        self._before: dict[tuple[Owner, float], float] = {}
        self._at_s: float | None = None

    def read(self, usages: Sequence[ProcessUsage], at_s: float) -> dict[Owner, Share]:
        """The share of each process since the last reading; `at_s`: now, on the monotonic clock."""
        elapsed_s = 0.0 if self._at_s is None else at_s - self._at_s
        found = {each.owner: Share(self._cpu(each, elapsed_s), each.resident_bytes) for each in usages}
        # A process that follows another has another start.
        self._before = {(each.owner, each.start_s): each.cpu_s for each in usages}
        self._at_s = at_s
        return found

    def _cpu(self, usage: ProcessUsage, elapsed_s: float) -> float | None:
        before = self._before.get((usage.owner, usage.start_s))
        if before is None or elapsed_s <= 0:
            return None
        return max(0.0, usage.cpu_s - before) / elapsed_s
