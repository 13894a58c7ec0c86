"""The page of help.  Pure."""

from ublkpool.daemon.cli.top.lines import Head, title
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.top.text import Line, crop, fit

KEYS = (("Esc", "back"), ("PgUp PgDn", "scroll"))
_KEYS = (
    ("up, down, j, k", "choose a row; PgUp, PgDn, Home, End, g, G as well"),
    ("left, right", "show columns further left or right; a wider screen shows more"),
    ("Enter", "look at the chosen device in depth; Esc goes back"),
    ("e", "the last 1000 events; End or G follows the newest"),
    ("/", "show only devices with this in their names; Esc removes it"),
    ("< >", "sort by the column further left or right"),
    ("N S R W L A E", "sort by name, state, reads, writes, P99, active, errors"),
    ("r", "reverse the order; the same letter again does it, too"),
    ("p, Space", "stop the screen, and go on"),
    ("+ -", "a longer or shorter interval"),
    ("q, Ctrl-C", "end; Ctrl-Z stops it until fg"),
)
_WORDS = (
    ("R/S W/S", "reads and writes a second; R B/S, W B/S: their bytes"),
    ("P50 P99", "what 50 and 99 of 100 requests of the interval did not exceed"),
    ("TREND", "P99 of the last intervals, from 0 to the greatest that is shown"),
    ("ACTIVE", "requests with the workers now"),
    ("OLDEST", "the age of the oldest one; needs the device's io_timeout"),
    ("POOL", "the share of the pool's buffers that is lent to requests"),
    ("HELD", "buffers that the queues hold, lent ones included"),
    ("WAITED", "times that a request had to wait for a buffer"),
    ("RECOV", "replacements of the device's workers"),
    ("BACK P99", "of the backend; WAIT P99: of waiting for a buffer"),
    ("!", "after the state: the device does not serve; its page says why"),
    ("(file)", "a backend in parentheses is not attached"),
)


def head(session: Session, width: int) -> Head:
    """The title."""
    return Head([title(session, [("help", "title")], width)], [])


def body(session: Session, width: int, height: int) -> list[Line]:
    """The lines of the help that are on the screen."""
    lines: list[Line] = [
        [(" KEYS", "head")],
        *(_line(key, text) for key, text in _KEYS),
        [],
        [(" NUMBERS", "head")],
        *(_line(word, text) for word, text in _WORDS),
    ]
    session.body_height, session.body_count = height, len(lines)
    shown = session.help_scroll.shown(len(lines), height)
    return [crop(lines[index], width, session.marks.cut) for index in shown]


def _line(word: str, text: str) -> Line:
    return [(" " + fit(word, 15), "key"), (text, "")]
