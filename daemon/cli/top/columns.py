"""Columns of a table: what fits beside each other, the row of an item, the order of items.  Pure."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from ublkpool.daemon.cli.top.text import Line, Marks, Span, crop, fit

T = TypeVar("T")
PINNED = 2
"""Columns on the left that never scroll away."""
GAP = 1


class Column(NamedTuple, Generic[T]):
    """One column: its cell for an item, and the value that items are sorted by, None where there is none."""

    name: str
    width: int
    cell: Callable[[T, int, Marks], Span]
    """The cell, of which as much is shown as fits in this width."""
    order: Callable[[T], Any]
    is_right: bool = True
    is_ascending: bool = False
    """Whether the least comes first unless the order is reversed."""
    letter: str = ""
    """The key that sorts by it."""
    grows_to: int = 0
    """The width up to which it takes what no other column needs."""


Placed = list[tuple[Column[T], int]]
"""The columns on the screen and their widths."""


def place(columns: Sequence[Column[T]], width: int, first: int, name_width: int) -> Placed[T]:
    """The pinned columns, and those from the one after `first` others on as far as they fit in `width` cells.

    The first column gets `name_width`.
    """
    pinned = [(columns[0], name_width), *((each, each.width) for each in columns[1:PINNED])]
    left = width - 1 - sum(each + GAP for _, each in pinned) + GAP
    found = list(pinned)
    for column in columns[PINNED + first :]:
        if column.width + GAP > left:
            break
        left -= column.width + GAP
        found.append((column, column.width))
    return [_grown(column, has, left) for column, has in found]


def _grown(column: Column[T], width: int, left: int) -> tuple[Column[T], int]:
    return column, max(width, min(column.grows_to, width + left))


def shifts(columns: Sequence[Column[T]], width: int, name_width: int) -> int:
    """How many columns must scroll away until the last one is on the screen."""
    for first in range(len(columns) - PINNED):
        if first + len(place(columns, width, first, name_width)) >= len(columns):
            return first
    return max(0, len(columns) - PINNED - 1)


def heading(placed: Placed[T], sort: str, is_reversed: bool, marks: Marks) -> Line:
    """The names; the column that rows are sorted by has an arrow."""
    line: Line = []
    # The first column has the line's margin before it.
    gap = " "
    for column, width in placed:
        arrow = ""
        if column.name == sort:
            arrow = marks.up if column.is_ascending != is_reversed else marks.down
        if column.is_right:
            # The arrow stands in the gap: the name may take the whole width.
            text = (arrow or gap) + fit(column.name, width, is_right=True)
        else:
            text = gap + fit(column.name + arrow, width)
        line.append((text, "sorted" if arrow else "head"))
        gap = " " * GAP
    return line


def row(placed: Placed[T], item: T, is_chosen: bool, width: int, marks: Marks) -> Line:
    """The item's cells in a line of this width; the chosen row is marked by a character, too."""
    line: Line = [(">" if is_chosen else " ", "")]
    for number, (column, cell_width) in enumerate(placed):
        text, style = column.cell(item, cell_width, marks)
        line.append(
            ((" " * GAP if number else "") + fit(text, cell_width, marks.cut, column.is_right), style)
        )
    if not is_chosen:
        return line
    return [(text, f"chosen {style}".rstrip()) for text, style in crop(line, width, marks.cut)]


def column_at(placed: Placed[T], x: int) -> Column[T] | None:
    """The column at this cell of the line."""
    end = 1
    for number, (column, width) in enumerate(placed):
        end += width + (GAP if number else 0)
        if x < end:
            return column
    return None


def sort(items: Sequence[T], column: Column[T], is_reversed: bool) -> list[T]:
    """The items in this column's order; those without a value come last in either order."""
    values = [(column.order(each), each) for each in items]
    known = [each for each in values if each[0] is not None]
    known.sort(key=lambda each: each[0], reverse=column.is_ascending == is_reversed)
    return [item for _, item in known] + [item for value, item in values if value is None]
