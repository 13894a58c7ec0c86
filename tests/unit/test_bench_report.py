"""Ratios, targets and tables of the benchmark, from made-up results."""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from bench.accounts import Books, Cpu, busy_share, parse_smaps, parts_shares, ran_ns_of
from bench.cells import CELLS, NBD_CELLS, RBD_CELLS
from bench.exact import exact_report
from bench.growth_results import Growth, Idle, Step, Timing, growth_report
from bench.instructions import InstructionCost, core_instructions
from bench.nbd_results import nbd_report
from bench.ratios import Spread, middle_of, ratio_spread, spread, value_spread
from bench.rbd_results import RBD_BASELINE, client_ratio, rbd_report
from bench.results import CLUSTER, Party, Result, Sample, Transport
from bench.syscalls import parse_histogram
from bench.tables import cost_table, markdown_table, number, report
from bench.targets import LARGE, QD1, WRITE, verdicts

from support.vm.daemon import eventually


def _result(*samples: Sample, parties: Sequence[Party] = (), error: str = "") -> Result:
    names = dict.fromkeys(each.contestant for each in samples)
    return Result(
        kernel="7.3.4",
        date="2026-01-02",
        mode="quick",
        cpus=2,
        emulated=True,
        rounds=3,
        runtime_s=1.0,
        parties=list(parties) or [_party(name, error=error) for name in names],
        samples=list(samples),
    )


def _party(name: str, transport: Transport = "", error: str = "") -> Party:
    return Party(
        name=name, kind=name.removesuffix(f", {transport}"), family="kublk", transport=transport, error=error
    )


def _samples(name: str, cell: str, *values: float) -> list[Sample]:
    return [
        Sample(contestant=name, cell=cell, round=number, iops=value, bytes_per_s=value * 1e6)
        for number, value in enumerate(values)
    ]


def test_a_ratio_is_made_within_its_round() -> None:
    result = _result(*_samples("a", QD1, 10.0, 20.0, 90.0), *_samples("b", QD1, 10.0, 10.0, 30.0))
    assert ratio_spread(result, "a", "b", QD1) == Spread(2.0, 1.0, 3.0)
    assert value_spread(result, "a", QD1) == Spread(20.0, 10.0, 90.0)


def test_a_round_that_only_one_contestant_has_does_not_count() -> None:
    result = _result(*_samples("a", QD1, 10.0, 20.0), *_samples("b", QD1, 5.0))
    assert ratio_spread(result, "a", "b", QD1) == Spread(2.0, 2.0, 2.0)
    assert ratio_spread(result, "a", "c", QD1) is None
    assert ratio_spread(result, "a", "b", WRITE) is None


def test_one_round_that_was_disturbed_does_not_show_in_its_cost() -> None:
    assert middle_of([10.0, 12.0, 90000.0]) == 12.0
    assert middle_of([]) == 0.0


def test_nothing_has_no_spread() -> None:
    assert spread([]) is None


def test_large_requests_are_compared_by_their_bytes() -> None:
    result = _result(*_samples("a", LARGE, 250.0))
    assert value_spread(result, "a", LARGE) == Spread(250.0, 250.0, 250.0)


@pytest.mark.parametrize(("ours", "state"), [(6.0, "reached"), (5.9, "short")])
def test_a_target_is_reached_by_the_median(ours: float, state: str) -> None:
    samples = [
        *_samples("null, pool, ring", QD1, ours, 1.0, 100.0),
        *_samples("kublk null -g", QD1, 10.0, 10.0, 10.0),
    ]
    parties = [_party("null, pool, ring", "ring"), _party("kublk null -g")]
    found = {(each.kind, each.cell): each for each in verdicts(_result(*samples, parties=parties))}
    assert found["null, pool", QD1].state == state
    assert found["null, pool", QD1].over == "ring"
    assert found["memory, pool", QD1].state == "not measured"


def test_a_contestant_without_a_transport_counts_as_zeromq() -> None:
    samples = [*_samples("null, pool", QD1, 6.0), *_samples("kublk null -g", QD1, 10.0)]
    found = next(
        each for each in verdicts(_result(*samples)) if (each.kind, each.cell) == ("null, pool", QD1)
    )
    assert (found.wanted_over, found.over, found.state) == ("ring", "zeromq", "reached")


