"""What the kernel has on the books: CPU time, requests of a disk, memory of a process."""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_FIELDS = {"Pss": "pss", "Private_Clean": "uss", "Private_Dirty": "uss"}


class Cpu(NamedTuple):
    """CPU time in seconds."""

    user_s: float
    system_s: float

    def __sub__(self, other: "Cpu") -> "Cpu":
        return Cpu(self.user_s - other.user_s, self.system_s - other.system_s)


class Memory(msgspec.Struct, frozen=True):
    """A process's memory in KiB: its share of what it shares, and what only it has."""

    pss_kib: int
    uss_kib: int


class Books(NamedTuple):
    """A moment: what the whole machine, groups of processes and a disk had done by then."""

    machine: Cpu
    parts: dict[str, Cpu]
    requests: int


def take_books(node: str, parts: Mapping[str, Iterable[int]]) -> Books:
    """The books of this moment; `parts` names groups of process ids."""
    return Books(machine_cpu(), {name: cpu_of(pids) for name, pids in parts.items()}, requests_done(node))


def machine_cpu() -> Cpu:
    """What all CPUs have worked: interrupts count as the system's."""
    with Path("/proc/stat").open() as stat:
        user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, stat.readline().split()[1:])
    return Cpu((user + nice) / _TICKS_PER_S, (system + irq + softirq) / _TICKS_PER_S)


def cpu_of(pids: Iterable[int]) -> Cpu:
    """What these processes have worked, all threads together; one that has ended counts nothing."""
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
    """For each hardware queue of a disk, of several the first, the CPUs whose requests come to it."""
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
    """The kernel threads and processes whose name begins so."""
    found = []
    for each in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if each.read_text().startswith(prefix):
                found.append(int(each.parent.name))
    return found
