"""The disk that a config and a backend make: ublk parameters, and the feature flags to ask the driver for.  Pure."""

from ublkpool.bufpool import wire
from ublkpool.daemon.errors import without_name
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk import abi
from ublkpool.ublk.abi import Attribute, Feature, Parameters
from ublkpool.ublk.errors import UnsupportedError

_RECOVERY_FLAGS = {
    "none": Feature(0),
    "abort": Feature.USER_RECOVERY,
    "reissue": Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE,
    "fail": Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
}


def parameters(config: DeviceConfig, size_bytes: int, attach: wire.Attach) -> Parameters:
    """The parameters of a disk of `size_bytes`, for SET_PARAMS."""
    attributes = Attribute(0)
    if config.read_only or attach.read_only:
        attributes |= Attribute.READ_ONLY
    if attach.rotational:
        attributes |= Attribute.ROTATIONAL
    if attach.volatile_cache:
        # A backend that caches must honour FUA; without the attribute the block layer would send a flush instead.
        attributes |= Attribute.VOLATILE_CACHE | Attribute.FUA
    return Parameters(
        # What O_DIRECT on the store demands of memory, which with zero copy is the client's.
        memory_alignment_bytes=attach.logical_block_bytes if config.zero_copy else 0,
        size_bytes=size_bytes,
        max_io_bytes=config.max_io_bytes,
        logical_block_bytes=attach.logical_block_bytes,
        physical_block_bytes=attach.physical_block_bytes,
        optimal_io_bytes=attach.optimal_io_bytes,
        attributes=attributes,
        discard_granularity_bytes=attach.discard_granularity_bytes,
        discard_max_bytes=attach.discard_max_bytes,
        write_zeroes_max_bytes=attach.write_zeroes_max_bytes,
    )


def wanted_flags(config: DeviceConfig, offered: int, is_privileged: bool = True) -> Feature:
    """The flags for ADD_DEV.  Raises `UnsupportedError` naming the setting that this kernel does not offer."""
    flags = Feature.CMD_IOCTL_ENCODE | _RECOVERY_FLAGS[config.recovery]
    if not is_privileged:
        flags |= Feature.UNPRIVILEGED_DEV
    if config.asks_for_data:
        flags |= Feature.NEED_GET_DATA
    if config.zero_copy:
        flags |= _zero_copy_flags(config.name, offered, is_privileged)
    if config.recovery != "none":
        # Optional: an upgrade works without it.
        flags |= Feature.QUIESCE & Feature(offered)
    if config.client_buffers_bytes:
        # Optional: without it clients' requests are copied, as all others are.
        flags |= Feature.SHMEM_ZC & Feature(offered)
    if not config.partitions:
        flags |= Feature.NO_AUTO_PART_SCAN
    missing = abi.feature_names(flags & ~offered)
    if missing:
        raise UnsupportedError(
            f"{config.name}: this kernel's ublk driver does not offer {', '.join(missing)}: "
            f"choose another recovery, need_get_data or partitions, or a newer kernel (see ublkpool features)"
        )
    return flags


def refusal_of(config: DeviceConfig, offered: int, is_privileged: bool) -> str:
    """Why this kernel cannot have such a device, without the device's name; empty if it can."""
    try:
        wanted_flags(config, offered, is_privileged)
    except UnsupportedError as error:
        return without_name(config.name, str(error))
    return ""


def _zero_copy_flags(name: str, offered: int, is_privileged: bool) -> Feature:
    """Raises `UnsupportedError` where the driver refuses zero copy."""
    if not is_privileged:
        raise UnsupportedError(
            f"{name}: the driver gives zero_copy only to a daemon with CAP_SYS_ADMIN, not to a user's own devices: "
            "leave zero_copy out, and the kernel copies once"
        )
    flags = Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG
    missing = abi.feature_names(flags & ~offered)
    if missing:
        raise UnsupportedError(
            f"{name}: this kernel's ublk driver does not offer {', '.join(missing)}, which zero_copy needs: "
            "leave zero_copy out, and the kernel copies once, or boot Linux 6.16 or newer"
        )
    return flags