def test_a_ring_target_is_not_met_over_another_transport_that_was_chosen() -> None:
    samples = [*_samples("null, pool, zeromq", QD1, 60.0), *_samples("kublk null -g", QD1, 10.0)]
    result = _result(*samples, parties=[_party("null, pool, zeromq", "zeromq"), _party("kublk null -g")])
    found = next(each for each in verdicts(result) if (each.kind, each.cell) == ("null, pool", QD1))
    assert found.state == "not measured"


def test_a_table_is_markdown() -> None:
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| :--- | ---: |\n| x\\|y | 1 |\n"


@pytest.mark.parametrize(
    ("value", "text"), [(35721.4, "35,721"), (99.94, "99.9"), (1.26, "1.3"), (0.126, "0.13"), (0.0, "0.00")]
)
def test_numbers_have_no_one_or_two_decimals(value: float, text: str) -> None:
    assert number(value) == text


def test_a_report_has_all_contestants_and_the_failures() -> None:
    samples = [each for cell in CELLS for each in _samples("kublk null -g", cell.name, 10.0, 20.0)]
    parties = [_party("kublk null -g"), _party("loop", error="StageError: no such module")]
    text = report(_result(*samples, parties=parties), [InstructionCost("flush", "rings", 1, 510.0)])
    assert "| kublk null -g |  | 15.0 | 10.0 to 20.0 | 1.00 | 1.00 to 1.00 |" in text
    assert "| loop |  | failed |" in text
    assert "- loop: StageError: no such module" in text
    assert "| flush | 510 |" in text
    assert "2026-01-02" in text and "7.3.4" in text and "2 rounds, of 3 that were wanted, of 1 s" in text


def test_a_run_has_failed_if_anything_in_it_has() -> None:
    assert not _result(*_samples("a", QD1, 1.0)).failed
    assert _result(*_samples("a", QD1, 1.0), error="gone").failed
    assert _result(Sample(contestant="a", cell=QD1, round=0, error="gone")).failed


def test_batches_stand_side_by_side() -> None:
    table = cost_table(
        [InstructionCost("flush", "rings", 32, 409.25), InstructionCost("flush", "rings", 1, 510.0)]
    )
    assert "| request | rings, 1 at a time | rings, 32 at a time |" in table
    assert "| flush | 510 | 409 |" in table


PROFILE = """\
fl=/somewhere/bench/csrc/queue_cost.c
fn=rounds
105 81
cfi=/somewhere/ublk/csrc/queue_core.c
cfn=uq_tick
calls=9 411
107 171
cfn=exchange
calls=9 82
112 5000
fn=exchange
cfi=/somewhere/ublk/csrc/queue_link.c
cfn=uq_input
calls=3 11
84 600

fl=/somewhere/ublk/csrc/queue_link.c
fn=uq_input
cfn=uq_finish
calls=3 11
84 400
"""


def test_only_the_harness_calls_into_the_core_are_counted() -> None:
    assert core_instructions(PROFILE, "queue_cost.c") == 171 + 600


def test_uss_is_the_memory_of_pages_that_no_other_process_shares() -> None:
    text = (
        "55d0-7ffc ---p 00000000 [rollup]\nRss: 900 kB\nPss:  120 kB\nPss_Anon: 50 kB\n"
        "Private_Clean: 10 kB\nPrivate_Dirty: 30 kB\n"
    )
    found = parse_smaps(text)
    assert (found.pss_kib, found.uss_kib) == (120, 40)


def test_shares_are_of_the_time_of_all_cpus() -> None:
    nothing = Cpu(0.0, 0.0)
    first = Books(nothing, {}, 0, 1000, 500, {"worker": 100})
    second = Books(nothing, {}, 9, 2000, 1300, {"worker": 350})
    assert busy_share(first, second, 1) == pytest.approx(0.8)
    assert parts_shares(first, second, 2) == {"worker": pytest.approx(0.125)}


def test_the_run_time_of_every_thread_counts() -> None:
    before_ns = _others_ran_ns()
    worked = threading.Thread(target=_work, args=(ended := threading.Event(),))
    worked.start()
    try:
        eventually(lambda: _others_ran_ns() >= before_ns + 20_000_000, "it is counted")
    finally:
        ended.set()
        worked.join()
    assert ran_ns_of([1 << 30]) == 0


def _others_ran_ns() -> int:
    return ran_ns_of([os.getpid()]) - time.thread_time_ns()


def _work(ended: threading.Event) -> None:
    while not ended.is_set():
        pass


def _exact_samples(name: str, cell: str, *values: float, busy: float = 1.0) -> list[Sample]:
    shares = {"worker": 0.25, "fio": 0.5}
    return [msgspec.structs.replace(each, busy=busy, shares=shares) for each in _samples(name, cell, *values)]


