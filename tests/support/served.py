"""A whole daemon without a driver, in this process, and a client of its admin socket on the same loop."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ublkpool.daemon import lifetime
from ublkpool.daemon.admin.wire import (
    ListRequest,
    Request,
    StopRequest,
    admin_socket,
    decode_reply,
    encode_line,
)
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.settings.config import ServeConfig

DEADLINE_S = 60


class Client:
    """Asks the daemon over its admin socket, without a thread: the daemon forks in this process."""

    def __init__(self, run_dir: Path) -> None:
        self._path = admin_socket(run_dir)

    async def ask(self, request: Request) -> Any:
        """The result.  Raises `DaemonError` with the daemon's reason, `OSError` if it does not answer."""
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write(encode_line(request))
            while (reply := decode_reply(await reader.readline())).ok is None:
                pass
        finally:
            writer.close()
        if not reply.ok:
            raise DaemonError(reply.error)
        return msgspec.json.decode(reply.result)

    async def states(self) -> dict[str, str]:
        return {each["name"]: each["state"] for each in await self.ask(ListRequest())}

    async def answers(self) -> bool:
        with suppress(OSError):
            await self.states()
            return True
        return False


def serving(config: ServeConfig, test: Callable[[Client], Awaitable[None]]) -> None:
    """Run the daemon, and the test beside it once the daemon answers; both must end."""

    async def run() -> None:
        daemon = asyncio.ensure_future(lifetime._serve(config, lifetime.Machine(None, -1)))
        client = Client(config.run_dir)
        async with asyncio.timeout(DEADLINE_S):
            while not await client.answers():
                assert not daemon.done(), daemon.result()
                await asyncio.sleep(0.01)
            await test(client)
        async with asyncio.timeout(DEADLINE_S):
            await client.ask(StopRequest())
            assert await daemon == 0

    asyncio.run(run())
