"""The density benchmark's numbers and tables."""

import os
import random
from pathlib import Path

import pytest
from bench.crowd import SIZE_BYTES, Pages, check_random_blocks, pages_of
from bench.density_results import Density, Life, Part, Whole, density_report

_SMAPS = """\
55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
Rss:                 100 kB
Private_Clean:         4 kB
Private_Dirty:        90 kB
Private_Hugetlb:       0 kB
7f1200000000-7f1200800000 rw-s 00000000 00:01 1044                       /memfd:the pool of device 0 (deleted)
Size:               8192 kB
Private_Clean:         0 kB
Private_Dirty:        64 kB
7f1300000000-7f1300010000 rw-s 00000000 00:1a 12                         /dev/shm/ublkpool-1a2b3c4d-0-ctl
Private_Dirty:         8 kB
7f1400000000-7f1400001000 r--p 00000000 fe:01 99                         /usr/lib/libzmq.so.5
Private_Clean:         0 kB
Private_Dirty:         2 kB
"""


def test_a_process_own_pages_are_told_from_those_of_the_pool() -> None:
    assert pages_of(_SMAPS.splitlines()) == Pages(own_kib=96, pool_kib=72)


def _density() -> Density:
    lives = [
        Life(what=what, add_ms=add_ms, del_ms=del_ms)
        for what, add_ms, del_ms in (
            ("kublk", 100.0, 50.0),
            ("kublk", 300.0, 60.0),
            ("kublk", 200.0, 70.0),
            ("isolation none", 300.0, 90.0),
        )
    ]
    part = Part(
        devices=2,
        part="worker",
        processes=2,
        threads=3.0,
        descriptors=21.0,
        own_kib=2048.0,
        pool_kib=12.0,
        wakes_per_s=2.0,
    )
    return Density(
        kernel="7.3",
        date="2026-11-28",
        cpus=2,
        emulated=True,
        lives=lives,
        parts=[part],
        wholes=[Whole(devices=2, used_kib_each=4096.0, pool_kib_each=744.0)],
        adds_ms=[100.0] * 10 + [200.0] * 10,
        dels_ms=[10.0] * 20,
    )


def test_the_report_has_the_medians_and_their_ratios_to_kublk() -> None:
    lines = density_report(_density()).splitlines()
    row = next(each for each in lines if each.startswith("| isolation none"))
    assert [each.strip() for each in row.split("|")[2:-1]] == ["1", "300", "1.50", "90.0", "1.50"]
    row = next(each for each in lines if each.startswith("| add"))
    assert [each.strip() for each in row.split("|")[2:-1]] == ["20", "100", "200"]
    assert any(
        each.startswith("| 2 ") and "worker" in each and "2048" in each.replace(",", "") for each in lines
    )


def test_a_run_without_devices_and_one_that_failed_have_a_report() -> None:
    density = Density(kernel="7.3", date="2026-11-28", cpus=2, emulated=False, errors=["no driver"])
    assert "- no driver" in density_report(density)


def _disks(directory: Path, count: int) -> list[str]:
    disks = [directory / f"disk{number}" for number in range(count)]
    for disk in disks:
        disk.write_bytes(b"")
        os.truncate(disk, SIZE_BYTES)
    return [str(disk) for disk in disks]


def test_disks_that_keep_their_blocks_pass(tmp_path: Path) -> None:
    assert 1 < check_random_blocks(_disks(tmp_path, 3), random.Random(1), 100) <= 100


def test_a_disk_that_is_also_another_one_is_found(tmp_path: Path) -> None:
    disk, other = _disks(tmp_path, 2)
    Path(other).unlink()
    Path(other).symlink_to(disk)
    with pytest.raises(AssertionError, match="what was not written there"):
        check_random_blocks([disk, other], random.Random(1), 1000)
