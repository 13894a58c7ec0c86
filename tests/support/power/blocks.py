"""The blocks that the power test writes, with their identity in each sector, and the check of the disks found later."""

import mmap
import random
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

BLOCK_BYTES = 4096
BLOCKS = 1024
SECTOR_BYTES = 512
_HEAD = struct.Struct("<8sQQ")


@contextmanager
def block(device: str, number: int, version: int) -> Iterator[mmap.mmap]:
    """One block, in memory aligned for direct I/O."""
    with mmap.mmap(-1, BLOCK_BYTES) as memory:
        memory.write(sector(device, number, version) * (BLOCK_BYTES // SECTOR_BYTES))
        yield memory


def sector(device: str, number: int, version: int) -> bytes:
    """A sector of 512 bytes that names its device, block and version."""
    return (_HEAD.pack(device.encode(), number, version) * (SECTOR_BYTES // _HEAD.size)).ljust(
        SECTOR_BYTES, b"\xaa"
    )


def base_content() -> bytes:
    """What the base of the device `cow` holds: no sector of any version."""
    return random.Random(1).randbytes(BLOCKS * BLOCK_BYTES)


def parse_promises(lines: Iterable[str]) -> dict[str, dict[int, int]]:
    """The newest promised version, by device and block."""
    promised: dict[str, dict[int, int]] = {}
    for line in lines:
        words = line.split()
        if len(words) > 2 and words[0] == "P":
            for pair in words[2:]:
                number, version = map(int, pair.split(":"))
                promised.setdefault(words[1], {})[number] = version
    return promised


def broken_promises(device: str, promised: dict[int, int], found: bytes) -> list[str]:
    """The promised blocks with a sector that is older than promised or belongs elsewhere."""
    broken = []
    for number, version in sorted(promised.items()):
        content = found[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")
        versions = [
            _version(device, number, content[start : start + SECTOR_BYTES])
            for start in range(0, BLOCK_BYTES, SECTOR_BYTES)
        ]
        # Any part of a newer write, which may have been in flight, may be there.
        if min(versions) < version:
            broken.append(f"{device} block {number}: version {version} promised, found {versions}")
    return broken


def _version(device: str, number: int, content: bytes) -> int:
    """The version in a sector; -1 if it is not a sector of this block."""
    _, _, version = _HEAD.unpack_from(content)
    return int(version) if version < 1 << 40 and content == sector(device, number, version) else -1
