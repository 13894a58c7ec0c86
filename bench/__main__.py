"""The command line: `python -m bench fetch | cost | measure | growth | density | doorbell | report`; `make bench` calls
it in this order.

`measure`, `growth`, `density` and `doorbell` run where the driver is, in the guest or on the machine itself, as root.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from bench.doorbell import DoorbellError, build_doorbell
from bench.instructions import CostError, InstructionCost, count_instructions
from bench.kublk import KublkError, build_kublk
from support.guest.apt_archive import ArchiveError

if TYPE_CHECKING:
    from bench.stage import Stage

MODES = {"quick": (3, 0.7), "full": (7, 3.0), "exact": (2, 0.2), "nbd": (3, 0.7), "rbd": (2, 1.0)}
"""Rounds, and seconds for each cell."""
KUBLK, COST, DOORBELL = "kublk", "instructions.json", "doorbell"
_NOT_EXACT = "mode exact needs a guest in which time is instructions: `make bench MODE=exact` starts one"
_directory = click.Path(file_okay=False, path_type=Path)


@click.group(help=__doc__)
def main() -> None:
    """The command line."""


@main.command()
@click.argument("out", type=_directory)
def fetch(out: Path) -> None:
    """Build the peers that come as source, and put them where the guest finds them."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy2(build_kublk(), out / KUBLK)
    build_doorbell(out / DOORBELL)
    say("kublk is ready")


@main.command()
@click.argument("out", type=_directory)
def cost(out: Path) -> None:
    """Count the instructions of the queue core."""
    say("counting instructions")
    found = count_instructions()
    (out / COST).write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))


@main.command(name="measure")
@click.option("--mode", type=click.Choice(list(MODES)), default="quick", show_default=True)
@click.option("--only", default="", help="Contestants whose name matches this regular expression.")
@click.option("--rounds", type=int, help="Instead of the mode's.")
@click.option("--runtime", "runtime_s", type=float, metavar="SECONDS", help="Instead of the mode's.")
@click.option("--revision", default="", help="What is measured, for the report.")
@click.option("--host-load", default="", help="What else runs on the host, for the report.")
@click.argument("out", type=_directory)
def run_measure(
    mode: str,
    only: str,
    rounds: int | None,
    runtime_s: float | None,
    revision: str,
    host_load: str,
    out: Path,
) -> None:
    """Measure on this kernel; status 1 if a contestant failed."""
    from bench.contestants import quick, table_of
    from bench.measure import measure
    from bench.ours import transports
    from bench.results import Result, write_result

    if mode == "exact" and not _is_exact():
        raise click.ClickException(_NOT_EXACT)
    result = Result(
        kernel=platform.release(),
        date=_today(),
        mode=mode,
        cpus=os.cpu_count() or 1,
        emulated=_is_emulated(),
        exact=_is_exact(),
        rounds=rounds or MODES[mode][0],
        runtime_s=runtime_s or MODES[mode][1],
        revision=revision,
        host_load=host_load,
    )
    offered = transports(_backend_help())
    table = table_of(mode, offered, only)
    if mode in ("quick", "exact") and not only:
        table = quick(table)
    path = result_path(out, mode if mode in ("nbd", "rbd") else "speed")
    with _stage(out) as stage:
        measure(stage, table, result, say, lambda each: write_result(each, path))
    sys.exit(1 if result.failed else 0)


@main.command(name="growth")
@click.option("--devices-max", default=64, show_default=True)
@click.option("--only", default="", help="Axes whose name matches: depth, bytes, pool, devices.")
@click.option("--revision", default="", help="What is measured, for the report.")
@click.option("--host-load", default="", help="What else runs on the host, for the report.")
@click.argument("out", type=_directory)
def run_growth(devices_max: int, only: str, revision: str, host_load: str, out: Path) -> None:
    """Measure the cost of requests as load and devices grow, on this kernel; status 1 if a measurement failed."""
    from bench.growth import grow
    from bench.growth_results import Growth
    from bench.results import write_result

    growth = Growth(
        kernel=platform.release(),
        date=_today(),
        cpus=os.cpu_count() or 1,
        emulated=_is_emulated(),
        exact=_is_exact(),
        revision=revision,
        host_load=host_load,
    )
    path = result_path(out, "growth")
    with _stage(out) as stage:
        grow(stage, growth, say, lambda each: write_result(each, path), devices_max, only)
    sys.exit(1 if growth.errors else 0)


