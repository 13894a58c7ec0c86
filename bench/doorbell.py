"""The cost of waking the other process, and of what the backend sleeps in.

`csrc/doorbell.c` is two processes that pass one descriptor back and forth.  Each way runs once per round, so that
changes of the machine meanwhile affect all of them; ratios are made within a round, against the way that the rings use.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.ratios import Spread, spread
from bench.tables import markdown_table, number

USED = "eventfd-ring"
WAYS = {
    USED: "eventfds, written and polled by io_uring (what the rings use)",
    "eventfd-write": "eventfds, write(2) on both sides",
    "futex-ring": "futexes, woken by io_uring",
    "futex-call": "futexes, futex(2)",
    "backend-writes": "as the first, the backend with write(2)",
    "backend-in-epoll": "so, and the backend sleeps in epoll_wait",
    "backend-in-read": "write(2) on both sides, the backend sleeps in read(2)",
    "backend-in-futex": "worker futex(2), backend write(2), which sleeps in futex(2)",
    "backend-in-futex-sqe": "so, the worker through io_uring",
    "backend-in-ring-futex": "worker futex(2), backend write(2), which sleeps in IORING_OP_FUTEX_WAIT",
    "socket": "worker send(MSG_DONTWAIT), backend write(2), which sleeps in read(2)",
    "pipe": "worker write(2) to a pipe opened anew, backend write(2), which sleeps in read(2)",
    "ring-message": "worker IORING_OP_MSG_RING, backend write(2)",
    "calls-only": "eventfds, write(2) and read(2) on both sides, no io_uring: the least",
}
ROUNDS, RUN_MS = 5, 500
EXACT_ROUNDS, EXACT_RUN_MS = 1, 100
"""Where time is instructions: a second is minutes of the host there, and runs do not differ."""
UNKNOWN_WAY = 3
_SOURCE = Path(__file__).parent / "csrc" / "doorbell.c"
_PATIENCE_S = 60.0


class DoorbellError(Exception):
    """The measurement failed; the text is one line."""


class Trip(msgspec.Struct, frozen=True, kw_only=True):
    """One run: round trips per second, CPU time of both processes per round trip in microseconds."""

    way: str
    cpus: tuple[int, int]
    round: int
    trips_per_s: float
    cpu_us: float


class Doorbells(msgspec.Struct, kw_only=True):
    """All runs on one kernel."""

    kernel: str
    date: str
    emulated: bool
    exact: bool = False
    """Each nanosecond is an instruction: an exact guest."""
    trips: list[Trip] = []
    missing: list[str] = []
    """Ways that this kernel does not have."""


def build_doorbell(target: Path) -> None:
    """Compile the program.  Raises `DoorbellError`."""
    command = [
        "gcc",
        "-std=gnu11",
        "-D_GNU_SOURCE",
        "-O2",
        "-Wall",
        "-Wextra",
        "-o",
        str(target),
        str(_SOURCE),
        "-luring",
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise DoorbellError(f"{_SOURCE.name} does not compile: {' '.join(built.stderr.split())[:300]}")


def ring_doorbells(program: Path, found: Doorbells, say: Callable[[str], None]) -> None:
    """Run all rounds into `found`, with a CPU for each process and with one for both.  Raises `DoorbellError`."""
    usable = sorted(os.sched_getaffinity(0))
    places = [(usable[0], usable[-1]), (usable[0], usable[0])]
    for each in range(EXACT_ROUNDS if found.exact else ROUNDS):
        for cpus in dict.fromkeys(places):
            for way in WAYS:
                if way not in found.missing:
                    _run(program, way, cpus, each, found)
        say(f"doorbells, round {each + 1}")


def _run(program: Path, way: str, cpus: tuple[int, int], in_round: int, found: Doorbells) -> None:
    command = [str(program), way, *map(str, cpus), str(EXACT_RUN_MS if found.exact else RUN_MS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    if done.returncode == UNKNOWN_WAY:
        found.missing.append(way)
        return
    if done.returncode:
        said = " ".join(done.stderr.split())[-200:]
        raise DoorbellError(f"{way}: ended with {done.returncode}: {said}")
    trips, cpu_us = map(float, done.stdout.split())
    found.trips.append(Trip(way=way, cpus=cpus, round=in_round, trips_per_s=trips, cpu_us=cpu_us))


def doorbell_report(found: Doorbells) -> str:
    """A table for each placement."""
    where = ", exact" if found.exact else ", emulated" if found.emulated else ""
    rounds = max((each.round + 1 for each in found.trips), default=0)
    sections = [
        f"## Doorbells, Linux {found.kernel}\n\n{found.date}{where}. Medians and ranges of {rounds} rounds.\n"
    ]
    for cpus in dict.fromkeys(each.cpus for each in found.trips):
        title = "a CPU each" if cpus[0] != cpus[1] else "both on one CPU"
        rows = [_row(found, way, cpus) for way in WAYS if way not in found.missing]
        unit = "instructions a round trip" if found.exact else "round trips a second"
        head = ["way", unit, "ratio", "range", "CPU us a round trip"]
        sections.append(f"### {title}\n\n" + markdown_table(head, rows))
    if found.missing:
        sections.append(f"This kernel does not have: {', '.join(found.missing)}.\n")
    return "\n".join(sections)


def _row(found: Doorbells, way: str, cpus: tuple[int, int]) -> list[str]:
    mine, used = (
        {each.round: each for each in found.trips if (each.way, each.cpus) == (one, cpus)}
        for one in (way, USED)
    )
    rates = [each.trips_per_s for each in mine.values()]
    shown = spread([1e9 / rate for rate in rates] if found.exact else rates)
    ratio = spread([each.trips_per_s / used[at].trips_per_s for at, each in mine.items() if at in used])
    cpu = spread([each.cpu_us for each in mine.values()])
    return [WAYS[way], _middle(shown), *_ratio(ratio), _middle(cpu)]


def _middle(found: Spread | None) -> str:
    return number(found.median) if found else ""


def _ratio(found: Spread | None) -> list[str]:
    return [f"{found.median:.2f}", f"{found.low:.2f} to {found.high:.2f}"] if found else ["", ""]
