"""Defect: the data lives in this process, and nothing says so."""

disk: dict[int, bytes] = {}
_BLOCK = 512


def get_size() -> int:
    return 8 << 20


def pread(buf: memoryview, offset: int) -> None:
    for at in range(0, len(buf), _BLOCK):
        buf[at : at + _BLOCK] = disk.get(offset + at, bytes(_BLOCK))


def pwrite(buf: memoryview, offset: int) -> None:
    for at in range(0, len(buf), _BLOCK):
        disk[offset + at] = bytes(buf[at : at + _BLOCK])