def _exact_result(*samples: Sample, parties: Sequence[Party] = ()) -> Result:
    return msgspec.structs.replace(_result(*samples, parties=parties), exact=True, mode="exact", rounds=2)


def test_an_exact_report_counts_instructions_and_not_time() -> None:
    text = exact_report(
        _exact_result(
            *_exact_samples("null, pool, ring", WRITE, 40_000.0, 50_000.0),
            *_exact_samples("kublk null -g", WRITE, 100_000.0, 100_000.0),
            parties=[
                _party("null, pool, ring", "ring"),
                _party("kublk null -g"),
                _party("worker null", error="StageError: gone"),
            ],
        )
    )
    assert "| null, pool | ring | failed |  | 22,500 | 0.450 [0.400 to 0.500] |" in text
    assert "| kublk null -g |  | failed |  | 10,000 | 1.000 [1.000 to 1.000] |" in text
    assert "| null, pool | ring |  | worker 5,625, fio 11,250 |" in text
    assert "| null, pool | randwrite 4k qd32 x2 | kublk null -g | ring | ring | 0.8 | 0.45 |" in text
    assert "- worker null: StageError: gone" in text
    assert "1e9/IOPS" in text and "2 rounds of 1 s" in text
    assert "CPU us" not in text and "latency" not in text


def test_an_exact_report_names_contestants_that_left_the_cpu_idle() -> None:
    busy, idle = _exact_samples("a", QD1, 10.0), _exact_samples("b", QD1, 10.0, busy=0.8)
    assert "was busy at least 97%" in exact_report(_exact_result(*busy))
    text = exact_report(_exact_result(*busy, *idle))
    assert f"not all instructions: b, {QD1} (80% busy)." in text and "was busy at least" not in text


def test_exact_growth_counts_instructions_and_not_time() -> None:
    step = Step(axis="depth", at=32, iops=50_000.0, worker_us=5.25, backend_us=0.5, enters=0.1, busy=1.0)
    growth = Growth(kernel="7.3.4", date="2026-01-02", cpus=1, emulated=True, exact=True, steps=[step])
    growth.timings.append(Timing(what="devices added: 3", seconds=3.21))
    text = growth_report(growth)
    assert "## Growth, exact, Linux 7.3.4" in text
    assert "| 32 | 20,000 | 5,250 | 500 | 0.10 | 100% |" in text
    assert "IOPS" not in text and "3.2" not in text


def test_a_histogram_is_read_thread_by_thread() -> None:
    text = (
        "# event histogram\n{ common_pid:        254 } hitcount:         12\n{ common_pid: 1 } hitcount: 3\n"
    )
    assert parse_histogram(text) == {254: 12, 1: 3}


def test_growth_has_a_table_for_each_axis_and_says_what_failed() -> None:
    growth = Growth(
        kernel="7.3.4",
        date="2026-01-02",
        cpus=2,
        emulated=True,
        steps=[
            Step(axis="depth", at=4096, iops=1234.0, machine_us=50.0, enters=0.1, syscalls={"worker": 0.25}),
            Step(axis="bytes a request", at=4096),
        ],
        idle=[
            Idle(devices=1, part="worker", processes=1, pss_kib=1000.0, uss_kib=640.0),
            Idle(devices=1, part="broker", processes=1, pss_kib=100.0, uss_kib=640.0),
            Idle(devices=64, part="worker", processes=64, pss_kib=812.5, uss_kib=640.0),
            Idle(devices=64, part="broker", processes=1, pss_kib=400.0, uss_kib=640.0),
        ],
        timings=[Timing(what="delete of 64 devices", seconds=3.21)],
        errors=["the daemon is gone"],
    )
    text = growth_report(growth)
    assert "### depth\n" in text and "### bytes a request\n" in text
    assert "| 4,096 | 1,234 | 50.0 | 0.00 | 0.00 | 0.10 | 0.25 |  |" in text
    assert "| 64 | worker | 64 | 812 | 640 |" in text
    assert "From 1 to 64 devices each device more takes 814 KiB" in text
    assert "| delete of 64 devices | 3.2 |" in text and "- the daemon is gone" in text


