"""The simplest Python backend, a function for each request, in memory of its own: for measuring only.

Its data is lost when its process ends, which no backend for real use may do (docs/BACKENDS.md).
"""

disk = memoryview(b"")


def open(size: int) -> None:
    """`size` is bytes."""
    global disk
    disk = memoryview(bytearray(b"\xa5") * size)


def get_size() -> int:
    """Bytes."""
    return len(disk)


def pread(buf: memoryview, offset: int) -> int:
    """Copy out."""
    buf[:] = disk[offset : offset + len(buf)]
    return len(buf)


def pwrite(buf: memoryview, offset: int) -> int:
    """Copy in."""
    disk[offset : offset + len(buf)] = buf
    return len(buf)
