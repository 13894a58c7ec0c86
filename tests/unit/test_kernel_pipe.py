"""A pipe is no doorbell: its reader can make a write block that has O_NONBLOCK in an open file of its own."""

import ctypes
import fcntl
import mmap
import os
import select
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakes.loop_rig import eventually

_NUMBERS = {"x86_64": 323, "aarch64": 282}
_API, _REGISTER, _ZEROPAGE, _MISSING = 0xC018AA3F, 0xC020AA00, 0xC020AA04, 1
_UFFD_API = 0xAA


@pytest.fixture
def faults() -> Iterator[int]:
    """A userfaultfd that also stops faults of the kernel."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    file = call(_NUMBERS.get(os.uname().machine, -1), os.O_CLOEXEC)
    if file < 0:
        pytest.skip(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
    fcntl.ioctl(file, _API, struct.pack("=QQQ", _UFFD_API, 0, 0))
    yield file
    os.close(file)


def _is_stuck(thread: threading.Thread) -> bool:
    """Whether it sleeps uninterruptibly."""
    stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "D"


def test_a_reader_whose_memory_is_absent_blocks_writes_to_a_pipe_that_was_opened_anew(faults: int) -> None:
    reading, first = os.pipe()
    os.close(first)
    writing = os.open(f"/proc/self/fd/{reading}", os.O_WRONLY | os.O_NONBLOCK)
    memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(faults, _REGISTER, struct.pack("=QQQQ", address, mmap.PAGESIZE, _MISSING, 0))
    os.write(writing, b"1")
    reader = threading.Thread(target=os.readv, args=(reading, [memory]), daemon=True)
    writer = threading.Thread(target=os.write, args=(writing, b"2"), daemon=True)
    reader.start()
    try:
        assert select.select([faults], [], [], 60)[0], "the reader does not fault"
        writer.start()
        eventually(lambda: _is_stuck(writer), "the write blocks")
    finally:
        fcntl.ioctl(faults, _ZEROPAGE, struct.pack("=QQQq", address, mmap.PAGESIZE, 0, 0))
    for each in (reader, writer):
        each.join(60)
        assert not each.is_alive()
    os.close(reading)
    os.close(writing)
