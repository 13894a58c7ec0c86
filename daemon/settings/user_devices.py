"""The settings that the devices of an ordinary user's daemon can have.

The driver recovers no device of an ordinary user, and ends one as soon as a request is 30 s old (ublk_timeout).  So
these devices have no recovery, and their requests fail before that.
"""

from collections.abc import Sequence

import msgspec

from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.config import USER_KEYS, DeviceConfig

ANSWER_S_MAX = 20.0
"""A backend that is late is cut off, and its requests fail, before the kernel's 30 s have passed."""
NOTE = (
    "a device of an ordinary user: it has no recovery, so that a worker's death ends the disk, and requests fail "
    f"after {ANSWER_S_MAX:g} s, since the kernel ends it after 30 s"
)
NO_DRAIN = (
    "the kernel ends an ordinary user's disk whose requests wait for 30 s, so it is not drained: unmount it"
)


def fitted(config: DeviceConfig) -> DeviceConfig:
    """The device as an ordinary user can have it.  Raises `ConfigError` for a recovery that was asked for."""
    if config.recovery not in ("reissue", "none"):
        raise ConfigError(
            [
                f"{config.name}: recovery {config.recovery}: the driver recovers no device of an ordinary user: leave "
                f"recovery out, or serve the device from root's daemon"
            ]
        )
    return msgspec.structs.replace(
        config,
        recovery="none",
        io_timeout_s=min(config.io_timeout_s, ANSWER_S_MAX),
        on_timeout="fail",
        absent_timeout_s=min(config.absent_timeout_s, ANSWER_S_MAX),
        on_absent="fail",
    )


def all_fitted(devices: Sequence[DeviceConfig]) -> tuple[DeviceConfig, ...]:
    """The same of all devices.  Raises `ConfigError` with a line for each that cannot be."""
    found, problems = [], []
    for each in devices:
        try:
            found.append(fitted(each))
        except ConfigError as error:
            problems += error.lines
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def check_fits(config: DeviceConfig) -> None:
    """Raise `ConfigError` if an ordinary user's device that serves cannot be changed to this."""
    allowed = fitted(config)
    for key in ("on_timeout", "on_absent", "io_timeout_s", "absent_timeout_s"):
        if (most := getattr(allowed, key)) != getattr(config, key):
            bound = f"at most {most:g}" if isinstance(most, float) else f"only {most}"
            raise ConfigError([f"{config.name}: {USER_KEYS.get(key, key)}: {bound}: {NOTE}"])
