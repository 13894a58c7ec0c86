"""What is mounted where, and what is swap: /proc/PID/mountinfo (proc_pid_mountinfo(5)), /proc/swaps (proc_swaps(5))."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ESCAPE = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """A line of /proc/PID/mountinfo.

    Bytes of `path` and `source` that are not UTF-8 are surrogates, as `os.fsdecode` makes them.
    """

    id: int
    parent: int
    device: str
    """`major:minor`"""
    path: str
    source: str
    """A node in /dev, or what else the file system takes."""


def read_mounts(mountinfo: Path = Path("/proc/self/mountinfo")) -> list[Mount]:
    """The mounts of a mount namespace, in the order of the file `mountinfo`.  Raises `OSError`."""
    return list(parse_mounts(os.fsdecode(mountinfo.read_bytes())))


def parse_mounts(mountinfo: str) -> Iterator[Mount]:
    """The mounts in a text of /proc/PID/mountinfo, in the order of the text."""
    # The kernel escapes space, tab and newline; what else Python takes for the end of a word or line may be in a path.
    for line in filter(None, mountinfo.split("\n")):
        about, _, origin = line.partition(" - ")
        number, parent, device, _, path = about.split(" ")[:5]
        _, source, *_ = (*origin.split(" "), "")
        yield Mount(int(number), int(parent), device, unescaped(path), unescaped(source))


def read_swaps(swaps: Path = Path("/proc/swaps")) -> list[str]:
    """The paths of all swap files and nodes.  Raises `OSError`."""
    lines = os.fsdecode(swaps.read_bytes()).split("\n")[1:]
    return [unescaped(re.split("[ \t]", line, maxsplit=1)[0]) for line in lines if line]


def unescaped(text: str) -> str:
    """A path as it is, from the form in which files of /proc and /sys have it."""
    return _ESCAPE.sub(lambda code: chr(int(code[1], 8)), text)


def shown(path: str) -> str:
    """The path for a message or a log line: one line, without surrogates; "?" for each control character."""
    text = os.fsencode(path).decode(errors="replace")
    return "".join(each if each.isprintable() else "?" for each in text)
