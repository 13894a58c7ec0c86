"""A channel: messages with descriptors, questions with ids, and the end of the connection."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from ublkpool.daemon.processes.channel import Channel

DEADLINE_S = 60


class Ask(msgspec.Struct, tag="ask", omit_defaults=True):
    """A question."""

    what: str
    id: int = 0


class Say(msgspec.Struct, tag="say", omit_defaults=True):
    """An answer."""

    what: str
    id: int = 0


Ours = Channel[Ask, Say]
Theirs = Channel[Say, Ask]


def pair() -> tuple[Ours, Theirs]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    return Channel(ours, msgspec.json.Decoder(Say).decode), Channel(theirs, msgspec.json.Decoder(Ask).decode)


def in_loop(test: Callable[[Ours, Theirs], Awaitable[None]]) -> None:
    async def run() -> None:
        ours, theirs = pair()
        await asyncio.wait_for(test(ours, theirs), DEADLINE_S)
        ours.close()
        theirs.close()

    asyncio.run(run())


def test_a_descriptor_travels_with_its_message_and_stays_the_senders() -> None:
    async def run(ours: Ours, theirs: Theirs) -> None:
        reader, writer = os.pipe()
        ours.send(Ask("keep this"), reader)
        ours.send(Ask("no descriptor"))
        message, received = theirs.receive_with_descriptor()
        assert message == Ask("keep this") and received is not None and received != reader
        assert not os.get_inheritable(received)
        os.write(writer, b"x")
        assert os.read(received, 1) == b"x"
        assert theirs.receive_with_descriptor() == (Ask("no descriptor"), None)
        for fd in (reader, writer, received):
            os.close(fd)

    in_loop(run)


def test_an_answer_belongs_to_the_question_whose_id_it_repeats() -> None:
    async def run(ours: Ours, theirs: Theirs) -> None:
        late, answer = ours.ask(Ask("first")), ours.ask(Ask("second"))
        late.cancel()
        ids = [each.id for each in (theirs.receive(), theirs.receive()) if each is not None]
        for number, what in zip(ids, ("late", "in time"), strict=True):
            theirs.send(Say(what, number))
        await ours.readable()
        for _ in ids:
            said = ours.receive()
            assert said is not None
            ours.answer(said.id, said)
        assert answer.result().what == "in time"

    in_loop(run)


def test_a_question_to_an_earlier_version_carries_no_id() -> None:
    async def run(ours: Ours, theirs: Theirs) -> None:
        answer = ours.ask(Ask("what"), Say, repeats_ids=False)
        assert theirs.receive() == Ask("what")
        ours.answer(0, Say("that"))
        assert answer.result() == Say("that")

    in_loop(run)


@pytest.mark.parametrize("how", ["close", "hang_up"])
def test_the_end_of_the_connection_is_received_after_every_message(how: str) -> None:
    async def run(ours: Ours, theirs: Theirs) -> None:
        with pytest.raises(BlockingIOError):
            ours.receive()
        theirs.send(Say("last"))
        getattr(theirs, how)()
        await ours.readable()
        assert (ours.receive(), ours.receive()) == (Say("last"), None)
        with pytest.raises(BrokenPipeError):
            ours.ask(Ask("gone"))

    in_loop(run)


def test_a_channel_that_has_a_timeout_waits_for_it_and_no_longer() -> None:
    async def run(ours: Ours, theirs: Theirs) -> None:
        with ours.timeout(0.001), pytest.raises(TimeoutError):
            ours.receive()
        with pytest.raises(BlockingIOError):
            ours.receive()

    in_loop(run)
