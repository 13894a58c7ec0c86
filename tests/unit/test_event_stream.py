"""A client's place among the events: what it asks for after a break, and which replies are new to its user."""

import pytest

from ublkpool.daemon.admin.event_stream import EventStream
from ublkpool.daemon.admin.wire import EventsRequest, Reply
from ublkpool.daemon.errors import DaemonError, RemoteError
from ublkpool.daemon.events.event import Event


def told(seq: int) -> Reply:
    event = Event(seq=seq, time="2026-11-27T12:00:00.000Z", code="x", device="", severity="info", text="")
    return Reply(event=event)


class Stream:
    """A stream and what its user was told."""

    def __init__(self, *, follow: bool = True, waits: bool = False) -> None:
        self.progress: list[str] = []
        self.waited: list[str] = []
        request = EventsRequest(follow=follow, after=10, names=["disk0"])
        self.stream = EventStream(request, waits, self.progress.append, self.waited.append)

    def seqs(self, *numbers: int) -> list[int]:
        events = [self.stream.take(told(number)) for number in numbers]
        return [event.seq for event in events if event is not None]


def test_an_event_that_was_told_before_is_not_told_again() -> None:
    # A daemon that was restarted reads its file again, and may begin earlier than it was asked to.
    assert Stream().seqs(9, 10, 11, 11, 10, 15, 12) == [11, 15]


def test_after_a_break_the_client_asks_for_what_comes_after_the_last_event() -> None:
    each = Stream()
    each.seqs(11, 15)
    each.stream.interrupted(DaemonError("gone"))
    assert each.stream.request() == EventsRequest(follow=True, after=15, names=["disk0"])


def test_a_follower_says_once_that_it_waits_and_again_after_a_new_break() -> None:
    each = Stream()
    each.seqs(11)
    for error in ("gone", "gone", "refused"):
        each.stream.interrupted(DaemonError(error))
    each.seqs(12)
    each.stream.interrupted(DaemonError("refused"))
    assert each.waited == [f"{error}; waiting for it" for error in ("gone", "refused", "refused")]


@pytest.mark.parametrize(("follow", "waits"), [(True, False), (False, True), (False, False)])
def test_a_daemon_that_was_never_there_is_waited_for_only_by_a_follower_that_was_told_to(
    follow: bool, waits: bool
) -> None:
    with pytest.raises(DaemonError, match="absent"):
        Stream(follow=follow, waits=waits).stream.interrupted(DaemonError("absent"))
    Stream(follow=True, waits=True).stream.interrupted(DaemonError("absent"))


def test_a_reply_that_is_no_event_is_progress_or_the_refusal() -> None:
    each = Stream()
    assert each.stream.take(Reply(progress="reading")) is None
    assert each.progress == ["reading"]
    with pytest.raises(RemoteError, match="no device"):
        each.stream.take(Reply(ok=False, error="no device"))
