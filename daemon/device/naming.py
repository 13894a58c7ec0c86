"""The name of a disk that an earlier daemon left: when udev is told of it.

Owns that udev looks at no disk whose requests wait: it reads the disk, and would hang in D state, as a user of the disk
that keeps it from being deleted.  Runs on the supervisor's asyncio loop.
"""

from ublkpool.daemon.device.parts import DeviceParts


async def name_when_served(parts: DeviceParts) -> None:
    """Have udev link the disk once a backend answers its requests; return without that if the device ends first."""
    await parts.life.until(lambda: _is_over(parts) or _is_served(parts))
    if not _is_over(parts) and parts.resources.kernel is not None:
        await parts.resources.kernel.publish_name()


def _is_over(parts: DeviceParts) -> bool:
    return parts.life.is_stopping or parts.life.state == "failed"


def _is_served(parts: DeviceParts) -> bool:
    """Whether requests are answered.  `Lifecycle.is_served` is no answer: it stays while a backend is replaced."""
    if parts.life.state != "live" or parts.drain:
        return False
    team = parts.resources.team
    has_greeted = parts.backend.session is not None and team is not None and not team.unlinked()
    return has_greeted or not parts.config.has_backend_process
