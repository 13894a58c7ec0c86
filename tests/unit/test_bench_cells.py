"""fio's command line for a cell, and the numbers taken from fio's output."""

import json
from typing import Any

import pytest
from bench.cells import CELLS, NBD_CELLS, FioError, cells_of, fio_command, job_cpus, parse_fio


def _side(ios: int, iops: float, bytes_per_s: int, latency_ns: float) -> dict[str, Any]:
    return {"total_ios": ios, "iops": iops, "bw_bytes": bytes_per_s, "lat_ns": {"mean": latency_ns}}


def _output(*jobs: tuple[dict[str, Any], dict[str, Any]], error: int = 0) -> str:
    return json.dumps({"jobs": [{"error": error, "read": read, "write": write} for read, write in jobs]})


NOTHING = _side(0, 0.0, 0, 0.0)


def test_jobs_add_up_and_latency_is_weighed_by_requests() -> None:
    output = _output(
        (NOTHING, _side(300, 300.0, 1_228_800, 1000.0)), (NOTHING, _side(100, 100.0, 409_600, 5000.0))
    )
    found = parse_fio(output, 0)
    assert (found.iops, found.bytes_per_s, found.latency_us) == (400.0, 1_638_400, 2.0)


def test_a_cell_shows_iops_or_megabytes() -> None:
    found = parse_fio(_output((NOTHING, _side(10, 10.0, 5_000_000, 1.0))), 0)
    assert [found.shown(cell) for cell in CELLS] == [10.0, 10.0, 10.0, 5.0]


def test_fios_warnings_before_its_json_are_skipped() -> None:
    assert parse_fio("fio: a remark\n" + _output((_side(1, 7.0, 1, 1.0), NOTHING)), 0).iops == 7.0


@pytest.mark.parametrize(
    ("output", "status", "why"),
    [
        ("fio: no such\n file", 1, "fio ended with 1: fio: no such file"),
        ("", 2, "fio ended with 2: it said nothing"),
        (_output((NOTHING, _side(1, 1.0, 1, 1.0)), error=5), 0, r"errors \[5\]"),
        ("fio: io_u error\n" + _output((NOTHING, _side(1, 1.0, 1, 1.0))), 1, "io_u error"),
        (_output((NOTHING, NOTHING)), 0, "without having moved anything"),
    ],
)
def test_a_failure_is_one_line(output: str, status: int, why: str) -> None:
    with pytest.raises(FioError, match=why) as error:
        parse_fio(output, status)
    assert "\n" not in str(error.value)


def test_jobs_have_cpus_of_different_queues_as_far_as_possible() -> None:
    assert job_cpus([[0, 1], [2, 3]], 2) == [0, 2]
    assert job_cpus([[0, 1]], 2) == [0, 1]
    assert job_cpus([[0], [1]], 3) == [0, 1, 0]


def test_the_command_has_all_settings_of_a_cell() -> None:
    words = fio_command("/dev/ublkb3", CELLS[3], [1], 0.5)
    for word in ("--filename=/dev/ublkb3", "--rw=write", "--bs=524288", "--iodepth=8", "--numjobs=1"):
        assert word in words
    for word in ("--direct=1", "--ioengine=io_uring", "--cpus_allowed=1", "--runtime=500ms"):
        assert word in words


def test_mode_nbd_measures_each_write_as_a_read_too() -> None:
    def shapes(*kinds: str) -> set[tuple[int, int, int]]:
        return {(each.block_bytes, each.depth, each.jobs) for each in NBD_CELLS if each.rw in kinds}

    assert (
        shapes("write", "randwrite")
        == shapes("read", "randread")
        == {(4096, 1, 1), (4096, 32, 2), (512 << 10, 8, 1)}
    )
    assert cells_of("nbd") == NBD_CELLS and cells_of("quick") == cells_of("exact") == CELLS
