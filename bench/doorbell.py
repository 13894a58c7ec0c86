"""The cost of waking the other process: an eventfd against a futex, each rung by io_uring and by a system call.

`csrc/doorbell.c` is two processes that pass one descriptor back and forth.  Each way runs once per round, so that
changes of the machine meanwhile affect all of them; ratios are made within a round, against the way that the rings use.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench.ratios import Spread, spread
from bench.tables import markdown_table, number

USED = "eventfd-ring"
WAYS = {
    USED: "eventfd, written by io_uring (what the rings use)",
    "eventfd-write": "eventfd, write(2)",
    "futex-ring": "futex, woken by io_uring",
    "futex-call": "futex, futex(2)",
}
ROUNDS = 5
RUN_MS = 500
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
    for each in range(ROUNDS):
        for cpus in dict.fromkeys(places):
            for way in WAYS:
                if way not in found.missing:
                    _run(program, way, cpus, each, found)
        say(f"doorbells, round {each + 1}")


def _run(program: Path, way: str, cpus: tuple[int, int], in_round: int, found: Doorbells) -> None:
    command = [str(program), way, *map(str, cpus), str(RUN_MS)]
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
    where = ", emulated" if found.emulated else ""
    sections = [
        f"## Doorbells, Linux {found.kernel}\n\n{found.date}{where}. Medians and ranges of {ROUNDS} rounds.\n"
    ]
    for cpus in dict.fromkeys(each.cpus for each in found.trips):
        title = "a CPU each" if cpus[0] != cpus[1] else "both on one CPU"
        rows = [_row(found.trips, way, cpus) for way in WAYS if way not in found.missing]
        head = ["way", "round trips a second", "ratio", "range", "CPU us a round trip"]
        sections.append(f"### {title}\n\n" + markdown_table(head, rows))
    if found.missing:
        sections.append(f"This kernel does not have: {', '.join(found.missing)}.\n")
    return "\n".join(sections)


def _row(trips: Sequence[Trip], way: str, cpus: tuple[int, int]) -> list[str]:
    mine, used = (
        {each.round: each for each in trips if (each.way, each.cpus) == (one, cpus)} for one in (way, USED)
    )
    rate = spread([each.trips_per_s for each in mine.values()])
    ratio = spread([each.trips_per_s / used[at].trips_per_s for at, each in mine.items() if at in used])
    cpu = spread([each.cpu_us for each in mine.values()])
    return [WAYS[way], _middle(rate), *_ratio(ratio), _middle(cpu)]


def _middle(found: Spread | None) -> str:
    return number(found.median) if found else ""


def _ratio(found: Spread | None) -> list[str]:
    return [f"{found.median:.2f}", f"{found.low:.2f} to {found.high:.2f}"] if found else ["", ""]
