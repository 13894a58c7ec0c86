"""Defect: a cache that is lost with the process, and a FLUSH that keeps nothing."""

import os

file = -1


def open(path: str) -> None:
    global file
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)


def get_size() -> int:
    return os.lseek(file, 0, os.SEEK_END)


cache: dict[int, bytes] = {}
_BLOCK = 512


def pread(buf: memoryview, offset: int) -> None:
    os.preadv(file, [buf], offset)
    for at in range(0, len(buf), _BLOCK):
        if (held := cache.get(offset + at)) is not None:
            buf[at : at + _BLOCK] = held


def pwrite(buf: memoryview, offset: int) -> None:
    for at in range(0, len(buf), _BLOCK):
        cache[offset + at] = bytes(buf[at : at + _BLOCK])


def flush() -> None:
    pass
