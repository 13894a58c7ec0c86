"""File systems on a device: a directory tree survives, discards free blocks, flushes reach the backend."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from support.vm.daemon import Daemon, eventually, total
from support.vm.files import (
    check_file_system,
    checksums,
    copy_tree,
    forget_cached,
    make_file_system,
    mounted,
    run,
)
from ublkpool.daemon.status import DeviceStatus

MIB = 1 << 20


class Disk(NamedTuple):
    """A file system and its device; xfs needs at least 300 MB."""

    file_system: str
    placement: str
    queues: int


DISKS = (Disk("ext4", "pool", 2), Disk("xfs", "backend", 4))
# Each kernel has one file system: the driver sees the requests of either.
KERNELS = {"ext4": "6.12", "xfs": "7.3"}
CASES = [
    pytest.param(each, id=each.file_system, marks=pytest.mark.one_kernel(KERNELS[each.file_system]))
    for each in DISKS
]


def _add(daemon: Daemon, disk: Disk) -> DeviceStatus:
    options = {"path": daemon.path("fs.img"), "size": "320M", "placement": disk.placement, "segment": "32M"}
    return daemon.add("fs", "file", options, queues=disk.queues, placement=disk.placement)


def _requests(daemon: Daemon, operation: str) -> int:
    return sum(getattr(queue.requests, operation) for queue in daemon.stats("fs").queues)


def _allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("disk", CASES)
def test_a_real_tree_survives_in_a_file_system_whose_check_finds_nothing(daemon: Daemon, disk: Disk) -> None:
    status = _add(daemon, disk)
    assert status.path is not None
    make_file_system(disk.file_system, status.path)
    with mounted(status.path, daemon.path("mnt")) as root:
        copy_tree(root)
        expected = checksums(root)
        forget_cached()
    with mounted(status.path, daemon.path("mnt")) as root:
        forget_cached()
        assert checksums(root) == expected and len(expected) > 50
        assert _requests(daemon, "flush") > 0
        _trim_frees_blocks(daemon, root)
    check_file_system(disk.file_system, status.path)
    stats = daemon.rest("fs")
    assert total(stats, "own_copy_bytes") == total(stats, "errors") == total(stats, "violations") == 0
    daemon.delete("fs")
    daemon.path("fs.img").unlink()


def _trim_frees_blocks(daemon: Daemon, root: Path) -> None:
    (root / "large").write_bytes(os.urandom(8 * MIB))
    os.sync()
    filled = _allocated_bytes(daemon.path("fs.img"))
    (root / "large").unlink()
    for each in root.iterdir():
        shutil.rmtree(each)
    os.sync()
    trims = _requests(daemon, "discard")
    run("fstrim", root)
    # xfs does not wait for its last discards.
    eventually(lambda: _requests(daemon, "discard") > trims, "fstrim discards")
    eventually(lambda: _allocated_bytes(daemon.path("fs.img")) <= filled - 8 * MIB, "trimmed blocks are free")
