"""The queue core's files call in one direction only, as csrc/queue_types.h draws it."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "ublk" / "csrc"
FROM_THE_GROUND_UP = (
    "queue_latency",
    "queue_tag",
    "queue_check",
    "queue_stock",
    "queue_region",
    "queue_limit",
    "queue_descriptor",
    "queue_finish",
    "queue_run",
    "queue_request",
    "queue_waiting",
    "queue_link",
    "queue_time",
    "queue_core",
    "queue_port",
    "queue_inside",
    "queue_clock",
    "queue_ring",
)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each file of the core, compiled by itself: its undefined symbols are the functions that it calls elsewhere."""
    directory = tmp_path_factory.mktemp("objects")
    compiled = {}
    for name in FROM_THE_GROUND_UP:
        compiled[name] = directory / f"{name}.o"
        includes = ("-I", CSRC, "-I", ROOT / "bufpool" / "wire" / "csrc")
        flags = ("-std=gnu11", "-D_GNU_SOURCE", "-DUQ_CHECKED", "-O1", "-c", *includes)
        subprocess.run(["gcc", *flags, "-o", compiled[name], CSRC / f"{name}.c"], check=True)
    return compiled


def symbols(file: Path, *which: str) -> set[str]:
    """The core's names in an object file, of these kinds (nm's options)."""
    listed = subprocess.run(["nm", *which, file], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"\b(uq_\w+)$", listed, flags=re.MULTILINE))


def calls_upwards(objects: dict[str, Path]) -> list[str]:
    """The symbols that a file takes from files above it, or from no known file."""
    below: set[str] = set()
    found = []
    for name in objects:
        below |= symbols(objects[name], "--defined-only")
        found += [f"{name}.c needs {symbol}" for symbol in symbols(objects[name], "-u") - below]
    return found


def test_every_file_of_the_core_has_a_layer() -> None:
    assert {each.stem for each in CSRC.glob("queue_*.c")} == set(FROM_THE_GROUND_UP)
    drawn = re.findall(r"queue_\w+(?=\.c)", (CSRC / "queue_types.h").read_text().partition("#ifndef")[0])
    assert tuple(drawn) == FROM_THE_GROUND_UP


def test_a_file_calls_only_files_below_it(objects: dict[str, Path]) -> None:
    assert calls_upwards(objects) == []


def test_a_call_upwards_is_found(objects: dict[str, Path]) -> None:
    upside_down = dict(reversed(objects.items()))
    assert "queue_link.c needs uq_request_fail" in calls_upwards(upside_down)
