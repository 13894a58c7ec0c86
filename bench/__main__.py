"""The command line: `python -m bench fetch | measure | report`; `make bench` calls it in this order.

`measure` runs where the driver is, in the guest or on the machine itself, as root.
"""

import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import click

from bench.contestants import contestants
from bench.kublk import KublkError, build_kublk, kublk_path
from bench.measure import measure
from bench.ours import transports
from bench.results import Result, write_result
from bench.stage import Stage

MODES = {"quick": (3, 1.0), "full": (5, 3.0)}


@click.group(help=__doc__)
def main() -> None:
    """The command line."""


@main.command()
def fetch() -> None:
    """Build the peers that are built."""
    print(f"bench: kublk is ready: {build_kublk()}")


@main.command(name="measure")
@click.option("--mode", type=click.Choice(list(MODES)), default="quick", show_default=True)
@click.option("--only", default="", help="Contestants whose name matches this regular expression.")
@click.option("--rounds", type=int, help="Instead of the mode's.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--revision", default="", help="What is measured, for the report.")
def run_measure(mode: str, only: str, rounds: int | None, out: Path | None, revision: str) -> None:
    """Measure on this kernel; status 1 if a contestant failed."""
    mode_rounds, runtime_s = MODES[mode]
    result = Result(
        kernel=platform.release(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        mode=mode,
        cpus=os.cpu_count() or 1,
        emulated="UBLKPOOL_GUEST" in os.environ,
        rounds=rounds or mode_rounds,
        runtime_s=runtime_s,
        revision=revision,
    )
    table = contestants(transports(_backend_help()), only)
    with tempfile.TemporaryDirectory(prefix="ublkpool-bench-", dir="/dev/shm") as directory:
        with Stage(Path(directory), kublk_path()) as stage:
            measure(stage, table, result, say, lambda each: write_result(each, out) if out else None)
    sys.exit(1 if result.failed else 0)


def _backend_help() -> str:
    command = [sys.executable, "-m", "ublkpool.daemon", "backend", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def say(text: str) -> None:
    """A line of progress."""
    print(f"bench: {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KublkError as error:
        sys.exit(f"bench: {error}")
