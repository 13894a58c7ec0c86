"""All files of a machine or of a root, to be compared with those at another time.

Needs nothing but Python: it runs in the systemd guest, too.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

Listing = dict[str, tuple[int, str]]

NOT_FILES = (
    *("proc", "sys", "tmp", "root", "var/lib/dpkg", "var/log", "var/cache/ldconfig/aux-cache"),
    # systemd's own, which is gone at the next boot.
    "run/systemd",
    # systemd-sysusers and groupdel keep what was there before.
    *("etc/group-", "etc/gshadow-", "etc/passwd-", "etc/shadow-", "etc/subuid-", "etc/subgid-"),
)
"""What no listing has: no files, or files that dpkg, systemd and the tests write for themselves."""
_USERS = ("etc/group", "etc/gshadow", "etc/passwd", "etc/shadow", "etc/subuid", "etc/subgid")


def listing(root: str, but: Sequence[str] = NOT_FILES) -> Listing:
    """The mode of each file, by its path; of links where they lead, of lists of users and groups their lines."""
    return dict(entries(root, but))


def entries(root: str, but: Sequence[str] = NOT_FILES) -> Iterator[tuple[str, tuple[int, str]]]:
    """A listing's entries one by one."""
    top = root.rstrip("/") + "/"
    return _below(top, len(top), set(but))


def _below(directory: str, prefix: int, but: set[str]) -> Iterator[tuple[str, tuple[int, str]]]:
    """All that is below a directory, by its path without so many characters of the root's."""
    with os.scandir(directory) as found:
        entries = sorted(found, key=lambda each: each.name)
    for each in entries:
        path = each.path[prefix:]
        if path in but:
            continue
        # A machine that runs removes files meanwhile.
        with suppress(FileNotFoundError):
            yield path, _about(each, path)
            if each.is_dir(follow_symlinks=False):
                yield from _below(each.path, prefix, but)


def _about(entry: "os.DirEntry[str]", path: str) -> tuple[int, str]:
    mode = entry.stat(follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        return mode, os.readlink(entry.path)  # noqa: PTH115
    if path in _USERS:
        return mode, "\n".join(sorted(Path(entry.path).read_text().splitlines()))
    return mode, ""
