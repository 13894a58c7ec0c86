"""The page for each scrape, made of a snapshot of the daemon.

Owns how often the daemon is asked: scrapes that come while it is being asked, or less than `FRESH_S` later, share one
snapshot and the texts made of it.  So a flood of scrapes costs the daemon no more than one scrape a second.  Runs on
the exporter's asyncio loop.
"""

import asyncio
import gzip
import logging
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from ublkpool.daemon.metrics.collector import render
from ublkpool.daemon.metrics.source import Snapshot
from ublkpool.daemon.processes.background import Background

FRESH_S = 1.0
TEXTS_MAX = 4
"""Texts of one snapshot that are kept; a scraper with other headers gets one of its own."""
_COMPRESSION = 1
_log = logging.getLogger("ublkpool.metrics")


class Page(NamedTuple):
    """The answer to a scrape."""

    content_type: str
    body: bytes
    is_compressed: bool


class Pages:
    """Takes snapshots, and keeps the texts of the latest."""

    def __init__(
        self, take: Callable[[], Awaitable[Snapshot]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` returns seconds."""
        self._take = take
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._taken_s = 0.0
        self._taking: asyncio.Task[Snapshot] | None = None
        self._tasks = Background("metrics")
        self._texts: dict[tuple[str, bool], Page] = {}
        self._trouble = ""

    async def page(self, accept: str, gzipped: bool) -> Page:
        """The page for a scraper with this Accept header, compressed if it is to be."""
        snapshot = await self._current()
        page = self._texts.get((accept, gzipped))
        if page is None:
            content_type, body = render(snapshot, accept)
            page = Page(content_type, gzip.compress(body, _COMPRESSION) if gzipped else body, gzipped)
            # While this scrape awaited its snapshot another may have taken a newer one.
            if snapshot is self._snapshot and len(self._texts) < TEXTS_MAX:
                self._texts[accept, gzipped] = page
        return page

    async def _current(self) -> Snapshot:
        if self._snapshot is not None and self._clock() - self._taken_s < FRESH_S:
            return self._snapshot
        if self._taking is None:
            self._taking = self._tasks.spawn_awaited(self._take_one())
        # Another scrape may wait for it after this one was given up.
        return await asyncio.shield(self._taking)

    async def _take_one(self) -> Snapshot:
        try:
            self._snapshot = await self._take()
        finally:
            self._taking = None
        self._taken_s = self._clock()
        self._texts.clear()
        self._tell(self._snapshot)
        return self._snapshot

    def _tell(self, snapshot: Snapshot) -> None:
        """Log once that the daemon is down, and once that it is back."""
        if snapshot.trouble and snapshot.trouble != self._trouble:
            _log.warning("the daemon does not answer: %s", snapshot.trouble)
        elif self._trouble and not snapshot.trouble:
            _log.info("the daemon answers again")
        self._trouble = snapshot.trouble
