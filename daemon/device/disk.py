"""The disk as the first backend defined it, and whether another backend can serve it.

Pure.  Owns that every later backend keeps what the kernel was told: size, block size, whether a cache is flushed.
"""

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.daemon.settings.config import DeviceConfig

_GRANULARITY_BYTES = 4096
_AT_ONCE_BYTES_MAX = 1 << 30


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel was told; sizes are bytes."""

    size_bytes: int
    block_bytes: int
    volatile_cache: bool
    read_only: bool
    resized_bytes: int = 0
    """The size that it was given while it was live; 0: it has the size that it was made with."""

    def grown(self, size_bytes: int) -> "Disk":
        """The disk with this size, given while it was live; itself if it is as large already."""
        if size_bytes <= self.size_bytes:
            return self
        return msgspec.structs.replace(self, size_bytes=size_bytes, resized_bytes=size_bytes)


def wanted_bytes(config: DeviceConfig, resized_bytes: int) -> int:
    """The size to make the disk with: the config's, or the one on record if a resize gave it more; 0: the backend's."""
    return max(config.size_bytes or 0, resized_bytes)


def alone(device: str) -> wire.Attach:
    """The attach message of a disk whose workers answer requests themselves."""
    return wire.Attach(
        v=wire.PROTOCOL_VERSION,
        device=device,
        kind="worker",
        discard_granularity_bytes=_GRANULARITY_BYTES,
        discard_max_bytes=_AT_ONCE_BYTES_MAX,
        write_zeroes_max_bytes=_AT_ONCE_BYTES_MAX,
        identity=wire.Identity(
            value="worker", store="nothing: its workers answer, and store no data", ends_with_device=True
        ),
    )


def disk_of(config: DeviceConfig, attach: wire.Attach, resized_bytes: int = 0) -> Disk:
    """The disk that this config and this backend define; `resized_bytes`: what a resize gave it, on record."""
    return Disk(
        size_bytes=wanted_bytes(config, resized_bytes) or attach.size_bytes,
        resized_bytes=resized_bytes,
        block_bytes=attach.logical_block_bytes,
        volatile_cache=attach.volatile_cache,
        read_only=config.read_only or attach.read_only,
    )


def check_fits(config: DeviceConfig, disk: Disk | None, attach: wire.Attach, resized_bytes: int = 0) -> None:
    """Raise `AttachRefused` with the reason if this backend cannot serve the device."""
    _check_placement(config, attach)
    wanted = wanted_bytes(config, resized_bytes) or attach.size_bytes
    _check_size(config.name, disk.size_bytes if disk else wanted, attach)
    if disk is not None:
        _check_successor(config.name, disk, attach)


def _check_placement(config: DeviceConfig, attach: wire.Attach) -> None:
    name, placement = config.name, config.placement
    if attach.placement not in (placement, "any"):
        raise AttachRefused(
            f"device {name} has placement {placement}, this backend serves {attach.placement}"
        )
    if placement == "backend" and not attach.segment_bytes:
        raise AttachRefused(f"device {name} has placement backend, and this backend brings no segment")
    if attach.read_buffers == "own" and not config.need_get_data:
        raise AttachRefused(f"device {name}: read_buffers own needs need_get_data")


def _check_size(name: str, size_bytes: int, attach: wire.Attach) -> None:
    if not size_bytes:
        raise AttachRefused(f"device {name} and this backend have no size: give one of them size=N")
    if attach.size_bytes and attach.size_bytes < size_bytes:
        raise AttachRefused(f"device {name} has {size_bytes} bytes, this backend only {attach.size_bytes}")
    if size_bytes % attach.logical_block_bytes:
        raise AttachRefused(
            f"device {name} has {size_bytes} bytes, no multiple of {attach.logical_block_bytes}"
        )


def _check_successor(name: str, disk: Disk, attach: wire.Attach) -> None:
    if attach.read_only and not disk.read_only:
        raise AttachRefused(f"device {name} is writable, this backend is not")
    if attach.volatile_cache and not disk.volatile_cache:
        raise AttachRefused(
            f"device {name} was started without a cache: this backend's would never be flushed"
        )
    if attach.logical_block_bytes > disk.block_bytes:
        raise AttachRefused(
            f"device {name} has blocks of {disk.block_bytes} bytes, this backend needs {attach.logical_block_bytes}"
        )
