"""The limits of a device's config, as its control segment has them.  Pure."""

from ublkpool.bufpool.pool.control import Limits
from ublkpool.daemon.settings.config import DeviceConfig


def limits_of(config: DeviceConfig) -> Limits:
    """What the device's queues let through together; all zero if the config sets no limit."""
    if not config.iops_max and not config.bytes_per_s_max:
        return Limits()
    return Limits(config.iops_max, config.bytes_per_s_max, round(config.burst_s * 1e9))
