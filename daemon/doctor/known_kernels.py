"""Kernels with a known defect of the ublk driver, each with the sources of what is said.  Pure.

A row names only kernels of which a source says so: a kernel that is in no row may have the defect as well.
"""

from collections.abc import Callable
from typing import NamedTuple

from ublkpool.daemon.doctor.finding import Finding, Level
from ublkpool.daemon.doctor.release import Release
from ublkpool.ublk.abi import Feature

CHECK = "known-kernels"
_CLOUDS = ("azure", "aws")
_CLOUD_BUILDS = range(1015, 1019)
"""6.17.0-1015-azure, -1017-aws and -1018-azure are reported."""
_ADD_DEV = "the first ADD_DEV dereferences a null pointer in ublk_init_queues and never returns, or the machine panics"
_ADD_DEV_SOURCES = (
    "https://github.com/actions/runner-images/issues/14175",
    "https://github.com/kvcache-ai/AgentENV/issues/20",
    "https://github.com/longhorn/longhorn/issues/13509",
)


class Problem(NamedTuple):
    """A defect; `cured_by`: a feature of the driver whose presence shows that it is not there."""

    kernels: str
    has: Callable[[Release], bool]
    level: Level
    says: str
    way_out: str
    sources: tuple[str, ...]
    cured_by: Feature = Feature(0)


def _is_cloud(kernel: Release) -> bool:
    return kernel.text.startswith("6.17.0-") and kernel.flavour in _CLOUDS


PROBLEMS = (
    Problem(
        "6.18.4 and 6.18.5",
        lambda kernel: (6, 18, 4) <= kernel.version < (6, 18, 6),
        "fail",
        _ADD_DEV,
        "boot Linux 6.18.6 or newer, and start no device before",
        (*_ADD_DEV_SOURCES, "https://github.com/zabbly/linux/issues/52"),
    ),
    Problem(
        "Ubuntu's 6.17.0-1015 to -1018 for azure and aws",
        lambda kernel: _is_cloud(kernel) and kernel.build in _CLOUD_BUILDS,
        "fail",
        _ADD_DEV,
        "boot another kernel (6.8, 6.14 and 7.0 of Ubuntu do not have this), and start no device before",
        _ADD_DEV_SOURCES,
    ),
    Problem(
        "other builds of Ubuntu's 6.17.0 for azure and aws",
        lambda kernel: _is_cloud(kernel) and kernel.build not in _CLOUD_BUILDS,
        "warn",
        f"other builds of this kernel have a defect, and no source says whether this one has it: {_ADD_DEV}",
        "boot another kernel, or try one device where a panic does no harm",
        (*_ADD_DEV_SOURCES, "https://github.com/ubicloud/ubiblk/pull/480"),
    ),
    Problem(
        "6.18.40, 7.0.14 and Ubuntu's 7.0.0-28",
        lambda kernel: (
            kernel.version in ((6, 18, 40), (7, 0, 14)) or kernel.text.startswith("7.0.0-28-generic")
        ),
        "warn",
        "another ublk server that made and deleted devices again and again saw a control command that never "
        "returned, and after it none of any program did",
        "boot another kernel; until then make and delete few devices.  A command that hangs is named after 60 s, "
        "and only a reboot ends it",
        ("https://github.com/e2b-dev/ublk-churn-repro",),
    ),
    Problem(
        "before 6.16",
        lambda kernel: kernel.version < (6, 16, 0),
        "warn",
        "this driver notices the death of a worker that holds all of its tags only by a request's timer, after about "
        "30 s, and does not tell who has a disk open",
        "nothing has to be done: ublkpool watches its workers itself and searches /proc and /sys for openers; "
        "from Linux 6.16 on the driver notices at once, from 7.0 on it counts openers",
        ("docs/LANDMINES.md",),
        cured_by=Feature.QUIESCE,
    ),
    Problem(
        "7.0 to 7.2.6, 7.3-rc1 and 7.3-rc2",
        lambda kernel: (
            (7, 0, 0) <= kernel.version < (7, 2, 7)
            or (kernel.version == (7, 3, 0) and 0 < kernel.candidate < 3)
        ),
        "ok",
        "QUIESCE_DEV fails requests of a device that has BATCH_IO; devices of ublkpool do not have it",
        "",
        ("docs/LANDMINES.md",),
    ),
)


def known_kernel_findings(kernel: Release | None, offered: int | None) -> list[Finding]:
    """What is known of this kernel; `offered`: the driver's features, None if they are not known."""
    found = [
        Finding(CHECK, each.level, f"{kernel.text} ({each.kernels}): {each.says}", each.way_out, each.sources)
        for each in PROBLEMS
        if kernel is not None and each.has(kernel) and not each.cured_by & Feature(offered or 0)
    ]
    return found or [Finding(CHECK, "ok", "no defect of this kernel's ublk driver is known here")]
