"""What the daemon says of its devices, for the steps of the systemd guest.

Runs in the guest, by the Python in its root, with the installed ublkpool.
"""

from pathlib import Path

from ublkpool.daemon.admin.client import Client
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.status import DeviceStatus

client = Client(Path("/run/ublkpool"))


def device(name: str, daemon: Client = client) -> DeviceStatus | None:
    """A device's status; None while the daemon does not answer or has no device of that name."""
    try:
        return next((each for each in daemon.devices() if each.name == name), None)
    except DaemonError:
        return None


def is_live(name: str, not_pid: int | None = None) -> bool:
    """Whether the device is live, with a backend other than this pid."""
    found = device(name)
    return (
        found is not None
        and found.state == "live"
        and found.backend.attached
        and found.backend.pid != not_pid
    )


def backend_pid(name: str) -> int:
    """The pid of its backend, 0 without a backend."""
    found = device(name)
    return (found.backend.pid or 0) if found else 0
