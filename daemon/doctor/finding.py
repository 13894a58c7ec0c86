"""What a check found: the objects of `doctor --json`.

Owns their fields, which scripts rely on: fields are added, never renamed.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

Level = Literal["ok", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "fail")
_NAMED_MAX = 10


class Finding(msgspec.Struct, frozen=True):
    """One sentence of a check, and what to do; `way_out` is empty if nothing has to be done.

    `sources`: where others report the same, as addresses or documents of ublkpool.
    """

    check: str
    level: Level
    says: str
    way_out: str = ""
    sources: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True):
    """Every finding, in the order of the checks; `level` is the worst of them."""

    level: Level
    findings: list[Finding]


def report_of(findings: Sequence[Finding]) -> Report:
    """The findings with their worst level; ok if there are none."""
    return Report(max((each.level for each in findings), key=LEVELS.index, default="ok"), list(findings))


def printable(text: str) -> str:
    """The text in one line, with a question mark for whatever a terminal or JSON does not take, as in a file's name."""
    return "".join(each if each.isprintable() else "?" for each in text)


def some(names: Iterable[str]) -> str:
    """The names in one line, of many only the first ten and the number of the others."""
    found = list(names)
    shown = ", ".join(found[:_NAMED_MAX])
    return shown if len(found) <= _NAMED_MAX else f"{shown} and {len(found) - _NAMED_MAX} more"
