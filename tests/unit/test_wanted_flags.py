"""Which of the driver's features a device asks for, and what is said where one is missing."""

import pytest

from ublkpool.daemon.kernel.disk_parameters import wanted_flags
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk.abi import Feature
from ublkpool.ublk.errors import UnsupportedError

EVERYTHING = (1 << 64) - 1
LINUX_6_12 = 0x1FE


def test_the_partition_scan_is_left_out_only_if_that_was_asked() -> None:
    assert not wanted_flags(DeviceConfig(name="a"), EVERYTHING) & Feature.NO_AUTO_PART_SCAN
    assert wanted_flags(DeviceConfig(name="a", partitions=False), EVERYTHING) & Feature.NO_AUTO_PART_SCAN


def test_an_older_kernel_is_named_with_what_it_lacks_and_the_way_out() -> None:
    wanted_flags(DeviceConfig(name="a"), LINUX_6_12)
    with pytest.raises(UnsupportedError, match=r"a: .*does not offer NO_AUTO_PART_SCAN: .*partitions"):
        wanted_flags(DeviceConfig(name="a", partitions=False), LINUX_6_12)
