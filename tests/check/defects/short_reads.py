"""Defect: a read returns fewer bytes than it was asked for."""

import os

file = -1


def open(path: str) -> None:
    global file
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)


def get_size() -> int:
    return os.lseek(file, 0, os.SEEK_END)


def pread(buf: memoryview, offset: int) -> int:
    read = os.preadv(file, [buf], offset)
    return read if read <= 4096 else 4096


def pwrite(buf: memoryview, offset: int) -> int:
    return os.pwrite(file, buf, offset)
