"""What is known of the devices over several readings: the last reading, their histories, the last events.  Pure."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ublkpool.daemon.cli.top.reading import Reading, Share
from ublkpool.daemon.events.event import Event
from ublkpool.daemon.latency import quantile
from ublkpool.daemon.metrics.usage import Owner
from ublkpool.daemon.rates import DeviceRates, Measured, queues_between, whole_request
from ublkpool.daemon.status import DaemonStatus, DeviceStats, DeviceStatus, Latencies

HISTORY = 60
"""Intervals that a sparkline can show."""
EVENTS_MAX = 1000
KINDS = ("read", "write", "other", "buffer_wait", "backend")


class Point(NamedTuple):
    """One interval of a device: requests a second, and P99 in seconds, of all requests and of each kind of KINDS.

    None stands for what is not known, because no interval was whole, and for the P99 of no requests.
    """

    reads: float | None
    writes: float | None
    p99_s: float | None
    kinds: tuple[float | None, ...]


class Device(NamedTuple):
    """One device at the end of an interval; `rates` and the quantiles are None where no interval is whole."""

    status: DeviceStatus
    stats: DeviceStats
    rates: DeviceRates | None
    latencies: Latencies | None
    history: Sequence[Point]
    p50_s: float | None = None
    p99_s: float | None = None

    @property
    def name(self) -> str:
        """The device's name."""
        return self.status.name

    @property
    def reason(self) -> str:
        """Why the device does not serve; empty if it does."""
        return self.status.reason or self.stats.reason

    @property
    def serves(self) -> bool:
        """Whether its requests are served: no other state than `live` does so, even without a reason."""
        return self.status.state == "live" and not self.reason and not self.status.drain

    @property
    def in_flight(self) -> int:
        """Requests with its workers now."""
        return sum(queue.in_flight for queue in self.stats.queues)

    @property
    def oldest_s(self) -> float:
        """The age of the oldest request in seconds; 0 without one."""
        return max((queue.oldest_request_s for queue in self.stats.queues), default=0.0)

    @property
    def recoveries(self) -> int:
        """Replacements of its workers."""
        return self.status.epoch - 1

    def counter(self, name: str) -> int:
        """The sum of this counter of the workers."""
        return sum(queue.counters.get(name, 0) for queue in self.stats.queues)


class Queue(NamedTuple):
    """One queue of the device that is looked at, as a device of one queue, and its worker."""

    device: Device
    pid: int | None
    cpu: int | None
    share: Share | None


class Model:
    """Takes readings; the views show what it holds."""

    def __init__(self) -> None:
        self.time = ""
        self.elapsed_s: float | None = None
        self.daemon: DaemonStatus | None = None
        self.shares: Mapping[Owner, Share] = {}
        self.devices: dict[str, Device] = {}
        self.totals: deque[Point] = deque(maxlen=HISTORY)
        self.events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self.trouble = ""
        """Why the last reading failed, or why the daemon is silent."""
        self.has_failed = False
        """Whether that reading is over, and the daemon is asked again at the end of an interval."""
        self._measured: dict[str, Measured] = {}
        self._histories: dict[str, deque[Point]] = {}

    def take(self, reading: Reading) -> None:
        """Keep this reading in place of the last one."""
        self.trouble = ""
        interval = reading.interval
        self.time, self.elapsed_s = interval.time, interval.elapsed_s
        self.daemon, self.shares = reading.daemon, reading.shares
        self.events.extend(reading.events)
        self._measured = {each.stats.name: each for each in interval.devices}
        statuses = {each.name: each for each in reading.statuses}
        # A device may have come or gone between the two questions.
        names = [name for name in statuses if name in self._measured]
        self._histories = {name: self._histories.get(name) or deque(maxlen=HISTORY) for name in names}
        self.devices = {name: self._device(statuses[name], self._measured[name]) for name in names}
        self.totals.append(_total(self.devices.values()))

    def lose(self, trouble: str, has_failed: bool = False) -> None:
        """The daemon does not answer; what it told last stays."""
        self.trouble, self.has_failed = trouble, has_failed

    def queues(self, name: str) -> list[Queue]:
        """The queues of this device, each by itself."""
        device = self.devices.get(name)
        if device is None:
            return []
        workers = {each.queue: each for each in device.status.workers}
        found = []
        for measured in queues_between(self._measured[name], self.elapsed_s or 0.0, self.time):
            number = measured.stats.queues[0].queue
            worker = workers.get(number)
            alone = _alone(device.status, measured, ())
            pid, cpu = (None, None) if worker is None else (worker.pid, worker.cpu)
            found.append(Queue(alone, pid, cpu, self.shares.get(Owner("worker", name, str(number)))))
        return found

    def _device(self, status: DeviceStatus, measured: Measured) -> Device:
        history = self._histories[status.name]
        device = _alone(status, measured, history)
        history.append(_point(device))
        return device


def _alone(status: DeviceStatus, measured: Measured, history: Sequence[Point]) -> Device:
    stats, rates, latencies = measured.stats, measured.rates, measured.latencies
    if latencies is None:
        return Device(status, stats, rates, None, history)
    whole = whole_request(latencies)
    return Device(status, stats, rates, latencies, history, quantile(whole, 0.5), quantile(whole, 0.99))


def _point(device: Device) -> Point:
    rates = device.rates
    if rates is None:
        return Point(None, None, None, (None,) * len(KINDS))
    kinds = tuple(getattr(rates.latency, kind).p99_s for kind in KINDS)
    return Point(rates.requests_per_s.read, rates.requests_per_s.write, device.p99_s, kinds)


def _total(devices: Iterable[Device]) -> Point:
    last = [each.history[-1] for each in devices]
    slowest = max((each.p99_s for each in last if each.p99_s is not None), default=None)
    return Point(_sum([each.reads for each in last]), _sum([each.writes for each in last]), slowest, ())


def _sum(rates: Sequence[float | None]) -> float | None:
    """The sum of the rates that are known; None if there are rates, but none is known."""
    known = [each for each in rates if each is not None]
    return sum(known) if known or not rates else None
