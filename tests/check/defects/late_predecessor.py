"""Defect: child processes store the writes; one that outlives the backend does so after the successor's newer write."""

import os
import time
from collections.abc import Callable

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
    parent = os.getppid()
    time.sleep(0.3 * is_slow)
    if os.getppid() != parent:
        wait_for(lambda held: held == data[:512], offset)
        wait_for(lambda held: held != data[:512], offset)
    os.pwrite(file, data, offset)


def wait_for(is_there: Callable[[bytes], bool], offset: int) -> None:
    give_up_s = time.monotonic() + 10
    while not is_there(os.pread(file, 512, offset)) and time.monotonic() < give_up_s:
        time.sleep(0.001)


def pwrite(buf: memoryview, offset: int) -> None:
    global count
    count += 1
    child = os.fork()
    if not child:
        store(bytes(buf), offset, is_slow=count % 10 == 0)
        os._exit(0)
    os.waitpid(child, 0)
