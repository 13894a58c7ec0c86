"""Questions to other processes: a late answer never answers another question, with ids or without."""

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from support.fakes.device_parts import FakeChild, FakeHolder
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool import broker_commands as commands
from ublkpool.bufpool.pool.broker import Broker
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes import broker_process, worker_process
from ublkpool.daemon.processes.broker_process import BrokerProcess
from ublkpool.daemon.processes.questions import Questions
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.workers import messages
from ublkpool.workers.process import fork_child

DEADLINE_S = 60


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))


def test_an_answer_that_comes_late_is_dropped() -> None:
    async def run() -> None:
        questions: Questions[str] = Questions()
        first, _abandoned = questions.ask()
        second, answer = questions.ask()
        questions.answer(first, "to the first")
        assert not answer.done()
        questions.answer(second, "to the second")
        questions.answer(second, "again")
        assert answer.result() == "to the second"

    in_loop(run)


@pytest.mark.parametrize("how", ["cancelled", "waits"])
def test_answers_without_numbers_come_in_the_order_of_their_questions(how: str) -> None:
    async def run() -> None:
        questions: Questions[str | int] = Questions()
        _, first = questions.ask(str)
        if how == "cancelled":
            first.cancel()
        _, second = questions.ask(str)
        _, other = questions.ask(int)
        questions.answer(0, 5)
        questions.answer(0, "one")
        assert other.result() == 5 and not second.done()
        questions.answer(0, "two")
        assert second.result() == "two"
        questions.answer(0, "three")

    in_loop(run)


def test_an_earlier_daemon_s_question_has_another_number() -> None:
    async def run() -> None:
        earlier: Questions[str] = Questions()
        adopted: Questions[str] = Questions()
        assert earlier.ask()[0] != adopted.ask()[0]

    in_loop(run)


class Worker:
    """A worker's end of the socket, and the supervisor's view of it; the process only sleeps."""

    def __init__(self) -> None:
        ours, self.sock = messages.pair()
        pid = fork_child(lambda: asyncio.run(asyncio.sleep(3600)) or 0, [], "ublkpool-test")
        self.seen = WorkerProcess(0, None, pid, ours, lambda *_: None)

    async def hears(self) -> Any:
        while True:
            try:
                return messages.receive_in_worker(self.sock)[0]
            except BlockingIOError:
                await asyncio.sleep(0)

    def says(self, message: messages.FromWorker) -> None:
        messages.send(self.sock, message)

    async def end(self) -> None:
        await self.seen.child.kill()
        self.seen.close()
        self.sock.close()


EXPECT = messages.Expect("00", 0, 0, False, 0)


@pytest.mark.parametrize("knows_ids", [True, False])
def test_a_worker_s_late_answer_is_not_taken_for_the_next_one(knows_ids: bool) -> None:
    async def run() -> None:
        worker = Worker()
        given_up = asyncio.ensure_future(worker.seen.ask(EXPECT))
        first = await worker.hears()
        given_up.cancel()
        asking = asyncio.ensure_future(worker.seen.ask(EXPECT))
        second = await worker.hears()
        assert first.id != second.id
        worker.says(messages.Expecting("late", first.id if knows_ids else 0))
        worker.says(messages.Expecting("in time", second.id if knows_ids else 0))
        assert await asking == messages.Expecting("in time", second.id if knows_ids else 0)
        await worker.end()

    in_loop(run)


def test_questions_of_two_kinds_at_once_each_get_their_own_answer() -> None:
    async def run() -> None:
        worker = Worker()
        expecting = asyncio.ensure_future(worker.seen.ask(EXPECT))
        lost = asyncio.ensure_future(worker.seen.ask(messages.Lost()))
        questions = [await worker.hears(), await worker.hears()]
        worker.says(messages.LetGo(questions[1].id))
        worker.says(messages.Expecting("", questions[0].id))
        assert isinstance(await expecting, messages.Expecting)
        assert isinstance(await lost, messages.LetGo)
        await worker.end()

    in_loop(run)


