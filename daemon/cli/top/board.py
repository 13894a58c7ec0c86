"""The whole screen as lines: a page's head, its rows, the last events, the keys.  Pure."""

from typing import NamedTuple

from ublkpool.daemon.cli.top import device_view, event_view, help_view, overview
from ublkpool.daemon.cli.top.columns import column_at
from ublkpool.daemon.cli.top.lines import Head, keys_line, last_events
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.top.text import Line, crop

_VIEWS = {"devices": overview, "device": device_view, "events": event_view, "help": help_view}
_ROWS_MIN = 4


class Board(NamedTuple):
    """The lines, and where among them the body is."""

    lines: list[Line]
    body_at: int
    body_height: int


def draw(session: Session, width: int, height: int) -> Board:
    """Exactly `height` lines of `width` cells each."""
    view = _VIEWS[session.page]
    head = _shortened(view.head(session, width), height - 1 - _ROWS_MIN)
    tail_height = _tail_height(session, height - len(head) - 1, height)
    body_height = max(0, height - len(head) - tail_height - 1)
    body = view.body(session, width, body_height)[:body_height]
    body += [[]] * (body_height - len(body))
    lines = [*head, *body, *last_events(session, width, tail_height), keys_line(view.KEYS, width)]
    lines = [crop(each, width, session.marks.cut) for each in lines[:height]]
    return Board(lines, len(head), body_height)


def click(session: Session, board: Board, x: int, y: int, width: int) -> None:
    """Choose the row at this cell, or sort by the column whose name is there."""
    line = y - board.body_at
    if session.page not in ("devices", "device") or not 0 <= line < board.body_height:
        return
    if line > 0:
        session.click(session.table.window.top + line - 1)
        return
    name = _column_name(session, x, width)
    if name:
        session.sort_with(name)


def _column_name(session: Session, x: int, width: int) -> str:
    if session.page == "devices":
        devices = column_at(overview.columns(session, width), x)
        return devices.name if devices else ""
    queues = column_at(device_view.columns(session, width), x)
    return queues.name if queues else ""


def _shortened(head: Head, height: int) -> list[Line]:
    """The head in at most so many lines, but with the whole notice, and at least one line."""
    left = max(0 if head.notice else 1, height - len(head.notice))
    return [*head.lines[:left], *head.notice]


def _tail_height(session: Session, left: int, height: int) -> int:
    """How many lines the last events have: a fifth of the screen, if enough is left for rows."""
    if session.page not in ("devices", "device"):
        return 0
    wanted = max(5, height // 5) if session.page == "devices" else max(3, height // 5)
    return min(wanted, left - 1 - _ROWS_MIN) if left - 1 - _ROWS_MIN >= 2 else 0
