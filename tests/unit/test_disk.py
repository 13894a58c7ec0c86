"""The backends that can serve a device: the first defines the disk, and later ones must keep its promises."""

import msgspec
import pytest

from ublkpool.bufpool.errors import AttachRefused
from ublkpool.bufpool.wire import Attach
from ublkpool.daemon.device.disk import check_fits, disk_of
from ublkpool.daemon.settings.config import DeviceConfig

MIB = 1 << 20
POOL = DeviceConfig(name="vol0", size_bytes=MIB)
PLACED = DeviceConfig(name="vol0", size_bytes=MIB, placement="backend")
PLAIN = Attach(v=1, device="vol0", kind="x")


def backend(**fields: object) -> Attach:
    return msgspec.structs.replace(PLAIN, **fields)


def test_the_device_decides_the_size_and_the_backend_if_it_does_not() -> None:
    assert disk_of(POOL, backend(size_bytes=2 * MIB)).size_bytes == MIB
    assert disk_of(DeviceConfig(name="vol0"), backend(size_bytes=2 * MIB)).size_bytes == 2 * MIB


@pytest.mark.parametrize(
    ("config", "attach", "reason"),
    [
        (PLACED, backend(), "placement backend, this backend serves pool"),
        (PLACED, backend(placement="any"), "brings no segment"),
        (
            DeviceConfig(name="vol0", size_bytes=MIB, need_get_data=False),
            backend(read_buffers="own", segment_bytes=MIB),
            "needs need_get_data",
        ),
        (DeviceConfig(name="vol0"), backend(), "have no size"),
        (POOL, backend(size_bytes=4096), "this backend only 4096"),
        (
            DeviceConfig(name="vol0", size_bytes=MIB + 512),
            backend(logical_block_bytes=4096),
            "no multiple of 4096",
        ),
    ],
)
def test_a_backend_that_cannot_serve_the_device_is_refused(
    config: DeviceConfig, attach: Attach, reason: str
) -> None:
    with pytest.raises(AttachRefused, match=reason):
        check_fits(config, None, attach)


@pytest.mark.parametrize(
    ("attach", "reason"),
    [
        (backend(read_only=True), "is writable"),
        (backend(volatile_cache=True), "would never be flushed"),
        (backend(logical_block_bytes=4096), "blocks of 512 bytes"),
        (backend(size_bytes=4096), "only 4096"),
    ],
)
def test_a_successor_must_keep_what_the_kernel_was_promised(attach: Attach, reason: str) -> None:
    disk = disk_of(POOL, PLAIN)
    check_fits(POOL, disk, PLAIN)
    with pytest.raises(AttachRefused, match=reason):
        check_fits(POOL, disk, attach)


def test_a_successor_that_promises_more_is_taken() -> None:
    cached = disk_of(POOL, backend(volatile_cache=True, logical_block_bytes=4096))
    check_fits(POOL, cached, PLAIN)


def test_a_successor_that_prefers_another_length_is_taken() -> None:
    disk = disk_of(POOL, backend(optimal_io_bytes=MIB))
    for length in (0, 4096, 4 * MIB):
        check_fits(POOL, disk, backend(optimal_io_bytes=length))
