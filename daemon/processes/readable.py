"""Waiting for a descriptor on the asyncio loop, for sockets that asyncio's own calls do not fit."""

import asyncio
import socket


async def readable(sock: socket.socket | int) -> None:
    """Return when there is something to read; alone on this socket."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
