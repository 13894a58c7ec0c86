"""The rounds: every contestant is up, and each cell of each round runs on all of them, one after the other.

So changes of the machine meanwhile affect all contestants.  Contestants that are not being measured are stopped
(SIGSTOP).  One that fails is reported and left out of the rest; the others go on.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.accounts import Books, busy_share, machine_cpu, memory_of, parts_shares, requests_done
from bench.cells import CELLS, Cell, FioNumbers, cells_of
from bench.contestants import Contestant
from bench.exact import spoken_exactly
from bench.results import Party, Result, Sample, Syscalls
from bench.stage import Disk, Disks, Stage, put_to_sleep, wake_up
from bench.syscalls import SyscallsError, counted, counting
from bench.watched import FAILURES_OF_A_RUN, run_fio, write_end
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.status import DeviceStats

FAILURES = (*FAILURES_OF_A_RUN, DaemonError, AssertionError)
COUNTED = ("enters", "turns", "wakeups", "bells", "commits", "descriptors_in", "descriptors_out")
_IDLE_S = 3.0
Say = Callable[[str], None]


class Entered:
    """A contestant that is up, until it fails."""

    def __init__(self, contestant: Contestant, disks: Disks, stack: ExitStack) -> None:
        self.contestant = contestant
        self.disks = disks
        self.stack = stack


def measure(
    stage: Stage, table: Sequence[Contestant], result: Result, say: Say, keep: Callable[[Result], None]
) -> None:
    """Run all rounds into `result`; calls `keep` after each cell with the results so far."""
    entered = [each for each in (_enter(stage, one, result, say) for one in table) if each]
    result.idle_load = idle_load(_IDLE_S)
    say(f"everybody is up; idle, {result.idle_load:.1%} of the CPUs' time is used")
    try:
        for number in range(result.rounds):
            for cell in cells_of(result.mode):
                line = [
                    _run_cell(stage, each, cell, number, result, say) for each in _rotated(entered, number)
                ]
                entered = [each for each in entered if each in [one for one in line if one]]
                keep(result)
        # These do not depend on one CPU, so the ordinary modes measure them.
        if not result.exact:
            _count_syscalls(entered, result, say)
    finally:
        for each in reversed(entered):
            _leave(each, result, say)
    keep(result)


def idle_load(seconds: float) -> float:
    """The share of all CPUs' time in use without any request: the idle contestants' share."""
    before = machine_cpu()
    time.sleep(seconds)
    return sum(machine_cpu() - before) / seconds / (os.cpu_count() or 1)


def _rotated(entered: Sequence[Entered], number: int) -> list[Entered]:
    """The order of a round, so that no contestant always follows the same one."""
    start = number * (len(entered) // 3 + 1) % max(1, len(entered))
    return [*entered[start:], *entered[:start]]


def _enter(stage: Stage, contestant: Contestant, result: Result, say: Say) -> Entered | None:
    started_s = time.monotonic()
    stack = ExitStack()
    try:
        disks = stack.enter_context(contestant.start(stage, contestant.slug))
        for disk in disks.all() if contestant.stores else []:
            write_end(disk)
        memory = _memory(disks.all()[0])
        # Before the stack stops contestants, because a process stopped by SIGSTOP could not end.
        stack.callback(wake_up, disks)
        put_to_sleep(disks)
    except FAILURES as error:
        _fail(contestant, error, result, say)
        _close(stack, contestant, say)
        return None
    result.parties.append(_party(contestant, memory=memory))
    say(f"{contestant.name}: up on {disks.all()[0].node} after {time.monotonic() - started_s:.1f} s")
    return Entered(contestant, disks, stack)


def _party(
    contestant: Contestant, *, memory: dict[str, tuple[int, int]] | None = None, error: str = ""
) -> Party:
    return Party(
        name=contestant.name,
        kind=contestant.kind,
        family=contestant.family,
        transport=contestant.transport,
        how=contestant.how,
        memory_kib=memory or {},
        error=error,
    )


def _memory(disk: Disk) -> dict[str, tuple[int, int]]:
    found = {}
    for part, pids in disk.parts.items():
        each = [memory_of(pid) for pid in pids if Path(f"/proc/{pid}/smaps_rollup").exists()]
        found[part] = (sum(one.pss_kib for one in each), sum(one.uss_kib for one in each))
    return found


def _count_syscalls(entered: Sequence[Entered], result: Result, say: Say) -> None:
    """Count in separate runs, because counting costs time; no table on a kernel that cannot count."""
    for each in entered:
        for cell in (CELLS[0], CELLS[1]):
            disk = each.disks.disk_for(cell)
            wake_up(each.disks)
            try:
                parts = syscalls_of(disk, cell, result.runtime_s)
            except SyscallsError as error:
                say(f"system calls are not counted: {error}")
                return
            except FAILURES as error:
                _fail(each.contestant, error, result, say)
                break
            finally:
                put_to_sleep(each.disks)
            result.syscalls.append(Syscalls(contestant=each.contestant.name, cell=cell.name, parts=parts))


def syscalls_of(disk: Disk, cell: Cell, runtime_s: float) -> dict[str, float]:
    """System calls for each request, by part.  Raises `FioError` or `SyscallsError`."""
    with counting() as histogram:
        requests = requests_done(disk.node)
        before = counted(histogram, disk.parts)
        run_fio(disk, cell, runtime_s)
        after = counted(histogram, disk.parts)
        done = max(1, requests_done(disk.node) - requests)
    return {part: (after[part] - before[part]) / done for part in after}


def _fail(contestant: Contestant, error: BaseException, result: Result, say: Say, when: str = "") -> None:
    text = " ".join(f"{when}{type(error).__name__}: {error}".split())[:400]
    say(f"{contestant.name}: FAILED: {text}")
    result.parties = [each for each in result.parties if each.name != contestant.name]
    result.parties.append(_party(contestant, error=text))


def _close(stack: ExitStack, contestant: Contestant, say: Say) -> None:
    try:
        stack.close()
    except FAILURES as error:
        say(f"{contestant.name}: while it was stopped: {error}")


def _leave(each: Entered, result: Result, say: Say) -> None:
    try:
        each.stack.close()
    except FAILURES as error:
        _fail(each.contestant, error, result, say)


def _run_cell(
    stage: Stage, each: Entered, cell: Cell, number: int, result: Result, say: Say
) -> Entered | None:
    disk = each.disks.disk_for(cell)
    before = _stats(stage, disk)
    wake_up(each.disks)
    try:
        numbers, books = run_fio(disk, cell, result.runtime_s)
    except FAILURES as error:
        _fail(each.contestant, error, result, say, f"round {number + 1}, {cell.name}: ")
        _close(each.stack, each.contestant, say)
        return None
    put_to_sleep(each.disks)
    counters = _per_request(before, _stats(stage, disk))
    sample = make_sample((each.contestant.name, cell, number), numbers, books, counters)
    result.samples.append(sample)
    spoken = spoken_exactly(sample) if result.exact else _spoken(sample, numbers.shown(cell), cell)
    say(f"round {number + 1}, {cell.name}, {each.contestant.name}: {spoken}")
    return each


def _spoken(sample: Sample, shown: float, cell: Cell) -> str:
    parts = ", ".join(f"{name} {user:.0f}+{system:.0f}" for name, (user, system) in sample.parts_us.items())
    return f"{shown:,.0f} {cell.unit}; {sample.machine_us:.0f} us CPU a request ({parts})"


def make_sample(
    run: tuple[str, Cell, int], numbers: FioNumbers, books: tuple[Books, Books], counters: dict[str, float]
) -> Sample:
    """The numbers of one run (contestant, cell, round), with CPU time per request."""
    name, cell, number = run
    first, second = books
    requests = max(1, second.requests - first.requests)
    machine = second.machine - first.machine
    parts = {part: second.parts[part] - first.parts[part] for part in second.parts}
    return Sample(
        contestant=name,
        cell=cell.name,
        round=number,
        iops=numbers.iops,
        bytes_per_s=numbers.bytes_per_s,
        latency_us=numbers.latency_us,
        machine_us=(machine.user_s + machine.system_s) * 1e6 / requests,
        parts_us={
            part: (cpu.user_s * 1e6 / requests, cpu.system_s * 1e6 / requests) for part, cpu in parts.items()
        },
        busy=busy_share(first, second, os.cpu_count() or 1),
        shares=parts_shares(first, second, os.cpu_count() or 1),
        counters=counters,
    )


def _stats(stage: Stage, disk: Disk) -> DeviceStats | None:
    return stage.daemon.stats(disk.device) if disk.device else None


def _per_request(before: DeviceStats | None, after: DeviceStats | None) -> dict[str, float]:
    """The workers' counters between two moments, per request; bytes copied per byte moved."""
    if before is None or after is None:
        return {}
    old, new = _sums(before), _sums(after)
    grown = {name: new[name] - old[name] for name in new}
    requests, moved = max(1, grown.pop("requests")), max(1, grown.pop("bytes"))
    found = {name: grown[name] / requests for name in COUNTED if name in grown}
    return found | {name: grown[name] / moved for name in ("kernel_bytes", "own_bytes")}


def _sums(stats: DeviceStats) -> dict[str, int]:
    queues = stats.queues
    found = {name: sum(each.counters.get(name, 0) for each in queues) for name in COUNTED}
    found["requests"] = sum(each.requests.read + each.requests.write for each in queues)
    found["bytes"] = sum(each.bytes.read + each.bytes.write for each in queues)
    found["kernel_bytes"] = sum(each.copies.kernel_bytes for each in queues)
    found["own_bytes"] = sum(each.copies.own_bytes for each in queues)
    return found
