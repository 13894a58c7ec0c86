"""The screen of `ublkpool top` as text, for tests."""

import os

from ublkpool.daemon.cli.top.board import draw
from ublkpool.daemon.cli.top.device_columns import DEVICE_COLUMNS
from ublkpool.daemon.cli.top.session import Session

IS_WRITING = os.environ.get("UBLKPOOL_PICTURES") == "write"
"""`make pictures` sets it: golden texts and pictures are written anew instead of compared."""


def text_of(session: Session, width: int = 80, height: int = 24) -> list[str]:
    """The lines on a screen of this size, without spaces at their ends."""
    return ["".join(part for part, _ in line).rstrip() for line in draw(session, width, height).lines]


def press(session: Session, *keys: str) -> Session:
    """Press these keys, each on a screen of 80x24; a key of one character prints it."""
    for key in keys:
        session.press(key, key if len(key) == 1 else None)
        draw(session, 80, 24)
    return session


def cell_of(session: Session, name: str, column: str) -> str:
    """What the page of devices shows of this device in this column, without spaces."""
    device = session.model.devices[name]
    [cell] = [each.cell for each in DEVICE_COLUMNS if each.name == column]
    text, _ = cell(device, 20, session.marks)
    return text.strip()
