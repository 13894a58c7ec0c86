"""The objects of `list --json` and `stats --json`.

Owns their fields, which scripts rely on: fields are added, never renamed.  Must not know where the values come from.
"""

from typing import Literal

import msgspec

Drain = Literal["", "draining", "drained"]
State = Literal["waiting", "live", "quiesced", "recovering", "failed"]


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The worker of one hardware queue; `cpu` is None if the worker is not pinned to a CPU."""

    queue: int
    pid: int
    cpu: int | None = None


class BackendStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The attached backend or, if none is attached, the one that the daemon runs; None where there is neither."""

    kind: str | None = None
    pid: int | None = None
    attached: bool = False


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One device.  `id`, `path` and `size_bytes` are None until they are known; `reason`: why it does not serve."""

    name: str
    id: int | None
    path: str | None
    state: State
    size_bytes: int | None
    queues: int
    depth: int
    need_get_data: bool
    placement: Literal["pool", "backend"]
    recovery: Literal["reissue", "abort", "fail", "none"]
    flags: tuple[str, ...] = ()
    workers: tuple[WorkerStatus, ...] = ()
    backend: BackendStatus = BackendStatus()
    reason: str = ""
    epoch: int = 1
    """Incremented by each recovery from a worker's death."""
    answers: Literal["backend", "worker"] = "backend"
    isolation: Literal["process", "none"] = "process"
    """none: the workers run the backend's engine themselves, and it has no process of its own."""
    zero_copy: bool = False
    """The file's I/O runs on the clients' own pages; `need_get_data` is false then, since nothing is copied."""
    drain: Drain = ""
    """drained: requests wait, and no backend may attach, until `ublkpool resume`."""
    differs: tuple[str, ...] = ()
    """`KEY=VALUE (config: VALUE)` for each setting that is not what the config says."""
    iops_max: int = 0
    bytes_per_s_max: int = 0
    burst_s: float = 0.0
    """The limits that hold now; 0: none."""
    config_size_bytes: int | None = None
    """The config's size, if `ublkpool resize` has given the device another, which wins."""
    memory_bytes: int = 0
    """The memory that counts for `memory_max`."""

    @property
    def shown_placement(self) -> str:
        """Where the kernel copies a write's data to, in words."""
        if self.zero_copy:
            return "none (zero copy)"
        return self.placement if self.need_get_data else "at fetch"


class Reloaded(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload did with a device, or with the daemon's own settings, and what is left to do; empty if nothing."""

    name: str
    done: str = ""
    needs: str = ""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A setting of a device by the user's key: its value, the config's, and when a changed value takes effect."""

    key: str
    value: str
    configured: str
    applies: str


class ResizeResult(msgspec.Struct, frozen=True, kw_only=True):
    """A device's size before and after a resize, in bytes; equal if nothing changed."""

    before_bytes: int
    after_bytes: int


class OpCounts(msgspec.Struct, frozen=True, kw_only=True):
    """A count or a number of bytes for each operation."""

    read: int = 0
    write: int = 0
    flush: int = 0
    discard: int = 0
    write_zeroes: int = 0


class CopyStats(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes copied by the kernel (one copy per request), by ublkpool (none is the aim), and bytes not copied."""

    kernel_bytes: int = 0
    own_bytes: int = 0
    in_place_bytes: int = 0


class Bucket(msgspec.Struct, frozen=True, array_like=True):
    """The durations above the bucket before and up to `upper_s` seconds; None is the bucket without an upper bound."""

    upper_s: float | None
    count: int


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    """Durations since the queue was made: their number, their sum in nanoseconds, and the buckets that are not empty.

    Buckets are in the order of their bounds, each at most a quarter wider than its lower bound; `latency.py` has the
    bounds.  `count` is the sum of the buckets' counts.  In JSON a bucket is `[upper_s, count]`.
    """

    count: int = 0
    sum_ns: int = 0
    buckets: tuple[Bucket, ...] = ()


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """How long requests took, in real time, also while the worker was stopped.

    `read`, `write` and `other` (flush, discard, write zeroes): from the request's arrival in the worker to its commit,
    for each request in `requests`.  `buffer_wait`: each wait of a request for a buffer of the pool or for a region
    that its backend names; a request that need not wait is not in it.  `backend`: from the first time that a request
    was handed to a backend to the answer; a backend's death and the next backend's replay are part of it.
    """

    read: Histogram = Histogram()
    write: Histogram = Histogram()
    other: Histogram = Histogram()
    buffer_wait: Histogram = Histogram()
    backend: Histogram = Histogram()


class QueueStats(msgspec.Struct, frozen=True, kw_only=True):
    """One queue since its worker started; `counters` holds all of the worker's counters by name."""

    queue: int
    requests: OpCounts = OpCounts()
    bytes: OpCounts = OpCounts()
    errors: int = 0
    failed: OpCounts = OpCounts()
    """The same by operation, of workers that know it."""
    in_flight: int = 0
    oldest_request_s: float = 0.0
    """Seconds since the arrival of the oldest request in the worker, half a second too few at most; 0 without one."""
    buffers_held: int = 0
    buffers_waited: int = 0
    copies: CopyStats = CopyStats()
    counters: dict[str, int] = {}
    latency: Latencies = Latencies()


class PoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """A device's pool: its size, its buffers by state, and the number of buffers lent and returned since the start.

    `huge_bytes`: the part of the pool in huge pages; 0 with `huge_pages = "off"`.
    """

    size_bytes: int = 0
    huge_bytes: int = 0
    buffer_count: int = 0
    free_count: int = 0
    lent_count: int = 0
    waiting_count: int = 0
    lent_total: int = 0
    returned_total: int = 0
    counters: dict[str, int] = {}


class ClientStats(msgspec.Struct, frozen=True, kw_only=True):
    """A device's client area: slices lent to clients, free slices, and resting ones, which are not lent yet after a
    client's end."""

    slice_bytes: int = 0
    lent_count: int = 0
    resting_count: int = 0
    free_count: int = 0


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A process of the daemon that belongs to no device."""

    role: str
    """`supervisor`, `broker`, `holder` or `metrics`."""
    pid: int


class DaemonStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon itself."""

    version: str
    processes: tuple[ProcessStatus, ...] = ()
    memory_bytes: int = 0
    """Memory of all devices that counts for `memory_max`."""
    memory_max_bytes: int = 0
    """`memory_max`; 0: none."""
    prepared: int = 0
    """How many prepared devices an add can take now."""
    prepared_wanted: int = 0
    """How many the daemon keeps; 0: none are prepared."""


CUT_OFF_REASONS = (
    "frame",
    "kind",
    "identity",
    "unsolicited",
    "result",
    "foreign-segment",
    "range",
    "alignment",
    "lent",
    "region",
    "silence",
    "flood",
    "no-hello",
    "ring",
    "doorbell",
    "post",
    "engine",
    "fence",
    "stays",
    "attach-connection",
    "other",
)
"""Why a backend is cut off; docs/METRICS.md explains each."""


class DeviceStats(msgspec.Struct, frozen=True, kw_only=True):
    """One device's counters; `reason`: why it does not serve, empty if it does; `latency`: of all its queues."""

    name: str
    reason: str = ""
    queues: tuple[QueueStats, ...] = ()
    pool: PoolStats = PoolStats()
    clients: ClientStats = ClientStats()
    memory_bytes: int = 0
    """The memory that counts for `memory_max`."""
    cut_offs: dict[str, int] = {}
    """How often this daemon has cut a backend off, for each of `CUT_OFF_REASONS` for which it has."""
    latency: Latencies = Latencies()