def test_news_of_an_interrupted_drain_is_not_taken_for_the_next_drain_s() -> None:
    async def run() -> None:
        worker = Worker()
        holding = asyncio.ensure_future(worker.seen.hold(True))
        question = await worker.hears()
        worker.says(messages.Quiet())
        worker.says(messages.Holding(question.id))
        await holding
        quiet = asyncio.ensure_future(worker.seen.quiet())
        assert not (await asyncio.wait({quiet}, timeout=0.02))[0]
        worker.says(messages.Quiet())
        await quiet
        flushing = asyncio.ensure_future(worker.seen.flush())
        question = await worker.hears()
        worker.says(messages.Flushed(0))
        worker.says(messages.Flushing(True, question.id))
        worker.says(messages.Flushed(-5))
        assert await flushing == -5
        await worker.end()

    in_loop(run)


def test_a_worker_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "ANSWER_DEADLINE_S", 0.01)

    async def run() -> None:
        worker = Worker()
        with pytest.raises(DaemonError, match="queue 0: its worker has not answered"):
            await worker.seen.ask(messages.Lost())
        await worker.seen.child.wait()
        assert "has not answered" in worker.seen.obituary()
        await worker.end()

    in_loop(run)


class LivingChild(FakeChild):
    """A process that has not ended; notes its signals."""

    def __init__(self) -> None:
        super().__init__()
        self.signals: list[signal.Signals] = []

    def send(self, number: signal.Signals) -> None:
        self.signals.append(number)

    @property
    def exit_status(self) -> None:
        return None


class Peer:
    """The broker's end of the control socket; an old one knows no ids."""

    def __init__(self, is_old: bool = False) -> None:
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.seen = BrokerProcess("ipc:///nonexistent", FakeHolder())
        self.child = self.seen.child = LivingChild()
        self.seen._use(broker_process._channel(ours), self.child)
        self.seen._repeats_ids = not is_old

    async def hears(self) -> commands.Command:
        while True:
            try:
                return commands.decode_command(self.sock.recv(65536))
            except BlockingIOError:
                await asyncio.sleep(0)

    def says(self, reply: commands.Reply) -> None:
        self.sock.send(commands.encode(reply))

    def close(self) -> None:
        self.sock.close()
        self.seen._channel.close()


@pytest.mark.parametrize("is_old", [True, False])
def test_the_broker_s_late_answer_is_not_taken_for_the_next_one(
    monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    async def run() -> None:
        peer = Peer(is_old)
        with monkeypatch.context() as hurry, pytest.raises(PoolError, match="does not answer"):
            hurry.setattr(broker_process, "REPLY_DEADLINE_S", 0.05)
            await peer.seen.command(commands.Register(3, 0, 1))
        assert peer.child.signals == [signal.SIGKILL], "it might do later what it was told"
        first = await peer.hears()
        asking = asyncio.ensure_future(peer.seen.command(commands.Reclaim(3, 0, 1)))
        second = await peer.hears()
        assert (first.id == 0) == is_old
        peer.says(commands.Failed("late", id=first.id))
        peer.says(commands.Done(7, id=second.id))
        assert await asking == commands.Done(7, id=second.id)
        peer.close()

    in_loop(run)


def test_the_broker_repeats_the_id_of_what_it_does_and_of_what_it_refuses() -> None:
    broker = Broker(cast(Any, None), cast(Any, None), False)
    assert broker._command(commands.encode(commands.Ping(5, id=9)), [], 0) == commands.Pong(5, id=9)
    refused = broker._command(commands.encode(commands.RemoveDevice(3, id=10)), [], 0)
    assert isinstance(refused, commands.Failed) and refused.id == 10


def test_an_id_of_zero_is_not_sent() -> None:
    """A broker of an earlier version refuses fields that it does not know."""
    assert commands.encode(commands.Register(3, 0, 1)) == (
        b'{"type":"register","device_number":3,"queue":0,"epoch":1}'
    )
    assert commands.encode(commands.Done()) == b'{"type":"done"}'


@pytest.mark.parametrize("is_old", [True, False])
def test_an_adopted_broker_is_asked_whether_it_repeats_ids(is_old: bool) -> None:
    async def run() -> None:
        peer = Peer()
        peer.seen._repeats_ids = None
        asking = asyncio.ensure_future(peer.seen.command(commands.Register(3, 0, 1)))
        second = await peer.hears()
        assert isinstance(second, commands.Ping)
        peer.says(
            commands.Failed("unknown field `id`") if is_old else commands.Pong(second.number, id=second.id)
        )
        register = await peer.hears()
        assert (register.id == 0) == is_old
        peer.says(commands.Done(id=register.id))
        await asking
        assert peer.seen._repeats_ids == (not is_old)
        peer.close()

    in_loop(run)
