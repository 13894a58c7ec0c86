"""The memory disk that nbdkit's Python plugin serves: the same few lines as ours, for its API."""

API_VERSION = 2

disk = bytearray()


def config(key: str, value: str) -> None:
    """`size=BYTES`, the one parameter."""
    global disk
    if key != "size":
        raise ValueError(f"unknown parameter {key}")
    disk = bytearray(b"\xa5") * int(value)


def open(readonly: bool) -> int:
    """One handle serves every connection."""
    return 1


def can_multi_conn(handle: int) -> bool:
    """Both connections see the same bytes."""
    return True


def get_size(handle: int) -> int:
    """Bytes."""
    return len(disk)


def pread(handle: int, buf: memoryview, offset: int, flags: int) -> None:
    """Copy out."""
    buf[:] = disk[offset : offset + len(buf)]


def pwrite(handle: int, buf: memoryview, offset: int, flags: int) -> None:
    """Copy in."""
    disk[offset : offset + len(buf)] = buf
