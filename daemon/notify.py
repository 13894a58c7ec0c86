"""Tells systemd that the service is ready or stopping (sd_notify(3)), and in one line which devices are not served.

Without NOTIFY_SOCKET in the environment it does nothing.
"""

import logging
import os
import socket
import time
from collections.abc import Iterable

from ublkpool.daemon.status import State

NAMES_MAX = 8
_SAID: dict[State, str] = {"waiting": "waiting for", "failed": "failed"}
_log = logging.getLogger("ublkpool.supervisor")


def is_heard() -> bool:
    """Whether a service manager listens."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def ready(status: str = "") -> None:
    """The service answers requests."""
    _send("READY=1", status)


def reloading() -> None:
    """The service reads its config again; `ready` ends that."""
    _send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def alive() -> None:
    """For the manager's watchdog: the service's loop turns."""
    _send("WATCHDOG=1")


def status(text: str) -> None:
    """What `systemctl status` shows."""
    _send(f"STATUS={text}")


def describe(devices: Iterable[tuple[str, State]]) -> str:
    """The number of live devices and the names of the others by state, as in "waiting for vol0, vol1"."""
    names: dict[str, list[str]] = {}
    live = 0
    for name, state in devices:
        live += state == "live"
        if state != "live":
            names.setdefault(_SAID.get(state, "recovering"), []).append(name)
    parts = [f"serving {live} device{'' if live == 1 else 's'}"]
    return "; ".join(parts + [f"{what} {_listed(names[what])}" for what in sorted(names, reverse=True)])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_MAX} more" if len(names) > NAMES_MAX else ""
    return ", ".join(names[:NAMES_MAX]) + more


def stopping() -> None:
    """The service has begun to stop."""
    _send("STOPPING=1")


def _send(state: str, status: str = "") -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    message = f"{state}\nSTATUS={status}" if status else state
    try:
        with socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        ) as sender:
            sender.sendto(message.encode(), address)
    except OSError as error:
        # The service goes on without its manager.
        _log.warning("the service manager was not told %s: %s", state.partition("=")[0], error.strerror)
