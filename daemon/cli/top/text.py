"""Text in the cells of a terminal: columns of a fixed width, numbers in a few characters, sparklines.  Pure."""

import unicodedata
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from ublkpool.daemon.cli.render import format_rate, three_digits
from ublkpool.daemon.events.event import plain

Span = tuple[str, str]
"""A text and the name of its style, which `app.py` gives a colour; the text alone must be understood, too."""
Line = list[Span]
SHORT = 6
"""Characters that a rate, a size or a duration has at most."""


class Marks(NamedTuple):
    """The characters beyond letters that a terminal can show."""

    ramp: str
    """From the least to the greatest value of a sparkline, none of which touches the line above."""
    cut: str
    """In place of what did not fit."""
    full: str
    """A part of a bar that is used up."""
    empty: str
    down: str
    up: str
    arrows: str


UNICODE = Marks("▁▂▃▄▅▆▇", "…", "█", "░", "▼", "▲", "↑↓")
ASCII = Marks("_.:-=+*", "~", "#", "-", "v", "^", "up down")


def cells(text: str) -> int:
    """How many cells the text takes."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def fit(text: str, width: int, cut: str = "", is_right: bool = False) -> str:
    """The text in exactly `width` cells, on their right side if `is_right`; `cut` is the end of one that is too long.

    Characters that do not print become `?`: a part of it may be a backend's.
    """
    text = plain(text)
    if cells(text) > width:
        text = _beginning(text, max(0, width - cells(cut))) + cut[:width]
    padding = " " * (width - cells(text))
    return padding + text if is_right else text + padding


def _beginning(text: str, width: int) -> str:
    used, kept = 0, ""
    for char in text:
        used += _cells(char)
        if used > width:
            break
        kept += char
    return kept


def crop(line: Line, width: int, cut: str) -> Line:
    """The line in exactly `width` cells."""
    found: Line = []
    left = width
    for number, (text, style) in enumerate(line):
        is_last = number == len(line) - 1
        used = cells(plain(text))
        if used > left or (used == left and not is_last and any(rest for rest, _ in line[number + 1 :])):
            found.append((fit(text + " " if used == left else text, left, cut), style))
            return found
        found.append((plain(text), style))
        left -= used
    return [*found, (" " * left, "")] if left else found


def wrap(line: Line, width: int, most: int) -> list[Line]:
    """The line in at most `most` lines, broken between words where one would exceed `width` cells.

    The last line has all that is left, so it alone may be too long.  Each of the others begins with a space.
    """
    line = [(plain(text), style) for text, style in line]
    text = "".join(each for each, _ in line)
    found: list[Line] = []
    begin = 0
    while len(found) < most - 1 and cells(text[begin:]) > width > 1:
        end = begin + len(_beginning(text[begin:], width))
        # A word that is as long as the line is broken.
        between = text.rfind(" ", begin + 1, end + 1)
        end = between if between > begin else end
        found.append(_part(line, begin, end))
        begin = end
    return [*found, _part(line, begin, len(text))]


def _part(line: Line, begin: int, end: int) -> Line:
    """The line's characters from `begin` to before `end`."""
    found: Line = []
    at = 0
    for text, style in line:
        piece = text[max(0, begin - at) : max(0, end - at)]
        if piece:
            found.append((piece, style))
        at += len(text)
    return found


def short_rate(per_s: float) -> str:
    """A rate in at most SHORT characters: `0.4`, `85`, `12345`, `123k`, `1.23M`."""
    if per_s < 99_999.5:
        return format_rate(per_s)
    return _scaled(per_s / 1000, 1000, "kMGT")


def short_size(size_bytes: float) -> str:
    """A size, or bytes a second, in at most SHORT characters: `0`, `512`, `4.00K`, `48.2M`."""
    if size_bytes < 999.5:
        return f"{size_bytes:.0f}"
    return _scaled(size_bytes / 1024, 1024, "KMGTPE")


def _scaled(value: float, step: int, units: str) -> str:
    for unit in units[:-1]:
        # What would be rounded to 1000 is written in the next unit.
        if value < 999.5:
            return three_digits(value) + unit
        value /= step
    return three_digits(value) + units[-1]


def short_share(share: float | None) -> str:
    """A share in percent: `0.4%`, `12%`; empty for None."""
    if share is None:
        return ""
    percent = share * 100
    return f"{percent:.1f}%" if 0 < percent < 9.95 else f"{percent:.0f}%"


def short_seconds(seconds: float) -> str:
    """An age: `0.5s`, `12s`, `3m`, `2h`, `4d`."""
    for unit, unit_s, below_s in (("s", 1, 120), ("m", 60, 7200), ("h", 3600, 172_800)):
        if seconds < below_s:
            return f"{seconds:.1f}s" if unit == "s" and seconds < 9.95 else f"{seconds / unit_s:.0f}{unit}"
    return f"{seconds / 86_400:.0f}d"


def spark(values: Sequence[float | None], width: int, ramp: str) -> str:
    """The last `width` values as characters, the newest on the right, on a scale from 0 to the greatest of them.

    A value that is missing is a space.
    """
    shown = values[-width:] if width > 0 else []
    greatest = max((each for each in shown if each is not None), default=0.0)
    return "".join(_level(each, greatest, ramp) for each in shown).rjust(max(0, width))


def _level(value: float | None, greatest: float, ramp: str) -> str:
    if value is None:
        return " "
    return ramp[max(0, ceil(value / greatest * len(ramp)) - 1)] if greatest > 0 else ramp[0]


def bar(share: float, width: int, marks: Marks) -> str:
    """A bar of which `share` (0 to 1) is used up; anything used is seen."""
    used = min(width, ceil(min(1.0, max(0.0, share)) * width))
    return marks.full * used + marks.empty * (width - used)
