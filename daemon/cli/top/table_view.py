"""A table on its page: the columns that fit, and the rows on the screen.  Pure."""

from collections.abc import Sequence
from typing import TypeVar

from ublkpool.daemon.cli.top.columns import Placed, heading, place, row, shifts
from ublkpool.daemon.cli.top.session import Session, Table
from ublkpool.daemon.cli.top.text import Line

T = TypeVar("T")


def place_columns(table: Table[T], width: int, name_width: int) -> Placed[T]:
    """The columns that fit, as far as the user has scrolled them; the first one gets `name_width`."""
    table.first_max = shifts(table.columns, width, name_width)
    table.first = min(table.first, table.first_max)
    return place(table.columns, width, table.first, name_width)


def draw(
    session: Session, table: Table[T], placed: Placed[T], items: Sequence[T], width: int, height: int
) -> list[Line]:
    """The columns' names and the rows on the screen; `items` are those of the session's page."""
    keys, marks = session.keys, session.marks
    session.body_height, session.body_count = height - 1, len(items)
    shown = table.window.shown(keys, height - 1)
    chosen = table.window.at(keys)
    lines = [heading(placed, table.sort_by, table.is_reversed, marks)]
    return lines + [row(placed, items[index], index == chosen, width, marks) for index in shown]
