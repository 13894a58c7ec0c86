"""A backend without a class: a file, in functions.

    ublkpool backend examples/file_functions.py --device demo path=/srv/disk.img

A write is answered when `pwrite` returns: then it is in the page cache, where it survives this process.
"""

import os

file = -1


def open(path: str) -> None:
    global file
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)


def get_size() -> int:
    return os.fstat(file).st_size // 4096 * 4096


def pread(buf: memoryview, offset: int) -> int:
    return os.preadv(file, [buf], offset)


def pwrite(buf: memoryview, offset: int) -> int:
    return os.pwrite(file, buf, offset)


def flush() -> None:
    os.fdatasync(file)


def close() -> None:
    os.close(file)
