"""How long the asyncio loop stands still while a scene plays."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

STANDS_MAX_S = 30.0
"""A loop that stands longer was stopped; a busy machine stops it for less.  What would stop it takes twice as long."""
_BEAT_S = 0.02


class Standstill:
    """The longest pause so far between two beats of the loop."""

    longest_s = 0.0


@asynccontextmanager
async def watched_loop() -> AsyncIterator[Standstill]:
    """Watch the loop during the block."""
    seen = Standstill()

    async def beat() -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(_BEAT_S)
            now = time.monotonic()
            seen.longest_s = max(seen.longest_s, now - before)
            before = now

    beating = asyncio.ensure_future(beat())
    await asyncio.sleep(_BEAT_S)
    try:
        yield seen
        await asyncio.sleep(2 * _BEAT_S)
    finally:
        beating.cancel()
