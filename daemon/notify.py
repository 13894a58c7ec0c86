"""Tells systemd that the service is ready or stopping (sd_notify(3)); does nothing where nobody asked."""

import os
import socket


def ready(status: str = "") -> None:
    """The service answers."""
    _send("READY=1", status)


def stopping() -> None:
    """The service is on its way out."""
    _send("STOPPING=1")


def _send(state: str, status: str = "") -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    message = f"{state}\nSTATUS={status}" if status else state
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(message.encode(), address)
