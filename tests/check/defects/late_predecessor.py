"""Defect: child processes store the writes; one that outlives the backend does so after the successor's newer write."""

import os
import time

file = -1
count = 0


def open(path: str) -> None:
    global file
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)


def get_size() -> int:
    return os.lseek(file, 0, os.SEEK_END)


def pread(buf: memoryview, offset: int) -> int:
    return os.preadv(file, [buf], offset)


def store(data: bytes, offset: int, is_slow: bool) -> None:
    parent, before = os.getppid(), os.pread(file, 512, offset)
    time.sleep(0.3 * is_slow)
    give_up_s = time.monotonic() + 10
    # The successor executes this write again, and then a newer one.
    while os.getppid() != parent and os.pread(file, 512, offset) in (before, data[:512]):
        if time.monotonic() > give_up_s:
            break
        time.sleep(0.001)
    os.pwrite(file, data, offset)


def pwrite(buf: memoryview, offset: int) -> None:
    global count
    count += 1
    child = os.fork()
    if not child:
        store(bytes(buf), offset, is_slow=count % 5 == 0)
        os._exit(0)
    os.waitpid(child, 0)
