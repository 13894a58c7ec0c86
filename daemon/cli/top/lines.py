"""Lines that several pages have: the title, what to know now, events, the keys.  Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.top.text import Line, cells, crop, fit, wrap
from ublkpool.daemon.events.event import Event

_SEVERITIES = {"info": "dim", "warning": "warn", "error": "bad"}
_LAST_KEYS = (("?", "help"), ("q", "quit"))
NOTICE_LINES = 3
"""Lines that a notice has at most; its end names the way out."""


class Head(NamedTuple):
    """The upper part of a page: its lines, and below them the notice, which a small screen keeps longest."""

    lines: list[Line]
    notice: list[Line]


def beside(left: Line, right: Line, at: int) -> Line:
    """Two parts of a line; the right one begins at the cell `at`, or after the left one."""
    used = sum(cells(text) for text, _ in left)
    return [*left, (" " * max(1, at - used), ""), *right]


def title(session: Session, text: Line, width: int) -> Line:
    """The first line of a page: the text, and when its numbers were read."""
    model = session.model
    time = model.time.partition("T")[2][:8]
    every = f"every {session.interval_s:g} s"
    read = f"{time} UTC  {every} " if time else f"{every} "
    line = beside([(" ", "title"), *text], [(read, "title")], width - len(read))
    return [(part, style or "title") for part, style in crop(line, width, session.marks.cut)]


def notice(session: Session, otherwise: Line, width: int) -> list[Line]:
    """What the user must know: a pause, a filter, an absent daemon; `otherwise` without any of them."""
    found: Line = [*_pause(session), *_filter(session), *_trouble(session)]
    return wrap(found or otherwise, width, NOTICE_LINES)


def _pause(session: Session) -> Line:
    return [(" PAUSED, p goes on ", "alarm")] if session.is_paused else []


def _filter(session: Session) -> Line:
    if session.is_editing:
        return [
            (" filter: ", "key"),
            (session.filter, ""),
            ("_", "cursor"),
            ("  Enter keeps it, Esc removes it ", "dim"),
        ]
    if session.filter and session.page != "device":
        shown, count = len(session.devices), len(session.model.devices)
        return [(" filter: ", "key"), (session.filter, ""), (f"  {shown} of {count} devices ", "dim")]
    return []


def _trouble(session: Session) -> Line:
    model = session.model
    if not model.trouble:
        return []
    # A screen that is paused asks the daemon nothing, so it waits for nothing.
    waits = model.has_failed and not session.is_paused
    return [(f" waiting for the daemon: {model.trouble}" if waits else f" {model.trouble}", "alarm")]


def event_line(event: Event, width: int, cut: str, is_whole: bool) -> Line:
    """The event in one line; `is_whole`: with its date and its code."""
    day, _, time = event.time.partition("T")
    style = _SEVERITIES.get(event.severity, "")
    head = f" {day} " if is_whole else " "
    line: Line = [
        (head + time[:8] + " ", "dim"),
        (fit(event.severity, 8), style),
        (fit(event.device or "-", 12, cut) + " ", "name"),
    ]
    if is_whole:
        line.append((fit(event.code, 18, cut) + " ", ""))
    line.append((event.text, style if event.severity == "error" else ""))
    return crop(line, width, cut)


def last_events(session: Session, width: int, height: int) -> list[Line]:
    """A title and the last events, in `height` lines."""
    if height < 2:
        return []
    of = f" of {session.looked_at}" if session.looked_at else ""
    shown: Sequence[Event] = session.events()[-(height - 1) :]
    found: list[Line] = [[(fit(f" EVENTS{of}", width, session.marks.cut), "head")]]
    found += [event_line(each, width, session.marks.cut, is_whole=False) for each in shown]
    if not shown:
        found.append([(" none", "dim")])
    return found + [[]] * (height - len(found))


def keys_line(keys: Sequence[tuple[str, str]], width: int) -> Line:
    """The keys that fit; help and the end always do."""
    left = width - sum(len(key) + len(word) + 3 for key, word in _LAST_KEYS)
    shown = []
    for key, word in keys:
        left -= cells(key) + cells(word) + 3
        if left < 0:
            break
        shown.append((key, word))
    line: Line = []
    for key, word in (*shown, *_LAST_KEYS):
        line += [(f" {key}", "key"), (f" {word} ", "dim")]
    return line
