"""A backend without a class: a file, in functions.

    ublkpool backend examples/file_functions.py --device demo path=/srv/disk.img

A write is answered when `pwrite` returns: then it is in the page cache, where it survives this process.  `open_alone`
sees to it that no other server, mount or volume manager writes to the file or block device meanwhile.
"""

import os
from pathlib import Path

from ublkpool.bufpool.claim import open_alone

file = -1


def open(path: str) -> None:
    global file
    file = open_alone(Path(path), os.O_RDWR | os.O_CLOEXEC)


def get_size() -> int:
    return os.lseek(file, 0, os.SEEK_END)


def pread(buf: memoryview, offset: int) -> int:
    return os.preadv(file, [buf], offset)


def pwrite(buf: memoryview, offset: int) -> int:
    return os.pwrite(file, buf, offset)


def flush() -> None:
    os.fdatasync(file)


def close() -> None:
    os.close(file)
