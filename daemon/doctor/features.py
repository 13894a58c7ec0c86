"""What of ublkpool each feature of the driver is needed for.  Pure."""

import errno
from typing import NamedTuple

import msgspec

from ublkpool.daemon.doctor.finding import Finding, Level
from ublkpool.ublk.abi import Feature, feature_names

CHECK = "features"
_NOT_LOADED = (errno.ENOENT, errno.ENXIO, errno.ENODEV)
_DENIED = (errno.EACCES, errno.EPERM)


class Offered(msgspec.Struct, frozen=True):
    """The driver's answer to GET_FEATURES: its bits, or None with the error and the kernel's errno (0: it hung)."""

    bits: int | None = None
    error: str = ""
    errno: int = 0


class Need(NamedTuple):
    """A feature, the finding's level where the driver lacks it, and the first Linux that has it."""

    feature: Feature
    missing: Level
    since: str
    purpose: str


NEEDS = (
    Need(Feature.CMD_IOCTL_ENCODE, "fail", "6.4", "every command to the driver"),
    Need(
        Feature.NEED_GET_DATA,
        "fail",
        "6.0",
        "need_get_data, the default: one copy, into memory that a backend names",
    ),
    Need(Feature.USER_RECOVERY, "fail", "6.1", "recovery after the death of a worker or the daemon"),
    Need(Feature.USER_RECOVERY_REISSUE, "fail", "6.1", 'recovery = "reissue", the default: no request fails'),
    Need(Feature.USER_RECOVERY_FAIL_IO, "warn", "6.13", 'recovery = "fail"; devices with it are refused'),
    Need(
        Feature.QUIESCE,
        "warn",
        "6.16",
        "an upgrade whose workers end with no request left to answer; else they are replaced as after a death",
    ),
    Need(
        Feature.UPDATE_SIZE,
        "warn",
        "6.16",
        "ublkpool resize; elsewhere a device grows when it is added again",
    ),
    Need(
        Feature.SAFE_STOP_DEV,
        "warn",
        "7.0",
        "del, which then refuses a disk in use in one step with the driver; else only /proc and /sys tell",
    ),
    Need(Feature.NO_AUTO_PART_SCAN, "warn", "7.0", "partitions = false; devices with it are refused"),
    Need(Feature.SUPPORT_ZERO_COPY, "warn", "6.15", "zero_copy; devices with it are refused"),
    Need(Feature.AUTO_BUF_REG, "warn", "6.16", "zero_copy; devices with it are refused"),
    Need(Feature.SHMEM_ZC, "warn", "7.1", "client_buffers without a copy; else the kernel copies once"),
)


def feature_findings(offered: Offered) -> list[Finding]:
    """One finding for each feature that ublkpool uses, or one that says why the driver was not asked."""
    if offered.bits is None:
        return [_unasked(offered)]
    return [_judged(need, offered.bits) for need in NEEDS]


def _judged(need: Need, bits: int) -> Finding:
    (name,) = feature_names(need.feature)
    if bits & need.feature:
        return Finding(CHECK, "ok", f"{name} is there, for {need.purpose}")
    return Finding(
        CHECK, need.missing, f"{name} is missing, for {need.purpose}", f"boot Linux {need.since} or newer"
    )


def _unasked(offered: Offered) -> Finding:
    if offered.errno in _NOT_LOADED:
        return Finding(CHECK, "warn", "the driver was not asked: it is not loaded", "modprobe ublk_drv")
    if offered.errno in _DENIED:
        return Finding(CHECK, "warn", f"the driver was not asked: {offered.error}", "sudo ublkpool doctor")
    way_out = "see dmesg; the kernel log may name what the driver waits for"
    return Finding(CHECK, "fail", f"the driver does not tell its features: {offered.error}", way_out)
