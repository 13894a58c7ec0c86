"""[PYTEST_ARGUMENT]...: run tests in one pytest process for each CPU; a process takes a file when it has done another.

    python -m support.spread tests/sim tests/unit

Owns the processes and their reports: a line for each test file that is done, then what pytest says of failures, then
the sums of each process.  Files that take long come first among the arguments, or one process waits for the other.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.claims import DIRECTORY


def main(arguments: list[str]) -> int:
    """Return 0 when every process succeeded, otherwise the status of one that did not."""
    with tempfile.TemporaryDirectory(prefix="ublkpool-claims-") as name:
        directory = Path(name)
        claims = directory / "claims"
        claims.mkdir()
        reports = [directory / f"report-{number}" for number in range(len(os.sched_getaffinity(0)))]
        processes = [_start(arguments, claims, report) for report in reports]
        # The terminal sends SIGINT to pytest as well, which reports what it has so far.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        statuses = [process.wait() for process in processes]
        for report, status in zip(reports, statuses, strict=True):
            print(*_told(report.read_text(), status), sep="\n")
    return next((status for status in statuses if status), 0)


def _start(arguments: list[str], claims: Path, report: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-p", "support.claims", "-p", "no:cacheprovider", *arguments]
    with report.open("wb") as out:
        return subprocess.Popen(command, stdout=out, env={**os.environ, DIRECTORY: str(claims)})


def _told(report: str, status: int) -> Iterator[str]:
    """What a report says after the progress marks; all of it if the process crashed or pytest itself failed."""
    lines = report.splitlines()
    sections = [number for number, line in enumerate(lines) if line.startswith("===")]
    # The first opens the session.
    if len(sections) > 1 and status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        lines = lines[sections[1] :]
    yield from lines
    if status < 0:
        yield f"spread: pytest died by signal {-status} ({signal.Signals(-status).name})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
