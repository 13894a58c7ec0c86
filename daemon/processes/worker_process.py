"""A worker as the supervisor sees it: its process, and its messages over a socketpair.

Owns the conversation of `workers/messages.py`: questions, each with its own answer, and news at any time.  Runs on the
asyncio loop.
"""

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.beside import beside
from ublkpool.daemon.processes.channel import Channel
from ublkpool.daemon.processes.children import Child, describe_exit
from ublkpool.workers import messages

T = TypeVar("T")
ANSWER_DEADLINE_S = 120.0


class WorkerProcess:
    """One queue's worker.  `on_news` is called with `Cut`, `HungUp`, `Silent` and `Absent`."""

    knows_new_pool = True
    """Whether it understands `messages.NewPool`: a worker of an earlier version does not."""
    knows_deadlines = True
    """Whether it understands `messages.SetDeadlines`: a worker of an earlier version does not."""
    knows_hold = True
    """Whether it understands `messages.Hold`: a worker of an earlier version does not."""
    knows_gate = True
    """Whether it takes a gate with `messages.Hold`: a worker of an earlier version does not."""
    knows_resize = True
    """Whether it understands `messages.Resize`: a worker of an earlier version does not."""
    knows_grow = True
    """Whether it understands `messages.Grow`: a worker of an earlier version does not."""
    on_grown: Callable[[int], None] = staticmethod(lambda size_bytes: None)
    """Called with the size of the store to which it is connected, whenever that has grown and no `grow` awaits it."""
    grown_bytes = 0
    """The largest size that it has announced, also before `on_grown` was set; 0: none."""

    def __init__(
        self,
        queue: int,
        cpu: int | None,
        pid: int,
        sock: socket.socket,
        on_news: Callable[["WorkerProcess", messages.FromWorker], None],
    ) -> None:
        """Takes over `sock`.  Raises `ProcessLookupError` if an earlier daemon's worker has ended."""
        self.queue = queue
        self.cpu = cpu
        self.child = Child(pid)
        self.fault = ""
        self.is_excluded = False
        """Whether it ended because another client has taken its store over."""
        self._on_news = on_news
        self._loop = asyncio.get_running_loop()
        self._fetched: asyncio.Future[None] = self._loop.create_future()
        self._linked: asyncio.Future[None] = self._loop.create_future()
        self._quiet: asyncio.Future[None] = self._loop.create_future()
        self._flushed: asyncio.Future[int] = self._loop.create_future()
        self._growing: asyncio.Future[messages.Grown] | None = None
        self._asked_bytes = 0
        self._channel: Channel[messages.ToWorker, messages.FromWorker] = Channel(
            sock, messages.decode_from_worker
        )
        self._loop.add_reader(self._channel, self._hear)

    async def fetched(self) -> None:
        """Wait until every tag is fetched.  Raises `DaemonError` with the reason if the worker ends before."""
        await self._or_end(self._fetched)

    async def linked(self) -> None:
        """Wait until its backend has greeted it, and has confirmed the fence if one was asked for.

        Raises `DaemonError` if the worker ends before.
        """
        await self._or_end(self._linked)

    @property
    def is_linked(self) -> bool:
        """Whether its backend has greeted it, and the worker has not reported that backend gone since."""
        return self._linked.done()

    async def hold(self, on: bool, gate: int | None = None) -> None:
        """Have its requests wait, or go on; a hold with `gate` ends with that, see `messages.Hold`.

        Raises `DaemonError` if the worker ends before.
        """
        await self.ask(messages.Hold(on), gate if self.knows_gate else None)

    async def quiet(self) -> None:
        """After `hold`: wait until its backend has no request.  Raises `DaemonError` if the worker ends before."""
        await self._or_end(self._quiet)

    async def flush(self) -> int:
        """The backend's result of a FLUSH, -ENOTCONN without a backend; for a quiet queue.

        Raises `DaemonError` if the worker ends before.
        """
        answer = await self.ask(messages.FlushBackend())
        assert isinstance(answer, messages.Flushing)
        return await self._or_end(self._flushed) if answer.was_sent else -errno.ENOTCONN

    async def grow(self, size_bytes: int, patience_s: float) -> None:
        """Have the store to which it is connected grow to this size.  One call at a time.

        Raises `DaemonError` with its reason if it refuses, or if it ends or does not answer within `patience_s`: then
        the store may still grow later, and `on_grown` is called when it has.
        """
        self._growing = self._loop.create_future()
        self._asked_bytes = size_bytes
        self.tell(messages.Grow(size_bytes))
        try:
            answer = await asyncio.wait_for(self._or_end(self._growing), patience_s)
        except TimeoutError:
            raise DaemonError(
                f"its store has not grown within {patience_s:g} s: once it has, the device follows"
            ) from None
        finally:
            self._growing = None
        if answer.reason:
            raise DaemonError(answer.reason)

    async def report(self) -> messages.Standing:
        """The state of an earlier supervisor's worker; to be asked first, and once.  Raises `DaemonError`."""
        standing = await self.ask(messages.Report())
        assert isinstance(standing, messages.Standing)
        self.knows_new_pool = standing.knows_new_pool
        self.knows_deadlines = standing.knows_deadlines
        self.knows_hold = standing.knows_hold
        self.knows_gate = standing.knows_gate
        self.knows_resize = standing.knows_resize
        self.knows_grow = standing.knows_grow
        self.grown_bytes = max(self.grown_bytes, standing.grown_bytes)
        if standing.fetched:
            _resolve(self._fetched)
        return standing

    async def ask(self, question: messages.Question, fd: int | None = None) -> messages.Answer:
        """The answer.  Raises `DaemonError` if the worker ends before, or does not answer in time.

        A worker that is late is killed: it might do later what it was asked, and the daemon would not know.
        """
        with self._naming_failure():
            answer = self._channel.ask(question, messages.ANSWERS[type(question)], fd)
        try:
            message = await asyncio.wait_for(self._or_end(answer), ANSWER_DEADLINE_S)
        except TimeoutError:
            self.fault = f"queue {self.queue}: its worker has not answered after {ANSWER_DEADLINE_S:.0f} s"
            self.child.send(signal.SIGKILL)
            raise DaemonError(self.fault) from None
        assert isinstance(message, messages.Answer)
        return message

    async def become(self, message: messages.Become, files: Sequence[int]) -> None:
        """Have a prepared worker serve a device, on these descriptors.  Raises `DaemonError` if it cannot."""
        for fd in files:
            self.tell(messages.HandOver(), fd)
        answer = await self.ask(message)
        assert isinstance(answer, messages.Became)
        if answer.reason:
            raise DaemonError(answer.reason)

    def report_to(self, on_news: Callable[["WorkerProcess", messages.FromWorker], None]) -> None:
        """From now on its news are another device's."""
        self._on_news = on_news

    def tell(self, message: messages.ToWorker, fd: int | None = None) -> None:
        """Send a message that has no answer.  Raises `DaemonError` if the worker has ended."""
        with self._naming_failure():
            self._channel.send(message, fd)

    @contextmanager
    def _naming_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DaemonError(f"queue {self.queue}: its worker does not listen: {error.strerror}") from error

    def fileno(self) -> int:
        """The supervisor's end of the socketpair."""
        return self._channel.fileno()

    def close(self) -> None:
        """Close the socket of a worker that has ended."""
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel)
            self._channel.close()

    def obituary(self) -> str:
        """How the worker ended, in words."""
        status = self.child.exit_status
        return self.fault or f"queue {self.queue}: its worker ended: {describe_exit(status or 0)}"

    async def _or_end(self, wanted: "asyncio.Future[T]") -> T:
        async with beside(self.child.wait()) as end:
            await asyncio.wait((wanted, end), return_when=asyncio.FIRST_COMPLETED)
        # Its last messages may still lie in the socket.
        self._hear()
        if not wanted.done():
            raise DaemonError(self.obituary())
        return wanted.result()

    def _hear(self) -> None:
        while self._channel.fileno() >= 0:
            try:
                message = self._channel.receive()
            except BlockingIOError:
                return
            if message is None:
                self._loop.remove_reader(self._channel)
                return
            self._on_message(message)

    def _on_message(self, message: messages.FromWorker) -> None:
        if isinstance(message, messages.Answer):
            self._on_answer(message)
            return
        match message:
            case messages.Fetched():
                _resolve(self._fetched)
            case messages.Linked():
                _resolve(self._linked)
            case messages.Quiet():
                _resolve(self._quiet)
            case messages.Flushed(result=result):
                if not self._flushed.done():
                    self._flushed.set_result(result)
            case messages.Grown():
                self._on_grown(message)
            case messages.Fault(reason=reason, excluded=excluded):
                self.fault, self.is_excluded = reason, excluded
            case _:
                if isinstance(message, messages.Cut | messages.HungUp):
                    self._unlink()
                self._on_news(self, message)

    def _on_grown(self, message: messages.Grown) -> None:
        growing = self._growing
        if message.is_asked and growing is not None and message.size_bytes == self._asked_bytes:
            if not growing.done():
                growing.set_result(message)
        # A late answer is about another size, or comes when no answer is awaited: the store has grown nevertheless.
        elif not message.reason and message.size_bytes > self.grown_bytes:
            self.grown_bytes = message.size_bytes
            self.on_grown(message.size_bytes)

    def _on_answer(self, message: messages.Answer) -> None:
        if isinstance(
            message, messages.Expecting | messages.LetGo | messages.PoolChanged | messages.Standing
        ):
            self._unlink()
        # What came before the answer was said of an earlier hold, or of the FLUSH of an interrupted drain.
        if isinstance(message, messages.Holding):
            self._quiet = self._loop.create_future()
        if isinstance(message, messages.Flushing):
            self._flushed = self._loop.create_future()
        if isinstance(message, messages.Standing) and _is_linked(message):
            _resolve(self._linked)
        self._channel.answer(message.id, message)

    def _unlink(self) -> None:
        """The next `Linked` is about the next backend."""
        if self._linked.done():
            self._linked = self._loop.create_future()


def _is_linked(standing: messages.Standing) -> bool:
    """Whether its backend, or the engine in the worker itself, has greeted it."""
    return bool(standing.token) if standing.linked is None else standing.linked


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
