"""Telling events to clients of the admin socket, also those to come.

Owns what a slow client may cost: it is told from the events that the daemon keeps anyway, and what it has not read yet
is bounded.  A client that reads nothing for `PATIENCE_S` is cut off; it can ask again from the number that it has.
Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from contextlib import suppress

import msgspec

from ublkpool.daemon.admin.wire import EventsRequest, Progress, Told, encode_line
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.processes.beside import beside

FOLLOWERS_MAX = 32
PATIENCE_S = 60.0
END_PATIENCE_S = 1.0
"""At the daemon's end."""
_log = logging.getLogger("ublkpool.admin")


class Followers:
    """The clients that are told events now."""

    def __init__(self, events: Events, patience_s: float = PATIENCE_S) -> None:
        self._events = events
        self._patience_s = patience_s
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_ending = asyncio.Event()

    def end(self) -> None:
        """Have every client that follows answered, since the daemon ends; soon cut those off that do not read."""
        self._is_ending.set()
        asyncio.get_running_loop().call_later(END_PATIENCE_S, self._cut_off_unread)

    def _cut_off_unread(self) -> None:
        for writer in self._writers:
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()

    @property
    def count(self) -> int:
        """The number of clients that are told events now."""
        return len(self._writers)

    async def tell(self, request: EventsRequest, writer: asyncio.StreamWriter) -> None:
        """Tell what the client asks for.  Raises `DaemonError` if it is cut off, or if too many clients follow."""
        if self.count >= FOLLOWERS_MAX:
            raise DaemonError(f"{FOLLOWERS_MAX} clients are told events already: end one of them")
        self._writers.add(writer)
        try:
            await self._tell(request, writer)
        finally:
            self._writers.discard(writer)

    async def _tell(self, request: EventsRequest, writer: asyncio.StreamWriter) -> None:
        names = None if request.names is None else frozenset(request.names)
        at, events = request.after, self._events
        if 0 < at < events.gone_seq:
            text = f"events between {at} and {events.gone_seq} are gone: the daemon keeps a bounded number"
            writer.write(encode_line(Progress(text)))
            at = events.gone_seq
        while True:
            if 0 < at < events.gone_seq:
                raise DaemonError(f"cut off: events after {at} are gone before this client has read them")
            before = at
            lines, at = events.after(at, names, request.since)
            # Before the first await: an event that comes meanwhile is not missed.
            coming = events.coming
            for line in lines:
                writer.write(encode_line(Told(msgspec.Raw(line.rstrip()))))
            await self._drain(writer)
            if at != before:
                # A client that reads fast makes `drain` return at once each time: others run meanwhile.
                await asyncio.sleep(0)
                continue
            if not request.follow or self._is_ending.is_set():
                return
            async with beside(coming.wait()) as news, beside(self._is_ending.wait()) as end:
                await asyncio.wait({news, end}, return_when=asyncio.FIRST_COMPLETED)

    async def _drain(self, writer: asyncio.StreamWriter) -> None:
        """Wait until the client has read most of what it was sent."""
        with suppress(TimeoutError):
            with suppress(ConnectionError):
                await asyncio.wait_for(writer.drain(), self._patience_s)
            if writer.is_closing():
                raise DaemonError("this client is gone, or has read no event while the daemon ends")
            return
        text = f"cut off: this client has read no event for {self._patience_s:g} s"
        _log.warning("a client that follows events is %s", text)
        writer.transport.abort()
        raise DaemonError(text)
