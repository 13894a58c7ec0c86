"""A vm test that does not depend on the kernel runs in exactly one guest of each `make test`."""

import pytest

from support.guest.one_kernel import guest_for


@pytest.mark.parametrize("named", ["6.12", "7.3"])
@pytest.mark.parametrize("guests", [["6.12", "7.3"], ["7.3", "6.12"], ["6.12"], ["7.3"]])
def test_exactly_one_guest_runs_it(named: str, guests: list[str]) -> None:
    assert [guest_for(named, guests) == each for each in guests].count(True) == 1


def test_the_named_guest_runs_it_if_it_is_booted() -> None:
    assert guest_for("6.12", ["6.12", "7.3"]) == "6.12"
    assert guest_for("7.3", ["6.12", "7.3"]) == "7.3"


def test_without_the_named_guest_the_last_one_runs_it() -> None:
    assert guest_for("7.3", ["6.12"]) == "6.12"
