"""A client's place among the events, over the connections that it takes to read them; for both kinds of client.

Owns the number of the last event and what the user was told; does no I/O.
"""

from collections.abc import Callable

import msgspec

from ublkpool.daemon.admin.wire import EventsRequest, Reply, result_of
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events.event import Event


class EventStream:
    """What to ask for next, and which replies are new."""

    def __init__(
        self,
        request: EventsRequest,
        waits: bool,
        on_progress: Callable[[str], None],
        on_wait: Callable[[str], None],
    ) -> None:
        """`waits`: a daemon that is absent from the start is waited for, too, by a client that follows."""
        self.follows = request.follow
        self._request = request
        self._last = request.after
        self._waits = waits and request.follow
        self._on_progress = on_progress
        self._on_wait = on_wait
        self._said = ""

    def request(self) -> EventsRequest:
        """Asks for what has not been read yet."""
        return msgspec.structs.replace(self._request, after=self._last)

    def take(self, reply: Reply) -> Event | None:
        """The event in this reply if it is a new one.  Raises the daemon's refusal."""
        self._said, self._waits = "", self._waits or self.follows
        if reply.event is not None and reply.event.seq > self._last:
            self._last = reply.event.seq
            return reply.event
        if reply.ok is not None:
            result_of(reply, None)
        elif reply.progress:
            self._on_progress(reply.progress)
        return None

    def interrupted(self, error: DaemonError) -> None:
        """The daemon has gone: say once that the client waits for it.  Raises the error where it does not wait."""
        if not self._waits:
            raise error
        if str(error) != self._said:
            self._said = str(error)
            self._on_wait(f"{self._said}; waiting for it")
