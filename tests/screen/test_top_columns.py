"""The tables: which columns fit, that all can be reached, and the order of rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublkpool.daemon.cli.top.columns import PINNED, Column, column_at, heading, place, row, shifts, sort
from ublkpool.daemon.cli.top.device_columns import DEVICE_COLUMNS, natural
from ublkpool.daemon.cli.top.queue_columns import QUEUE_COLUMNS
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.top.text import UNICODE, cells

NUMBERS: Column[int | None] = Column(
    "NUMBER", 6, lambda item, width, marks: (str(item), ""), lambda item: item
)
BY_NAME = {each.name: each for each in DEVICE_COLUMNS}


def test_80_columns_show_what_matters_most() -> None:
    names = [column.name for column, _ in place(DEVICE_COLUMNS, 80, 0, 10)]
    assert names == ["NAME", "STATE", "R/S", "W/S", "R B/S", "W B/S", "P50", "P99", "TREND", "ACTIVE"]


@pytest.mark.parametrize("columns", [DEVICE_COLUMNS, QUEUE_COLUMNS])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_each_column_can_be_scrolled_to(columns: tuple[Column[object], ...], width: int) -> None:
    seen: set[str] = set()
    for first in range(shifts(columns, width, 10) + 1):
        seen |= {column.name for column, _ in place(columns, width, first, 10)}
    assert seen == {each.name for each in columns}


@pytest.mark.parametrize("columns", [DEVICE_COLUMNS, QUEUE_COLUMNS])
@given(st.integers(1, 300), st.integers(0, 30), st.integers(0, 5))
def test_what_is_placed_fits(columns: tuple[Column[object], ...], width: int, first: int, sort: int) -> None:
    placed = place(columns, width, first, 10)
    used = sum(each for _, each in placed) + len(placed)
    assert used <= width or len(placed) == PINNED
    assert sum(cells(text) for text, _ in heading(placed, columns[sort].name, False, UNICODE)) == used


def test_room_that_is_left_goes_to_the_trend() -> None:
    placed = dict((column.name, width) for column, width in place(DEVICE_COLUMNS, 320, 0, 10))
    assert (
        placed["TREND"] == 40 and placed["R/S"] == BY_NAME["R/S"].width and len(placed) == len(DEVICE_COLUMNS)
    )


def test_those_without_a_value_come_last_in_either_order() -> None:
    items = [2, None, 3, 1]
    assert sort(items, NUMBERS, is_reversed=False) == [3, 2, 1, None]
    assert sort(items, NUMBERS, is_reversed=True) == [1, 2, 3, None]
    ascending = NUMBERS._replace(is_ascending=True)
    assert sort(items, ascending, is_reversed=False) == [1, 2, 3, None]


def test_names_are_sorted_as_people_count() -> None:
    names = ["vol10", "vol2", "a", "vol2b", "10", "9"]
    assert sorted(names, key=natural) == ["a", "vol2", "vol2b", "vol10", "9", "10"]


@pytest.mark.parametrize(("is_reversed", "arrow"), [(False, UNICODE.down), (True, UNICODE.up)])
def test_the_sorted_column_has_an_arrow(is_reversed: bool, arrow: str) -> None:
    text = "".join(
        text for text, _ in heading(place(DEVICE_COLUMNS, 80, 0, 10), "ACTIVE", is_reversed, UNICODE)
    )
    assert text.endswith(f"{arrow}ACTIVE") and text.count(arrow) == 1


def test_a_click_finds_the_column_that_is_there() -> None:
    placed = place(DEVICE_COLUMNS, 80, 0, 10)
    text = "".join(text for text, _ in heading(placed, "", False, UNICODE))
    for column, _ in placed:
        found = column_at(placed, text.index(f" {column.name}") + 1)
        assert found is not None and found.name == column.name
    assert column_at(placed, 80) is None


def test_a_row_is_chosen_by_a_character_and_by_a_style(session: Session) -> None:
    placed = place(DEVICE_COLUMNS, 90, 0, 10)
    device = session.devices[0]
    plain, chosen = row(placed, device, False, 90, UNICODE), row(placed, device, True, 90, UNICODE)
    assert plain[0][0] == " " and chosen[0][0] == ">"
    assert (
        all(style.startswith("chosen") for _, style in chosen)
        and sum(cells(text) for text, _ in chosen) == 90
    )
