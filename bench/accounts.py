"""What the kernel counts: CPU time, requests of a disk, memory of a process."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from support.threads import of_each_thread

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_FIELDS = {"Pss": "pss", "Private_Clean": "uss", "Private_Dirty": "uss"}


class Cpu(NamedTuple):
    """CPU time in seconds."""

    user_s: float
    system_s: float

    def __sub__(self, other: "Cpu") -> "Cpu":
        return Cpu(self.user_s - other.user_s, self.system_s - other.system_s)


class Memory(msgspec.Struct, frozen=True):
    """A process's memory in KiB: proportional share (PSS), and pages of this process only (USS)."""

    pss_kib: int
    uss_kib: int


class Books(NamedTuple):
    """The counters of one moment: of the whole machine, of groups of processes and of a disk."""

    machine: Cpu
    parts: dict[str, Cpu]
    requests: int
    at_ns: int = 0
    ran_ns: int = 0
    """Run time of all tasks in ns, as the scheduler counts it; the CPU times above are counted in ticks."""
    parts_ran_ns: Mapping[str, int] = {}


class Threads(NamedTuple):
    """The threads of some processes whose names begin with one of `names`."""

    pids: Sequence[int]
    names: tuple[str, ...]


def take_books(
    node: str, parts: Mapping[str, Iterable[int]], threads: Mapping[str, Threads] | None = None
) -> Books:
    """The counters of this moment; `parts` names groups of process ids, `threads` groups of their threads, which are
    counted once more."""
    # Read first, because the scheduler has not yet counted the running task, which is this process since it woke up.
    at_ns, ran_ns = time.monotonic_ns(), machine_ran_ns()
    return Books(
        machine_cpu(),
        {name: cpu_of(pids) for name, pids in parts.items()},
        requests_done(node),
        at_ns,
        ran_ns,
        {name: ran_ns_of(pids) for name, pids in parts.items()}
        | {name: ran_ns_of(each.pids, each.names) for name, each in (threads or {}).items()},
    )


def busy_share(first: Books, second: Books, cpus: int) -> float:
    """The share (0 to 1) of the CPUs' time between two moments in which tasks ran."""
    return (second.ran_ns - first.ran_ns) / max(1, second.at_ns - first.at_ns) / cpus


def parts_shares(first: Books, second: Books, cpus: int) -> dict[str, float]:
    """The share of each part in the CPUs' time between two moments."""
    passed_ns = max(1, second.at_ns - first.at_ns) * cpus
    return {
        part: (ran_ns - first.parts_ran_ns[part]) / passed_ns for part, ran_ns in second.parts_ran_ns.items()
    }


def machine_ran_ns() -> int:
    """Run time of tasks on all CPUs in ns; 0 if this kernel does not count it."""
    with suppress(OSError):
        lines = Path("/proc/schedstat").read_text().splitlines()
        return sum(int(line.split()[7]) for line in lines if line.startswith("cpu"))
    return 0


def ran_ns_of(pids: Iterable[int], names: tuple[str, ...] = ()) -> int:
    """Run time of these processes' threads in ns, or of those with such names; an ended process counts 0."""
    ran_ns = 0
    for pid in pids:
        called = of_each_thread(pid, "comm")
        for thread, text in of_each_thread(pid, "schedstat").items():
            if not names or called.get(thread, "").startswith(names):
                ran_ns += int(text.split()[0])
    return ran_ns


def machine_cpu() -> Cpu:
    """CPU time of all CPUs; time in interrupts counts as system time."""
    with Path("/proc/stat").open() as stat:
        user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, stat.readline().split()[1:])
    return Cpu((user + nice) / _TICKS_PER_S, (system + irq + softirq) / _TICKS_PER_S)


def cpu_of(pids: Iterable[int]) -> Cpu:
    """CPU time of these processes, all threads together; a process that has ended counts 0."""
    user = system = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user += int(fields[11])
            system += int(fields[12])
    return Cpu(user / _TICKS_PER_S, system / _TICKS_PER_S)


def has_ended(pid: int) -> bool:
    """Whether a process has died, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def requests_done(nodes: str) -> int:
    """Reads and writes that disks have completed; several nodes are joined by colons, as fio takes them."""
    return sum(_requests_done(node) for node in nodes.split(":"))


def _requests_done(node: str) -> int:
    fields = Path(f"/sys/block/{Path(node).name}/stat").read_text().split()
    return int(fields[0]) + int(fields[4])


def queue_cpus(nodes: str) -> list[list[int]]:
    """For each hardware queue of a disk (the first of several), the CPUs whose requests come to it."""
    directory = Path(f"/sys/block/{Path(nodes.partition(':')[0]).name}/mq")
    queues = sorted(directory.iterdir(), key=lambda each: int(each.name))
    return [[int(cpu) for cpu in (each / "cpu_list").read_text().split(",")] for each in queues]


def memory_of(pid: int) -> Memory:
    """A process's memory now."""
    return parse_smaps(Path(f"/proc/{pid}/smaps_rollup").read_text())


def parse_smaps(text: str) -> Memory:
    """The text of smaps_rollup."""
    found = {"pss": 0, "uss": 0}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in _PAGE_FIELDS:
            found[_PAGE_FIELDS[name]] += int(rest.split()[0])
    return Memory(found["pss"], found["uss"])


def threads_named(prefix: str) -> list[int]:
    """The kernel threads and processes whose name begins with this text."""
    found = []
    for each in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if each.read_text().startswith(prefix):
                found.append(int(each.parent.name))
    return found
