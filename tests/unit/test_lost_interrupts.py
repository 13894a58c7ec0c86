"""Guests that QEMU has stalled are noticed, and their command begins anew."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.guest import __main__ as guest
from support.guest.boot import STATUS_LOST_INTERRUPT, STATUS_TIMEOUT
from support.guest.lost_interrupts import ANSWERS, InService, question
from support.guest.passed import VARIABLE
from support.guest.qemu import Spec

ANSWER = (
    "(qemu) info lapic {cpu}\r\ndumping local APIC state for CPU {cpu} \r\n\r\n"
    "LVTT\t 0x000200ec active-hi edge                 periodic     Fixed  (vec 236)\r\n"
    "ESR\t 0x00000000\r\nISR\t {isr} \r\nIRR\t 34 236 \r\n\r\nAPR 0x00 TPR 0x10\r\n(qemu) "
)


def lost_after(*isr: str, cpus: int = 2) -> str:
    """What is found after these answers of CPU 1, between those of other CPUs that serve nothing."""
    found = InService()
    for each in isr:
        found.hear("".join(ANSWER.format(cpu=cpu, isr=each if cpu == 1 else "(none)") for cpu in range(cpus)))
    return found.lost


def test_a_vector_that_stays_in_service_is_named_with_its_cpu() -> None:
    assert lost_after(*["236"] * ANSWERS) == "CPU 1 has interrupt 236 in service without end"
    assert lost_after(*["236 251"] * (ANSWERS - 1), "236") == lost_after(*["236"] * ANSWERS)


@pytest.mark.parametrize(
    "isr",
    [
        ["236"] * (ANSWERS - 1),
        ["(none)"] * ANSWERS * 2,
        [*["236"] * (ANSWERS - 1), "(none)", *["236"] * (ANSWERS - 1)],
        ["236", "251"] * ANSWERS,
    ],
    ids=["few answers", "none in service", "ended between", "one after the other"],
)
def test_a_cpu_that_ends_its_interrupts_has_lost_none(isr: list[str]) -> None:
    assert lost_after(*isr) == ""


def test_answers_may_come_in_any_pieces() -> None:
    text = ANSWER.format(cpu=0, isr="34 236") * ANSWERS
    for size in (1, 7, 64):
        found = InService()
        for start in range(0, len(text), size):
            assert found.lost == "" or start > len(text) - 2 * len(ANSWER)
            found.hear(text[start : start + size])
        assert found.lost == "CPU 0 has interrupt 236 in service without end"


_TESTS = """
import pytest

@pytest.fixture
def torn():
    yield
    assert False

def test_passes(): pass
def test_skips(): pytest.skip()
def test_fails(): assert False
def test_is_torn(torn): pass
"""


def _run_tests(place: Path, tests: str, noted: str) -> "subprocess.CompletedProcess[str]":
    """pytest in a guest, with this file for what has passed."""
    (place / "test_them.py").write_text(tests)
    (place / "conftest.py").write_text(
        "from support.guest.passed import Passed\n"
        "def pytest_configure(config):\n    config.pluginmanager.register(Passed.of_this_guest())\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--rootdir", str(place)]
    environ = {**os.environ, VARIABLE: str(place / noted)}
    return subprocess.run(
        [*command, "test_them.py"], cwd=place, env=environ, capture_output=True, text=True, check=False
    )


def test_a_fresh_guest_runs_only_the_tests_that_have_not_passed_in_the_stalled_one(tmp_path: Path) -> None:
    runs = [_run_tests(tmp_path, _TESTS, "passed") for _ in range(2)]
    assert [each.returncode for each in runs] == [1, 1], runs[0].stdout
    assert "1 failed, 2 passed, 1 skipped, 1 error" in runs[0].stdout
    assert "1 failed, 1 passed, 2 deselected, 1 error" in runs[1].stdout


def test_a_fresh_guest_that_has_nothing_left_to_run_is_no_failure(tmp_path: Path) -> None:
    """Nor is it a failure of the tests before; without such a file pytest's status stays."""
    (tmp_path / "passed").write_text("test_them.py::test_passes\n")
    runs = {name: _run_tests(tmp_path, "def test_passes(): pass\n", name) for name in ("passed", "empty")}
    assert {name: run.returncode for name, run in runs.items()} == {"passed": 0, "empty": 0}
    assert "1 deselected" in runs["passed"].stdout and "1 passed" in runs["empty"].stdout
    assert _run_tests(tmp_path, "", "fresh").returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_the_guests_of_one_command_share_the_file_of_what_has_passed(tmp_path: Path) -> None:
    noting = guest._noting_tests(Spec("7.3", ["true"], cwd=tmp_path), tmp_path)
    assert noting.command == ["env", f"{VARIABLE}={tmp_path}/tests", "true"]
    assert noting.rw == [tmp_path]
    exact = Spec("7.3", ["true"], cwd=tmp_path, exact=True)
    assert guest._noting_tests(exact, tmp_path) == exact


def test_each_cpu_is_asked() -> None:
    assert question(2) == "info lapic 0\ninfo lapic 1\n"


@pytest.mark.parametrize(
    ("statuses", "result"),
    [
        ([0], 0),
        ([STATUS_LOST_INTERRUPT, 7], 7),
        ([STATUS_TIMEOUT], STATUS_TIMEOUT),
        ([STATUS_LOST_INTERRUPT] * guest.BOOTS_MAX, STATUS_LOST_INTERRUPT),
    ],
)
def test_a_command_begins_anew_only_in_the_place_of_a_stalled_guest(
    statuses: list[int], result: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left = list(statuses)

    class Machine:
        def __init__(self, *_: object) -> None:
            pass

        def __enter__(self) -> "Machine":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def wait(self) -> int:
            return left.pop(0)

    monkeypatch.setattr(guest, "Machine", Machine)
    monkeypatch.setattr(guest, "GuestCache", lambda: None)
    assert guest._run(Spec("7.3", ["true"], cwd=tmp_path)) == result
    assert left == []
