"""Descriptors: whether one is readable, and a process without a free one."""

import os
import resource
import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def is_readable(file: int, wait_s: float = 0.0) -> bool:
    """Whether the descriptor becomes readable within `wait_s` seconds; any number, unlike `select.select`."""
    poller = select.poll()
    poller.register(file, select.POLLIN)
    return bool(poller.poll(wait_s * 1000))


@contextmanager
def no_descriptor_left(but: int = 0) -> Iterator[None]:
    """During the block this process can open no file, or this many."""
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