def _nbd_result(exact: bool) -> Result:
    make = _exact_samples if exact else _samples
    samples = [
        each
        for cell in NBD_CELLS
        for name, values in (("nbd-client", (100.0, 100.0)), ("nbd, ring", (50.0, 200.0)))
        for each in make(name, cell.name, *values)
    ]
    parties = [
        _party("nbd-client"),
        _party("nbd, ring", "ring"),
        _party("nbd, zeromq", "zeromq", error="gone"),
    ]
    return msgspec.structs.replace(_result(*samples, parties=parties), mode="nbd", exact=exact)


def test_a_report_of_mode_nbd_has_all_its_cells_against_nbd_client() -> None:
    text = nbd_report(_nbd_result(exact=False))
    assert text.startswith("## NBD, Linux 7.3.4\n") and "Mode nbd" in text
    assert "| " + " | ".join(["nbd", "ring", *["1.25 [0.50 to 2.00]"] * len(NBD_CELLS)]) + " |" in text
    assert "| " + " | ".join(["nbd", "ring", *["125"] * len(NBD_CELLS)]) + " |" in text
    assert "| " + " | ".join(["nbd", "zeromq", *["none"] * len(NBD_CELLS)]) + " |" in text
    assert "- nbd, zeromq: gone" in text and "randread 4k qd1" in text and "read 512k qd8" in text


def test_an_exact_report_of_mode_nbd_counts_instructions_and_not_time() -> None:
    text = nbd_report(_nbd_result(exact=True))
    assert text.startswith("## NBD, exact, Linux 7.3.4\n") and "1e9/IOPS" in text
    assert "| nbd | ring | worker 3,125,000, fio 6,250,000 |" in text
    assert "CPU time" not in text and "### Speed" not in text


def _of_cluster(contestant: str, cell: str, instructions: float, servers: float, number: int = 0) -> Sample:
    """A sample whose request takes this many instructions, this share of them in the cluster's servers."""
    shares = {CLUSTER: servers, "librbd": 0.125}
    return Sample(
        contestant=contestant, cell=cell, round=number, iops=1e9 / instructions, busy=1.0, shares=shares
    )


def _rbd_result(ours: float) -> Result:
    samples = [
        each
        for cell in RBD_CELLS
        for each in (
            _of_cluster(RBD_BASELINE, cell.name, 1e6, 0.5),
            _of_cluster("rbd, ring", cell.name, ours, 0.75),
        )
    ]
    own = Party(name="rbd, ring", kind="rbd", family="ublkpool", transport="ring")
    result = _result(*samples, parties=[_party(RBD_BASELINE), own])
    result.mode, result.exact = "rbd", True
    return result


def test_the_clusters_own_instructions_are_not_its_clients() -> None:
    # 1.6 million of which a quarter is the client's, against a million of which half is.
    assert client_ratio(_rbd_result(1.6e6), "rbd, ring", RBD_CELLS[0].name) == Spread(0.8, 0.8, 0.8)


def test_a_cell_over_the_goal_is_named_and_one_that_was_not_measured_too() -> None:
    assert "rbd, ring: reached in every cell." in rbd_report(_rbd_result(1.6e6))
    missed = _rbd_result(1.62e6)
    missed.samples = [each for each in missed.samples if each.cell != RBD_CELLS[1].name]
    names = [f"{cell.name} (0.81)" for cell in RBD_CELLS]
    names[1] = f"{RBD_CELLS[1].name} (not measured)"
    assert f"rbd, ring: missed in {', '.join(names)}." in rbd_report(missed)


def test_the_report_of_rbd_says_librbds_part_and_the_speed() -> None:
    text = rbd_report(_rbd_result(1.6e6))
    assert "## Ceph RBD, exact, Linux" in text
    assert "| rbd | ring | 400,000 | 0.80 [0.80 to 0.80] |" in text
    assert "librbd 200,000" in text
    # 1e9 / 1.6 million instructions of the whole machine.
    assert "### Speed\n\nIn the guest's time" in text and "| rbd | ring | 625 | 625 |" in text
    timed = _rbd_result(1.6e6)
    timed.exact = False
    assert "### Speed" in rbd_report(timed) and "librbd 200,000" not in rbd_report(timed)


def test_threads_are_counted_by_their_names() -> None:
    stop = threading.Event()

    def burn() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("msgr-worker-7")
        while not stop.is_set():
            pass

    thread = threading.Thread(target=burn)
    thread.start()
    try:
        eventually(lambda: ran_ns_of([os.getpid()], ("other", "msgr-worker")) > 10**7, "the thread has run")
        assert ran_ns_of([os.getpid()], ("other",)) == 0
    finally:
        stop.set()
        thread.join()
