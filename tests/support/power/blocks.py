"""What the power test writes: blocks of which every sector says what it is; and the judgement of what was found."""

import mmap
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

BLOCK_BYTES = 4096
BLOCKS = 1024
SECTOR_BYTES = 512
_HEAD = struct.Struct("<8sQQ")


@contextmanager
def block(device: str, number: int, version: int) -> Iterator[mmap.mmap]:
    """One block, in memory that direct I/O takes."""
    with mmap.mmap(-1, BLOCK_BYTES) as memory:
        memory.write(sector(device, number, version) * (BLOCK_BYTES // SECTOR_BYTES))
        yield memory


def sector(device: str, number: int, version: int) -> bytes:
    """512 bytes that belong to this block of this device, written by this write."""
    return (_HEAD.pack(device.encode(), number, version) * (SECTOR_BYTES // _HEAD.size)).ljust(
        SECTOR_BYTES, b"\xaa"
    )


def parse_promises(lines: Iterable[str]) -> dict[str, dict[int, int]]:
    """Device -> block -> the newest version that was promised."""
    promised: dict[str, dict[int, int]] = {}
    for line in lines:
        words = line.split()
        if len(words) > 2 and words[0] == "P":
            for pair in words[2:]:
                number, version = map(int, pair.split(":"))
                promised.setdefault(words[1], {})[number] = version
    return promised


def broken_promises(device: str, promised: dict[int, int], found: bytes) -> list[str]:
    """Each promised block of which a sector is older than promised, or is no sector of it."""
    broken = []
    for number, version in sorted(promised.items()):
        content = found[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")
        versions = [
            _version(device, number, content[start : start + SECTOR_BYTES])
            for start in range(0, BLOCK_BYTES, SECTOR_BYTES)
        ]
        # A newer write may have been under way: of it any part may be there.
        if min(versions) < version:
            broken.append(f"{device} block {number}: version {version} promised, found {versions}")
    return broken


def _version(device: str, number: int, content: bytes) -> int:
    """-1 for what is none of our sectors."""
    _, _, version = _HEAD.unpack_from(content)
    return int(version) if version < 1 << 40 and content == sector(device, number, version) else -1
