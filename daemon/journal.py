"""Whether stderr is systemd's journal, and how a line there carries its priority.

Knows `JOURNAL_STREAM` of systemd.exec(5) and the `<N>` prefixes of sd-daemon(3).  Imports nothing that is slow: the
command line uses it for its one line of complaint.
"""

import os
from typing import TextIO

ERROR = 3
WARNING = 4
INFO = 6
DEBUG = 7
# Levels of `logging`, the most severe first, and the syslog priority of each; a level between two has the lower one's.
_PRIORITIES = ((50, 2), (40, ERROR), (30, WARNING), (20, INFO))


def is_journal(stream: TextIO) -> bool:
    """Whether what is written to `stream` goes to the journal.

    systemd names the device and inode of the stream that it connected.  They are compared, because the variable is
    inherited by children whose stderr goes elsewhere.
    """
    try:
        device, inode = map(int, os.environ.get("JOURNAL_STREAM", "").split(":"))
        status = os.fstat(stream.fileno())
    except (ValueError, OSError):
        return False
    return (status.st_dev, status.st_ino) == (device, inode)


def priority_of(level: int) -> int:
    """The syslog priority of a level of `logging`."""
    return next((priority for least, priority in _PRIORITIES if level >= least), DEBUG)


def with_priority(text: str, priority: int) -> str:
    """`text` with the prefix on every line, since the journal makes an entry of each line."""
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))
