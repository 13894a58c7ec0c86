"""Defect: one write of many lands a block further on."""

import os

file = -1


def open(path: str) -> None:
    global file
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)


def get_size() -> int:
    return os.lseek(file, 0, os.SEEK_END)


count = 0


def pread(buf: memoryview, offset: int) -> int:
    return os.preadv(file, [buf], offset)


def pwrite(buf: memoryview, offset: int) -> int:
    global count
    count += 1
    shift = 512 if count % 20 == 0 and offset + len(buf) < get_size() else 0
    return os.pwrite(file, buf, offset + shift)
