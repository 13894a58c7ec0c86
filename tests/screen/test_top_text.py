"""Text in cells: exact widths whatever the characters, numbers in few characters, sparklines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublkpool.daemon.cli.top.text import (
    ASCII,
    SHORT,
    UNICODE,
    Marks,
    bar,
    cells,
    crop,
    fit,
    short_rate,
    short_seconds,
    short_share,
    short_size,
    spark,
    wrap,
)

NASTY = st.text(st.sampled_from("ab\x1b\n\t磁盘é\u0301\U0001f4be"), max_size=20)


@given(NASTY, st.integers(0, 30), st.booleans())
def test_a_cell_has_its_width_and_nothing_that_a_terminal_acts_on(
    text: str, width: int, is_right: bool
) -> None:
    shown = fit(text, width, "…", is_right)
    assert cells(shown) == width and shown.isprintable()


@given(st.lists(st.tuples(NASTY, st.just("")), max_size=5), st.integers(0, 40))
def test_a_line_has_its_width(line: list[tuple[str, str]], width: int) -> None:
    assert sum(cells(text) for text, _ in crop(line, width, "…")) == width


@pytest.mark.parametrize("mark", ["\u0301", "\ufe0f", "\u0e31", "\u20dd", "\u034f"])
def test_a_mark_on_a_character_takes_no_cell_of_its_own(mark: str) -> None:
    assert cells(f"a{mark}b") == 2 and fit(f"a{mark}b", 3) == f"a{mark}b "


def test_a_long_line_goes_on_below_between_words() -> None:
    assert wrap([(" a bc", "x"), (" def", "y")], 5, 3) == [[(" a bc", "x")], [(" def", "y")]]
    assert wrap([(" a bcd ef", "x")], 4, 2) == [[(" a", "x")], [(" bcd ef", "x")]], "the last has the rest"
    assert wrap([(" abcdefgh", "x")], 4, 3) == [[(" abc", "x")], [("defg", "x")], [("h", "x")]]
    assert wrap([(" a", "x")], 4, 3) == [[(" a", "x")]] and wrap([], 4, 3) == [[]]


@given(st.lists(st.tuples(NASTY, st.just("")), max_size=5), st.integers(0, 40), st.integers(1, 5))
def test_lines_that_go_on_below_lose_nothing_and_have_their_width(
    line: list[tuple[str, str]], width: int, most: int
) -> None:
    found = wrap(line, width, most)
    assert 1 <= len(found) <= most
    assert all(sum(cells(text) for text, _ in each) <= width for each in found[:-1])
    whole = "".join(text for each in found for text, _ in each)
    assert len(whole) == sum(len(text) for text, _ in line) and (whole.isprintable() or not whole)


def test_what_does_not_fit_ends_with_a_mark() -> None:
    assert fit("database", 5, "…") == "data…" and fit("data", 5, "…") == "data "
    assert fit("磁盘磁盘", 6, "…") == "磁盘… " and fit("7", 3, is_right=True) == "  7"
    assert crop([("abc", "x"), ("def", "y")], 5, "~") == [("abc", "x"), ("d~", "y")]
    assert crop([("abc", "x"), ("def", "y")], 3, "~") == [("ab~", "x")]
    assert crop([("abc", "x")], 5, "~") == [("abc", "x"), ("  ", "")]
    assert crop([("abc", "x")], 3, "~") == [("abc", "x")]


@pytest.mark.parametrize(
    ("per_s", "text"),
    [
        (0, "0"),
        (0.04, "0.0"),
        (9.4, "9.4"),
        (99_999, "99999"),
        (99_999.6, "100k"),
        (1_234_567, "1.23M"),
        (9.999e8, "1.00G"),
    ],
)
def test_a_rate_is_short(per_s: float, text: str) -> None:
    assert short_rate(per_s) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0"), (999, "999"), (1000, "0.98K"), (4096, "4.00K"), (1023.9 * 1024, "1.00M"), (1 << 40, "1.00T")],
)
def test_a_size_is_short(size_bytes: float, text: str) -> None:
    assert short_size(size_bytes) == text


@given(st.floats(0, 1e17))
def test_no_number_is_wider_than_its_column(value: float) -> None:
    assert len(short_size(value)) <= SHORT and len(short_rate(min(value, 9e14))) <= SHORT
    assert len(short_seconds(min(value, 8e9))) <= SHORT


def test_shares_and_ages() -> None:
    assert [short_share(each) for each in (None, 0.0, 0.004, 0.12, 8.0)] == ["", "0%", "0.4%", "12%", "800%"]
    ages = {0.0: "0.0s", 9.9: "9.9s", 12: "12s", 119: "119s", 120: "2m", 7200: "2h", 200_000: "2d"}
    assert {age: short_seconds(age) for age in ages} == ages


@pytest.mark.parametrize("marks", [UNICODE, ASCII])
def test_a_sparkline_is_on_a_scale_from_zero(marks: Marks) -> None:
    ramp = marks.ramp
    assert len(ramp) == 7
    assert spark([7.0, 4.0, 0.0, None, 1.0], 6, ramp) == f" {ramp[6]}{ramp[3]}{ramp[0]} {ramp[0]}"
    assert spark([100.0, 1.0, 2.0], 2, ramp) == ramp[3] + ramp[6], "the scale is that of what is shown"
    assert spark([0.0, 0.0], 2, ramp) == ramp[0] * 2
    assert spark([], 3, ramp) == "   " and spark([1.0], 0, ramp) == ""


def test_a_bar_shows_anything_that_is_used() -> None:
    assert [bar(each, 4, ASCII) for each in (0.0, 0.01, 0.5, 1.0, 7.0)] == [
        "----",
        "#---",
        "##--",
        "####",
        "####",
    ]
