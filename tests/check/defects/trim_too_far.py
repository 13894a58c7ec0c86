"""Defect: a trim takes the block behind its range as well."""

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
    return os.pwrite(file, buf, offset)


def trim(offset: int, length: int) -> None:
    os.pwrite(file, bytes(min(length + 512, get_size() - offset)), offset)
