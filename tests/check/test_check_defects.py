"""`ublkpool backend check` finds each planted defect, and names the promise that it breaks."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ublkpool.testing import PROMISES, report_on

DEFECTS = Path(__file__).parent / "defects"
DISK_BYTES = 8 << 20


class Planted(NamedTuple):
    """What a defect breaks, and with what it is found.

    A defect that is late breaks another promise first if the machine stands still at the wrong moment: `or_else`.
    """

    promise: str
    or_else: tuple[str, ...] = ()
    has_path: bool = True
    asked: dict[str, Any] = {}  # noqa: RUF012 - never changed


PLANTED = {
    "another_store": Planted("identity"),
    "answered_before_stored": Planted("last-write", or_else=("survives-kill",)),
    "answers_twice": Planted("protocol", has_path=False),
    "flush_keeps_nothing": Planted("fua"),
    "ignores_fua": Planted("fua", asked={"power_loss": "rm -f {disk}.cache"}),
    "late_predecessor": Planted("predecessor"),
    "lost_on_kill": Planted("survives-kill", has_path=False),
    "never_answers": Planted("answers", asked={"deadline_s": 2}),
    "off_by_one_block": Planted("offset"),
    "old_epoch_after_fence": Planted("fence", or_else=("last-write", "predecessor")),
    "repeats_replays": Planted("predecessor"),
    "short_reads": Planted("whole"),
    "swaps_concurrent_writes": Planted("offset"),
    "trim_too_far": Planted("neighbours"),
    "writes_beyond_end": Planted("size"),
    "wrong_size": Planted("size"),
    "zero_writes_nothing": Planted("zeroes"),
}


def test_every_planted_defect_is_tried() -> None:
    assert {path.stem for path in DEFECTS.glob("*.py")} == set(PLANTED)


@pytest.mark.parametrize("name", PLANTED)
def test_the_defect_is_found(tmp_path: Path, name: str) -> None:
    planted, disk = PLANTED[name], tmp_path / "disk"
    disk.write_bytes(bytes(DISK_BYTES))
    asked = {"seconds": 90, "seed": 1, "deadline_s": 60, **planted.asked}
    if "power_loss" in asked:
        asked["power_loss"] = asked["power_loss"].format(disk=disk)
    report = report_on(str(DEFECTS / f"{name}.py"), {"path": disk} if planted.has_path else {}, **asked)
    lines = report.lines()
    assert report.promise in (planted.promise, *planted.or_else), lines
    assert PROMISES[report.promise] in lines[0]
    assert "--seed 1 --seconds 90" in lines[-1]


def test_a_cache_that_honours_fua_may_lose_the_rest_when_the_power_fails(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(DISK_BYTES))
    report = report_on(
        str(DEFECTS / "ignores_fua.py"),
        {"path": disk, "honours_fua": "on"},
        power_loss=f"rm -f {disk}.cache",
        seconds=1,
        deadline_s=60,
    )
    assert report.is_kept, report.lines()
    assert report.counts["power"] >= 2
