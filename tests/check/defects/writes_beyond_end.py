"""Defect: a write at the end of the store goes on beyond it."""

import os

file = -1


def open(path: str) -> None:
    global file
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)


def get_size() -> int:
    return os.lseek(file, 0, os.SEEK_END)


def pread(buf: memoryview, offset: int) -> int:
    return os.preadv(file, [buf], offset)


def pwrite(buf: memoryview, offset: int) -> int:
    return min(
        len(buf), os.pwrite(file, bytes(buf) + bytes(512 if offset + len(buf) == get_size() else 0), offset)
    )
