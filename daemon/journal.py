"""Detects systemd's journal behind a stream, and gives a line its priority there.

Uses `JOURNAL_STREAM` of systemd.exec(5) and the `<N>` prefixes of sd-daemon(3).  Imports no slow module, because every
command uses it for its errors.
"""

import os
from typing import TextIO

ERROR = 3
WARNING = 4
INFO = 6
DEBUG = 7
# Levels of `logging` and their syslog priorities, most severe first; a level in between has the lower one's priority.
_PRIORITIES = ((50, 2), (40, ERROR), (30, WARNING), (20, INFO))


def is_journal(stream: TextIO) -> bool:
    """Whether `stream` is connected to the journal.

    JOURNAL_STREAM holds the device and inode of the stream that systemd connected.  They must match, because children
    inherit the variable even if their stderr goes elsewhere.
    """
    try:
        device, inode = map(int, os.environ.get("JOURNAL_STREAM", "").split(":"))
        status = os.fstat(stream.fileno())
    except (ValueError, OSError):
        return False
    return (status.st_dev, status.st_ino) == (device, inode)


def priority_of(level: int) -> int:
    """The syslog priority (0 to 7) of a level of `logging`."""
    return next((priority for minimum, priority in _PRIORITIES if level >= minimum), DEBUG)


def with_priority(text: str, priority: int) -> str:
    """`text` with the prefix on each line, because the journal makes an entry of each line."""
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))
