"""What `ps` shows for this process, in place of what it was started with.

The kernel shows the memory in which the arguments were when the program began (proc_pid_cmdline(5)), so there is room
for as many bytes as they had.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

_ARGUMENTS_FIELD = 45
"""The first of two in /proc/self/stat, counted from the field after the name (proc_pid_stat(5): field 48)."""


def show_as(words: Sequence[str]) -> None:
    """Show these as the command line, cut to the room that there is.  Raises `OSError`."""
    fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(") ")[2].split()
    start, end = map(int, fields[_ARGUMENTS_FIELD : _ARGUMENTS_FIELD + 2])
    room = end - start
    if not start or room < 1:
        return
    # The last byte stays 0: otherwise the kernel takes the environment for a part of it.
    text = b"\0".join(each.encode(errors="surrogateescape") for each in words)[: room - 1]
    ctypes.memmove(start, text.ljust(room, b"\0"), room)
