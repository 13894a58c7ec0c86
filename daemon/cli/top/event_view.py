"""The page of events.  Pure."""

from ublkpool.daemon.cli.top.lines import Head, event_line, notice, title
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.top.text import Line

KEYS = (("Esc", "back"), ("/", "filter"), ("PgUp PgDn", "scroll"), ("End", "follow"), ("p", "pause"))


def head(session: Session, width: int) -> Head:
    """The title, and whether the last event stays on the screen."""
    of = f" of {session.looked_at}" if session.looked_at else ""
    text = f"events{of}, last {len(session.events())}"
    follows = "" if session.event_scroll.follows else " scrolled back, End follows again"
    return Head([title(session, [(text, "title")], width)], notice(session, [(follows, "dim")], width))


def body(session: Session, width: int, height: int) -> list[Line]:
    """The events on the screen."""
    found = session.events()
    session.body_height, session.body_count = height, len(found)
    shown = session.event_scroll.shown(len(found), height)
    lines = [event_line(found[index], width, session.marks.cut, is_whole=width >= 100) for index in shown]
    return lines or [[(" none yet", "dim")]]
