"""Waiting on the asyncio loop until a socket is readable, for sockets that asyncio's streams do not support."""

import asyncio
import socket


async def readable(sock: socket.socket | int) -> None:
    """Return when `sock` is readable; the loop must have no other reader of it."""
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
