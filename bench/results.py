"""The results of a run, as stored in JSON; tables and charts are made of these alone."""

from pathlib import Path
from typing import Literal

import msgspec

Transport = Literal["", "zeromq", "ring"]
CLUSTER = "cluster"
"""The part of a run's processes that are the servers of a Ceph cluster."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One run of fio.  CPU times are microseconds for each request; `counters` are per request."""

    contestant: str
    cell: str
    round: int
    iops: float = 0.0
    bytes_per_s: float = 0.0
    latency_us: float = 0.0
    machine_us: float = 0.0
    parts_us: dict[str, tuple[float, float]] = {}
    """CPU time by part of the contestant, such as worker and backend: (user, system)."""
    busy: float = 0.0
    """The share of the CPUs' time in which tasks ran."""
    shares: dict[str, float] = {}
    """The share of each part in the CPUs' time, counted by the scheduler and not in ticks."""
    counters: dict[str, float] = {}
    error: str = ""


class Syscalls(msgspec.Struct, frozen=True, kw_only=True):
    """System calls for each request, by part."""

    contestant: str
    cell: str
    parts: dict[str, float]


class Party(msgspec.Struct, frozen=True, kw_only=True):
    """A contestant as it was run; memory in KiB, idle, by part: (PSS, USS) of all its processes."""

    name: str
    kind: str
    """The name without the transport."""
    family: str
    transport: Transport = ""
    how: str = ""
    memory_kib: dict[str, tuple[int, int]] = {}
    error: str = ""


class Result(msgspec.Struct, kw_only=True):
    """A whole run on one kernel."""

    kernel: str
    date: str
    mode: str
    cpus: int
    emulated: bool
    exact: bool = False
    """Measured where each instruction takes 1 ns."""
    rounds: int
    runtime_s: float
    idle_load: float = 0.0
    """The share of the CPUs' time in use while all contestants are up and idle."""
    revision: str = ""
    host_load: str = ""
    """The host's load average over the minute before the run."""
    parties: list[Party] = []
    samples: list[Sample] = []
    syscalls: list[Syscalls] = []

    @property
    def rounds_done(self) -> int:
        """The number of rounds with results; an interrupted run keeps its complete cells."""
        return len({each.round for each in self.samples})

    @property
    def failed(self) -> bool:
        """Whether anything failed."""
        return any(each.error for each in self.parties) or any(each.error for each in self.samples)


def write_result(result: msgspec.Struct, path: Path) -> None:
    """Write the file atomically."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    partial.rename(path)


def read_result(path: Path) -> Result:
    """Read a result.  Raises `msgspec.DecodeError` if the file is no result."""
    return msgspec.json.decode(path.read_bytes(), type=Result)
