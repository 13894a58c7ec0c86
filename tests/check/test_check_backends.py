"""Every built-in backend and every example keeps its promises, over both transports, kills included."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.vm.daemon import eventually
from ublkpool.testing import Report, report_on

EXAMPLES = Path(__file__).parents[2] / "examples"
DISK_BYTES = 16 << 20
BACKENDS: dict[str, tuple[str, dict[str, str]]] = {
    "null": ("null", {"size": "64M"}),
    "file": ("file", {"path": "DISK"}),
    "file, read only": ("file", {"path": "DISK", "readonly": "on"}),
    "cow": ("cow", {"base": "DISK", "overlay": "DISK.cow"}),
    "memory": ("memory", {"size": "16M"}),
    "memory that names reads": ("memory", {"size": "16M", "reads": "own"}),
    "demo_null": (str(EXAMPLES / "demo_null.py"), {}),
    "demo_null with slots": (str(EXAMPLES / "demo_null.py"), {"placement": "backend"}),
    "demo_event": (str(EXAMPLES / "demo_event.py"), {"size": "16M"}),
    "demo_event with slots": (str(EXAMPLES / "demo_event.py"), {"size": "16M", "placement": "backend"}),
    "demo_batch": (str(EXAMPLES / "demo_batch.py"), {"path": "DISK", "size": "16M"}),
    "demo_batch with slots": (
        str(EXAMPLES / "demo_batch.py"),
        {"path": "DISK", "size": "16M", "placement": "backend"},
    ),
    "file_functions": (str(EXAMPLES / "file_functions.py"), {"path": "DISK"}),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_the_backend_keeps_every_promise(
    tmp_path: Path, check_backend: Callable[..., Report], name: str
) -> None:
    kind, options = BACKENDS[name]
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(DISK_BYTES))
    asked: dict[str, Any] = {"seconds": 1, "deadline_s": 60}
    report = check_backend(
        kind, {key: value.replace("DISK", str(disk)) for key, value in options.items()}, **asked
    )
    assert report.counts["kill"] >= 2
    assert report.counts["fence"] >= 1
    assert report.counts["stop"] >= 2
    if "memory" in name or name in ("null", "file", "cow"):
        assert report.placements == ("backend", "pool")


def trace_at(tmp_path: Path) -> str:
    return f"log:file={tmp_path / 'trace'}"


@pytest.mark.parametrize("layer", ["cache:size=1M", "readonly", "fault:seed=1,delay=0.01", trace_at])
def test_each_layer_keeps_every_promise(
    tmp_path: Path, check_backend: Callable[..., Report], layer: str | Callable[[Path], str]
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(DISK_BYTES))
    layers = [layer if isinstance(layer, str) else layer(tmp_path)]
    report = check_backend("file", {"path": disk}, seconds=1, deadline_s=60, layers=layers)
    assert report.counts["kill"] >= 2


def test_a_layer_that_holds_writes_until_a_flush_loses_them_by_a_kill(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(DISK_BYTES))
    layer = "fault:seed=1,hold=4M"
    # Without WRITE_ZEROES: zeros beside its blocks may also have been written too far.
    kind = str(EXAMPLES / "file_functions.py")
    report = report_on(kind, {"path": disk}, seconds=60, deadline_s=60, layers=[layer])
    # A block with older data has lost the newer one, or an older request came late: a report may name either.
    assert report.promise in ("survives-kill", "predecessor", "fence"), report.lines()
    assert report.counts["kill"] >= 1
    assert f" --layer {layer} {kind} path=" in report.replay


def test_what_memory_keeps_is_dropped_in_the_end(
    tmp_path: Path, check_backend: Callable[..., Report]
) -> None:
    def keepers() -> set[str]:
        found = set()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            # Other processes of this machine end at any time.
            with suppress(OSError):
                found.add(path.read_bytes().decode(errors="replace"))
        return {each for each in found if "memory-check" in each}

    before = keepers()
    check_backend("memory", {"size": "4M"}, seconds=0, transport="ring")
    eventually(lambda: keepers() <= before, "the keeper has ended")


def test_memory_without_a_keeper_does_not_survive(tmp_path: Path) -> None:
    report = report_on("memory", {"size": "4M", "keep": "off"}, seconds=20, deadline_s=60)
    assert report.promise == "survives-kill"
