"""A partition table on a device: the kernel scans it at the start, or only on request."""

import fcntl
import os
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, eventually
from support.vm.files import partition_table
from ublkpool.daemon.errors import DaemonError
from ublkpool.ublk.abi import Feature
from ublkpool.ublk.control import get_features

MIB = 1 << 20
_BLKRRPART = 0x125F


def _partition(path: str) -> Path:
    name = Path(path).name
    return Path("/sys/block") / name / f"{name}p1"


def _reread(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _BLKRRPART)
    finally:
        os.close(fd)


def test_a_partition_table_is_read_at_the_start_or_only_when_asked(daemon: Daemon) -> None:
    image = daemon.path("table.img")
    image.write_bytes(partition_table(2048, 2048).ljust(4 * MIB, b"\0"))
    with daemon.device("scanned", "file", options={"path": image}) as status:
        assert status.path is not None
        found = _partition(status.path)
        eventually(found.exists, "the kernel has read the table")
    if not get_features() & Feature.NO_AUTO_PART_SCAN:
        with pytest.raises(DaemonError, match="does not offer NO_AUTO_PART_SCAN"):
            daemon.add("left", "file", {"path": image}, partitions=False)
        return
    with daemon.device("left", "file", options={"path": image}, partitions=False) as status:
        assert status.path is not None
        assert not _partition(status.path).exists()
        _reread(status.path)
        assert _partition(status.path).exists()
