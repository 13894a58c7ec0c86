"""Runs in the guest that loses its power: devices on the disk /dev/vda, and a writer that prints each promise.

It prints a line `P DEVICE BLOCK:VERSION ...` when a FLUSH or FUA write has been answered; these blocks must be there
after the power failure.  Never ends: the host ends the guest.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

from support.power.blocks import BLOCK_BYTES, BLOCKS, base_content, block
from support.vm.daemon import Daemon

DISK = Path("/run/power")
LIAR = """\
import os

file = -1


def open(path: str) -> None:
    global file
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(file, SIZE)


def get_size() -> int:
    return SIZE


def pread(buf: memoryview, offset: int) -> int:
    return os.preadv(file, [buf], offset)


def pwrite(buf: memoryview, offset: int) -> int:
    return os.pwrite(file, buf, offset)


def flush() -> None:
    pass
"""


class Writer:
    """Writes to one device and prints each promise."""

    def __init__(self, name: str, path: str, seed: str) -> None:
        self._name = name
        self._file = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._random = random.Random(seed)
        self._version = 0

    def write_some(self) -> None:
        """A few writes and a FLUSH, or one write with FUA."""
        if self._random.random() < 0.5:
            self._promise([self._write(os.RWF_DSYNC)])
            return
        written = [self._write(0) for _ in range(self._random.randint(1, 6))]
        os.fdatasync(self._file)
        self._promise(written)

    def _write(self, flags: int) -> str:
        self._version += 1
        number = self._random.randrange(BLOCKS)
        # Direct I/O needs aligned memory, which a mapping is.
        with block(self._name, number, self._version) as memory:
            os.pwritev(self._file, [memory], number * BLOCK_BYTES, flags)
        return f"{number}:{self._version}"

    def _promise(self, written: list[str]) -> None:
        print(f"P {self._name} {' '.join(written)}", flush=True)


def make_durable(path: Path, content: bytes) -> None:
    """A file that a power failure leaves as it is."""
    path.write_bytes(content)
    for each, flags in ((path, os.O_RDONLY), (path.parent, os.O_RDONLY | os.O_DIRECTORY)):
        file = os.open(each, flags | os.O_CLOEXEC)
        os.fsync(file)
        os.close(file)


def main(seed: str) -> None:
    """Set everything up, then write for ever."""
    DISK.mkdir()
    subprocess.run(["mount", "-t", "ext4", "/dev/vda", DISK], check=True)
    liar = DISK / "liar.py"
    liar.write_text(LIAR.replace("SIZE", str(BLOCKS * BLOCK_BYTES)))
    size = str(BLOCKS * BLOCK_BYTES)
    daemon = Daemon()
    daemon.start()
    for name, direct in (("direct", "on"), ("buffered", "off")):
        daemon.add(name, "file", {"path": DISK / name, "size": size, "direct": direct})
    base = DISK / "base"
    make_durable(base, base_content())
    daemon.add("cow", "cow", {"base": base, "overlay": DISK / "cow"})
    daemon.add("liar", str(liar), {"path": DISK / "liar"})
    writers = [Writer(each.name, str(each.path), f"{seed} {each.name}") for each in daemon.client.devices()]
    print("W", flush=True)
    while True:
        for writer in writers:
            writer.write_some()


if __name__ == "__main__":
    main(sys.argv[1])
