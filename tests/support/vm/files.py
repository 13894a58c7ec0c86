"""File systems on a device under test: made, mounted, filled with a real tree, checked."""

import hashlib
import os
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REAL_TREE = [Path(sysconfig.get_path("stdlib")) / name for name in ("asyncio", "email", "json", "xml")]
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
MAKE = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
CHECK = {"ext4": ("e2fsck", "-f", "-n"), "xfs": ("xfs_repair", "-n")}
_ENTRY_OFFSET = 446
_LINUX_PARTITION = 0x83


def partition_table(first_sector: int, sectors: int) -> bytes:
    """A boot sector with one partition, in sectors of 512 bytes."""
    entry = struct.pack("<B3sB3sII", 0, bytes(3), _LINUX_PARTITION, bytes(3), first_sector, sectors)
    return (bytes(_ENTRY_OFFSET) + entry).ljust(510, b"\0") + b"\x55\xaa"


def run(*command: str | Path) -> str:
    """Run a tool; returns its output.  Raises `AssertionError` with the output if it fails."""
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        timeout=300,
        check=False,
        text=True,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def load_module(name: str) -> None:
    """Load a module of this kernel; in the guest from the directory in MODPROBE_OPTIONS."""
    guests = Path("/run/guest/modprobe")
    run(guests if guests.exists() else "modprobe", name)


def make_file_system(kind: str, path: str) -> None:
    """Make an empty file system without a discard first, so that it reads only bytes that were written."""
    run(*MAKE[kind], path)


def check_file_system(kind: str, path: str) -> None:
    """Check the file system.  Raises `AssertionError` with the check's output."""
    run(*CHECK[kind], path)


@contextmanager
def mounted(path: str, directory: Path, options: str = "defaults") -> Iterator[Path]:
    """The file system's root, for the length of a block."""
    directory.mkdir(exist_ok=True)
    run("mount", "-o", options, path, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


def copy_tree(into: Path) -> None:
    """Copy a directory tree into a file system."""
    for source in REAL_TREE:
        shutil.copytree(source, into / source.name, ignore=shutil.ignore_patterns("__pycache__"))


def checksums(root: Path) -> dict[str, str]:
    """The content of every file by path."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def forget_cached() -> None:
    """Drop the page cache, so that later reads come from the disk."""
    os.sync()
    DROP_CACHES.write_text("3")
