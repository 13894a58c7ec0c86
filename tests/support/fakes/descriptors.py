"""Descriptors: which are open, whether one is readable, and a process without a free one."""

import gc
import os
import resource
import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def open_descriptors() -> set[tuple[str, str]]:
    """The number and the file of each open descriptor of this process.

    Garbage is collected first: objects that an earlier test left would close their descriptors at any time.
    """
    gc.collect()
    found = set()
    for each in Path("/proc/self/fd").iterdir():
        # The listing's own descriptor is closed by now.
        with suppress(FileNotFoundError):
            found.add((each.name, str(each.readlink())))
    return found


def is_readable(file: int, wait_s: float = 0.0) -> bool:
    """Whether the descriptor becomes readable within `wait_s` seconds; any number, unlike `select.select`."""
    poller = select.poll()
    poller.register(file, select.POLLIN)
    return bool(poller.poll(wait_s * 1000))


@contextmanager
def no_descriptor_left(but: int = 0) -> Iterator[None]:
    """During the block this process can open no file, or this many."""
    # Objects that an earlier test left would close theirs within the block.
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, highest + 32), hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(but):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
