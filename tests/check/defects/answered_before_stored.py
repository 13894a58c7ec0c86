"""Defect: a write is answered before it is in the file."""

import os
import threading
import time
from queue import SimpleQueue

LATE_S = 0.2
"""So long that the next read comes before, on a slow machine as well."""
file = -1
writes: SimpleQueue[tuple[bytes, int]] = SimpleQueue()


def open(path: str) -> None:
    global file
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    threading.Thread(target=store, daemon=True).start()


def store() -> None:
    while True:
        data, offset = writes.get()
        time.sleep(LATE_S)
        os.pwrite(file, data, offset)


def get_size() -> int:
    return os.lseek(file, 0, os.SEEK_END)


def pread(buf: memoryview, offset: int) -> int:
    return os.preadv(file, [buf], offset)


def pwrite(buf: memoryview, offset: int) -> None:
    writes.put((bytes(buf), offset))
