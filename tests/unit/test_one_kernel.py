"""A vm test that does not depend on the kernel runs in exactly one guest of each `make test`."""

import pytest

from support.guest.one_kernel import guest_for, runs_here


@pytest.mark.parametrize("named", ["6.12", "7.3"])
@pytest.mark.parametrize("guests", [["6.12", "7.3"], ["7.3", "6.12"], ["6.12"], ["7.3"]])
def test_exactly_one_guest_runs_it(named: str, guests: list[str]) -> None:
    assert [guest_for(named, guests) == each for each in guests].count(True) == 1


def test_the_named_guest_runs_it_if_it_is_booted() -> None:
    assert guest_for("6.12", ["6.12", "7.3"]) == "6.12"
    assert guest_for("7.3", ["6.12", "7.3"]) == "7.3"


def test_without_the_named_guest_the_last_one_runs_it() -> None:
    assert guest_for("7.3", ["6.12"]) == "6.12"


def test_each_of_two_guests_runs_what_is_named_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UBLKPOOL_EVERY_KERNEL", raising=False)
    monkeypatch.setenv("UBLKPOOL_KERNELS", "6.12 7.3")
    for here, other in (("6.12", "7.3"), ("7.3", "6.12")):
        monkeypatch.setenv("UBLKPOOL_GUEST", here)
        assert [runs_here(named) for named in (here, other)] == [True, False]


def test_a_guest_alone_a_machine_and_a_long_run_leave_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in (
        {"KERNELS": "6.12", "GUEST": "6.12"},
        {},
        {"KERNELS": "6.12 7.3", "GUEST": "6.12", "EVERY_KERNEL": "1"},
    ):
        for name in ("KERNELS", "GUEST", "EVERY_KERNEL"):
            monkeypatch.delenv(f"UBLKPOOL_{name}", raising=False)
        for name, value in setting.items():
            monkeypatch.setenv(f"UBLKPOOL_{name}", value)
        assert [runs_here(named) for named in ("6.12", "7.3")] == [True, True]
