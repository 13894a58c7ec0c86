"""A worker, seen from the supervisor: its process, and what it says over its socketpair.

Owns the conversation of `workers/messages.py`: questions, each with its own answer, and news whenever.  Runs on the
asyncio loop.
"""

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import TypeVar

import msgspec

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.children import Child, describe_exit
from ublkpool.daemon.processes.questions import Questions
from ublkpool.workers import messages

T = TypeVar("T")
ANSWER_DEADLINE_S = 120.0


class WorkerProcess:
    """One queue's worker.  `on_news` hears Cut, Silent and Absent; its end is `child.wait()`."""

    knows_new_pool = True
    """Whether it understands `messages.NewPool`: an earlier version's does not."""

    def __init__(
        self,
        queue: int,
        cpu: int | None,
        pid: int,
        sock: socket.socket,
        on_news: Callable[["WorkerProcess", messages.FromWorker], None],
    ) -> None:
        """Raises `ProcessLookupError` if an earlier daemon's has ended."""
        self.queue = queue
        self.cpu = cpu
        self.child = Child(pid, f"worker of queue {queue}")
        self.fault = ""
        self._sock = sock
        self._on_news = on_news
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._linked: asyncio.Future[None] = self._loop.create_future()
        self._questions: Questions[messages.Answer] = Questions()
        self._loop.add_reader(sock, self._hear)

    async def ready(self) -> None:
        """Wait until every tag is fetched.  Raises `DaemonError` with its reason if it ends before."""
        await self._or_end(self._ready)

    async def linked(self) -> None:
        """Wait until its backend is there, fenced if that was asked.  Raises `DaemonError` if it ends before."""
        await self._or_end(self._linked)

    @property
    def is_linked(self) -> bool:
        """Whether its backend has greeted it, and it has not said since that this one is gone."""
        return self._linked.done()

    async def report(self) -> messages.Standing:
        """Where an earlier supervisor's worker stands; once, before anything else.  Raises `DaemonError` if it ends."""
        standing = await self.ask(messages.Report())
        assert isinstance(standing, messages.Standing)
        self.knows_new_pool = standing.knows_new_pool
        if standing.fetched:
            _resolve(self._ready)
        return standing

    async def ask(self, question: messages.Question, fd: int | None = None) -> messages.Answer:
        """Its answer.  Raises `DaemonError` if it ends before, or is not in time: then it is killed.

        What it was asked to do may come to pass later, which the daemon would not know of.
        """
        number, answer = self._questions.ask(messages.ANSWERS[type(question)])
        self.tell(msgspec.structs.replace(question, id=number), fd)
        try:
            return await asyncio.wait_for(self._or_end(answer), ANSWER_DEADLINE_S)
        except TimeoutError:
            self.fault = f"queue {self.queue}: its worker has not answered after {ANSWER_DEADLINE_S:.0f} s"
            self.child.send(signal.SIGKILL)
            raise DaemonError(self.fault) from None

    def tell(self, message: messages.ToWorker, fd: int | None = None) -> None:
        """Say something that needs no answer.  Raises `DaemonError` if it has gone."""
        try:
            messages.send(self._sock, message, fd)
        except OSError as error:
            raise DaemonError(f"queue {self.queue}: its worker does not listen: {error.strerror}") from error

    def fileno(self) -> int:
        """Our end of its socketpair."""
        return self._sock.fileno()

    def close(self) -> None:
        """Forget it; it has ended."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def obituary(self) -> str:
        """How it ended, in words."""
        status = self.child.exit_status
        return self.fault or f"queue {self.queue}: its worker ended: {describe_exit(status or 0)}"

    async def _or_end(self, wanted: "asyncio.Future[T]") -> T:
        end = asyncio.ensure_future(self.child.wait())
        try:
            await asyncio.wait((wanted, end), return_when=asyncio.FIRST_COMPLETED)
        finally:
            end.cancel()
        # Its last words may still lie in the socket.
        self._hear()
        if not wanted.done():
            raise DaemonError(self.obituary())
        return wanted.result()

    def _hear(self) -> None:
        while self._sock.fileno() >= 0:
            try:
                message = messages.receive_in_supervisor(self._sock)
            except BlockingIOError:
                return
            if message is None:
                self._loop.remove_reader(self._sock)
                return
            self._on_message(message)

    def _on_message(self, message: messages.FromWorker) -> None:
        match message:
            case messages.Ready():
                _resolve(self._ready)
            case messages.Linked():
                _resolve(self._linked)
            case messages.Expecting() | messages.LetGo() | messages.PoolChanged():
                self._unlink()
                self._questions.answer(message.id, message)
            case messages.Standing():
                self._unlink()
                if message.token and message.linked is not False:
                    _resolve(self._linked)
                self._questions.answer(message.id, message)
            case messages.Fault(reason=reason):
                self.fault = reason
            case _:
                if isinstance(message, messages.Cut | messages.HungUp):
                    self._unlink()
                self._on_news(self, message)

    def _unlink(self) -> None:
        """What it says of a backend from here on is said of the next."""
        if self._linked.done():
            self._linked = self._loop.create_future()


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
