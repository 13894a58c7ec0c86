"""Lending slices of a device's client area to clients of its disk.

Owns the answer to a client and that the record knows a slice's user first; which slice is lent when is `clients.py`'s.
Runs on the supervisor's asyncio loop.
"""

import socket
from collections.abc import Mapping

from ublkpool.bufpool import wire
from ublkpool.daemon.device.clients import ClientContext
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.errors import DaemonError


def begin(parts: DeviceParts) -> None:
    """The device is live for the first time: every slice is free."""
    if (client_context := _client_context(parts)) is not None:
        parts.clients.begin(client_context)


def resume(parts: DeviceParts, held: Mapping[str, int]) -> None:
    """Go on with the slices that an earlier daemon lent; `held` are the descriptors that the holder had."""
    if (client_context := _client_context(parts)) is not None:
        parts.clients.resume(client_context, held)


def _client_context(parts: DeviceParts) -> ClientContext | None:
    area, kernel = parts.resources.area, parts.resources.kernel
    return None if area is None or kernel is None else ClientContext(area, kernel)


def lend(parts: DeviceParts, sock: socket.socket) -> tuple[wire.BufferLeased, int | None]:
    """The answer to a client, and the descriptor of a slice that is the client's while it is connected.

    Raises `DaemonError` if the device has no disk.
    """
    kernel, area, state = parts.resources.kernel, parts.resources.area, parts.life.state
    if kernel is None or state in ("waiting", "failed") or parts.life.is_stopping:
        raise DaemonError(f"{parts.config.name} is {state}: it has no disk to use buffers with")
    number = parts.clients.lend(sock)
    if area is None or number is None:
        return wire.BufferLeased(path=str(kernel.node), size_bytes=0), None
    # The next daemon must know the slice's user before a client has the slice.
    try:
        parts.save()
    except BaseException:
        parts.clients.take_back(sock)
        raise
    return wire.BufferLeased(path=str(kernel.node), size_bytes=area.slice_bytes), area.files[number]
