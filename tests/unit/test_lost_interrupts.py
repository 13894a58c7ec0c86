"""Guests that QEMU has stalled are noticed, and their command begins anew."""

from pathlib import Path

import pytest

from support.guest import __main__ as guest
from support.guest.boot import STATUS_LOST_INTERRUPT, STATUS_TIMEOUT
from support.guest.lost_interrupts import ANSWERS, InService, question
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