@main.command(name="density")
@click.option("--devices", default=100, show_default=True, help="How many live at once.")
@click.option("--rounds", default=5, show_default=True, help="How often each kind of device comes and goes.")
@click.option("--revision", default="", help="What is measured, for the report.")
@click.option("--host-load", default="", help="What else runs on the host, for the report.")
@click.argument("out", type=_directory)
def run_density(devices: int, rounds: int, revision: str, host_load: str, out: Path) -> None:
    """Measure how fast devices come and go, and what idle ones take; status 1 if a measurement failed."""
    from bench.density import measure_density
    from bench.density_results import Density
    from bench.results import write_result

    density = Density(
        kernel=platform.release(),
        date=_today(),
        cpus=os.cpu_count() or 1,
        emulated=_is_emulated(),
        revision=revision,
        host_load=host_load,
    )
    path = result_path(out, "density")
    # Without what the tests watch for in the daemon, which costs each of its calls something.
    with _stage(out, "ublkpool.daemon") as stage:
        measure_density(stage, density, say, lambda each: write_result(each, path), devices, rounds)
    sys.exit(1 if density.errors else 0)


@main.command(name="doorbell")
@click.option("--revision", default="", hidden=True)
@click.option("--host-load", default="", hidden=True)
@click.argument("out", type=_directory)
def run_doorbell(revision: str, host_load: str, out: Path) -> None:
    """Measure the cost of waking another process on this kernel."""
    from bench.doorbell import Doorbells, ring_doorbells
    from bench.results import write_result

    found = Doorbells(kernel=platform.release(), date=_today(), emulated=_is_emulated(), exact=_is_exact())
    ring_doorbells((out / DOORBELL).absolute(), found, say)
    write_result(found, result_path(out, "doorbell"))


@main.command()
@click.option("--into", type=_directory, help="Write the report there; otherwise beside the numbers.")
@click.option("--note", default="", help="What a reader must know; goes to the head of the report.")
@click.argument("out", type=_directory)
def report(into: Path | None, note: str, out: Path) -> None:
    """Make tables and charts of the measurements."""
    from bench.publish import publish

    print(publish(out, into or out, _instructions(out), note))


def _instructions(out: Path) -> list[InstructionCost]:
    path = out / COST
    return msgspec.json.decode(path.read_bytes(), type=list[InstructionCost]) if path.exists() else []


@contextmanager
def _stage(out: Path, module: str = "support.vm.watched_daemon") -> Iterator["Stage"]:
    from bench.stage import Stage

    # The peers' programs are not on every user's path.
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    scratch = tempfile.TemporaryDirectory(prefix="ublkpool-bench-", dir="/dev/shm")
    with scratch as directory, Stage(Path(directory), (out / KUBLK).absolute(), module) as stage:
        yield stage


def _backend_help() -> str:
    command = [sys.executable, "-m", "ublkpool.daemon", "backend", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def _is_emulated() -> bool:
    return "UBLKPOOL_GUEST" in os.environ and os.environ.get("UBLKPOOL_KVM") != "1"


def _is_exact() -> bool:
    return os.environ.get("UBLKPOOL_EXACT") == "1"


def result_path(out: Path, what: str) -> Path:
    """The path of a run's result; an exact run has a file of its own."""
    return out / f"{what}-{'exact-' if _is_exact() else ''}{_series()}.json"


def _series() -> str:
    return ".".join(platform.release().split(".")[:2])


def say(text: str) -> None:
    """A line of progress."""
    print(f"bench: {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (KublkError, CostError, ArchiveError, DoorbellError) as error:
        sys.exit(f"bench: {error}")
