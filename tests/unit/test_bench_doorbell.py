"""The comparison of doorbells, and that each kind wakes the other process on this machine's kernel."""

import os
import subprocess
from pathlib import Path

import pytest
from bench import doorbell
from bench.doorbell import (
    USED,
    WAYS,
    DoorbellError,
    Doorbells,
    Trip,
    build_doorbell,
    doorbell_report,
    ring_doorbells,
)


def _found() -> Doorbells:
    return Doorbells(kernel="7.3.4", date="2026-01-02", emulated=True)


def test_a_ratio_is_made_within_its_round() -> None:
    found = _found()
    for number, (used, other) in enumerate([(100.0, 200.0), (1000.0, 1000.0), (10.0, 30.0)]):
        found.trips.append(Trip(way=USED, cpus=(0, 1), round=number, trips_per_s=used, cpu_us=5.0))
        found.trips.append(Trip(way="futex-call", cpus=(0, 1), round=number, trips_per_s=other, cpu_us=4.0))
    text = doorbell_report(found)
    assert "| futexes, futex(2) | 200 | 2.00 | 1.00 to 3.00 | 4.0 |" in text and "a CPU each" in text


def test_where_time_is_instructions_they_are_reported_of_one_short_round(tmp_path: Path) -> None:
    program, found = tmp_path / "doorbell", _found()
    found.exact = True
    program.write_text('#!/bin/sh\necho "$4" >> "$0.log"\necho 50000 20\n')
    program.chmod(0o755)
    ring_doorbells(program, found, lambda text: None)
    assert {each.round for each in found.trips} == {0}
    assert set((tmp_path / "doorbell.log").read_text().split()) == {str(doorbell.EXACT_RUN_MS)}
    text = doorbell_report(found)
    assert "instructions a round trip" in text and "of 1 rounds" in text
    assert "futex(2) | 20,000 | 1.00 |" in text


def test_a_doorbell_that_the_kernel_lacks_is_reported_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, found = tmp_path / "doorbell", _found()
    program.write_text(
        '#!/bin/sh\necho "$1" >> "$0.log"\ncase $1 in futex-ring) exit 3;; esac\necho 1000 2.5\n'
    )
    program.chmod(0o755)
    ring_doorbells(program, found, lambda text: None)
    assert found.missing == ["futex-ring"] and {each.way for each in found.trips} == WAYS.keys() - {
        "futex-ring"
    }
    assert (tmp_path / "doorbell.log").read_text().split().count("futex-ring") == 1
    assert "does not have: futex-ring" in doorbell_report(found)


def test_a_run_that_fails_is_one_line(tmp_path: Path) -> None:
    program = tmp_path / "doorbell"
    program.write_text("#!/bin/sh\necho it >&2\necho broke >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(DoorbellError, match=r"^eventfd-ring: ended with 1: it broke$"):
        ring_doorbells(program, _found(), lambda text: None)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("doorbell") / "doorbell"
    build_doorbell(made)
    return made


@pytest.mark.parametrize("way", WAYS)
def test_both_sides_go_on_waking_each_other(program: Path, way: str) -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    done = subprocess.run([program, way, cpu, cpu, "20"], capture_output=True, text=True, timeout=60)
    if done.returncode == doorbell.UNKNOWN_WAY:
        pytest.skip(f"this kernel does not have {way}")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) > 0
