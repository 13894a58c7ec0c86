"""The holder: a small process that keeps duplicates of the supervisor's descriptors for the next supervisor.

A socket stays open while any process has its end.  So a worker, the broker or a backend does not notice that the
supervisor has died, and the next supervisor goes on with the same sockets (`daemon/device/succession.py`).  The holder
reads none of them.

Owns the socket `RUN_DIR/held.sock` (0600), the messages over it, and the process.  A holder that dies is started again
and given everything anew; if it dies together with the supervisor, the next supervisor recovers instead of adopting.
"""

import asyncio
import errno
import logging
import os
import selectors
import signal
import socket
from collections import deque
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeAlias

import msgspec

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import DaemonError, is_shortage
from ublkpool.daemon.processes.channel import Channel
from ublkpool.daemon.processes.children import Child, describe_exit
from ublkpool.daemon.processes.reserve import with_room_for_one
from ublkpool.daemon.processes.supervised import SupervisedProcess
from ublkpool.daemon.processes.unix_socket import listen
from ublkpool.workers.credentials import credentials_of, peer_pidfd
from ublkpool.workers.process import fork_child

PATH = "held.sock"
RESTART_PAUSE_S = 0.1
RESTART_MAX_S = 5.0
_ANSWER_TIMEOUT_S = 10.0
_POLL_S = 0.02
_TITLE = "ublkpool-hold"
_log = logging.getLogger("ublkpool.holder")


class Hold(msgspec.Struct, tag="hold", tag_field="type", frozen=True):
    """Keep the descriptor that travels with this, in place of an older one of the same name."""

    name: str


class Drop(msgspec.Struct, tag="drop", tag_field="type", frozen=True):
    """Close the descriptor of this name, and all whose names begin with it and a slash."""

    name: str


class Take(msgspec.Struct, tag="take", tag_field="type", frozen=True):
    """Send a duplicate of every descriptor: a `Held` for each, then one without a name."""


class Stop(msgspec.Struct, tag="stop", tag_field="type", frozen=True):
    """Close everything and end."""


class Held(msgspec.Struct, tag="held", tag_field="type", frozen=True):
    """The answer to `Take`; the descriptor travels with it.  The last has no name, and the holder's process number."""

    name: str
    pid: int = 0


_ToHolder: TypeAlias = Hold | Drop | Take | Stop
_decoder: msgspec.json.Decoder[_ToHolder] = msgspec.json.Decoder(_ToHolder)
_answer_decoder: msgspec.json.Decoder[Held] = msgspec.json.Decoder(Held)
_Channel = Channel[_ToHolder, Held]
_HolderChannel = Channel[Held, _ToHolder]


class Holder(SupervisedProcess):
    """The supervisor's handle: the held descriptors by name, and the process."""

    def __init__(self, run_dir: Path) -> None:
        """Nothing runs yet: `take_over`, then `start`."""
        super().__init__("the holder", _log, RESTART_PAUSE_S, RESTART_MAX_S)
        self._path = run_dir / PATH
        self._held: dict[str, int] = {}
        self._channel: _Channel | None = None
        self._unsent: deque[Hold | Drop | Stop] = deque()
        """What the socket has no room for yet; a `Hold` is sent with what its name stands for then."""
        self._patience: asyncio.TimerHandle | None = None
        """Runs while `_unsent` has entries: a holder that reads nothing is replaced."""
        self._loop = asyncio.get_running_loop()

    @property
    def pid(self) -> int:
        """The process number; 0 if none was started."""
        return self.child.pid if self.is_started else 0

    def take_over(self) -> dict[str, int]:
        """Connect to an earlier supervisor's holder; the descriptors that it held, which are the caller's now.

        A holder that does not answer in full is killed.  Raises `DaemonError` if this process lacks descriptors or
        memory for them: then the holder keeps them for a later start.
        """
        channel = _connect(self._path)
        if channel is None:
            return {}
        found: dict[str, int] = {}
        try:
            self._adopt(_take(channel, found))
        except OSError as error:
            _close(found, list(found))
            with closing(channel):
                if is_shortage(error):
                    raise DaemonError(
                        f"{self._path}: cannot take over what an earlier daemon left: {explain(error)}"
                    ) from error
                _log.warning("what an earlier daemon held is lost: %s", error)
                _end_silent(channel)
            return {}
        self._channel = channel
        return found

    def start(self) -> None:
        """Start the process, unless `take_over` found an earlier supervisor's.  Raises `DaemonError`, `OSError`."""
        if self._channel is None:
            super().start()

    def _start(self) -> None:
        with listen(self._path, socket.SOCK_SEQPACKET) as listener:
            # The holder's own loop waits in accept and recv.
            listener.setblocking(True)
            fork = with_room_for_one(
                lambda: fork_child(lambda: _serve(listener), [listener.fileno()], _TITLE)
            )
            child = Child(fork())
        self._channel = _connect(self._path)
        if self._channel is None:
            child.send(signal.SIGKILL)
            raise OSError(f"{self._path}: the holder does not listen")
        self.child = child

    async def _wait_for_end(self) -> None:
        """The holder sends nothing unasked, so a readable socket has ended: the process died, or hangs and was cut."""
        assert self._channel is not None
        await self._channel.readable()

    async def _clear_away(self, pause_s: float) -> None:
        self._close()
        # It may only hang.
        status = await self.child.kill()
        level = logging.INFO if self.is_replaced else logging.WARNING
        _log.log(level, "the holder is gone: %s; starting another", describe_exit(status))

    def _close(self) -> None:
        self._give_up_unsent()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _on_restart(self) -> None:
        for name in self._held:
            self._send(Hold(name))

    def hold(self, name: str, fd: int) -> None:
        """Have the holder keep a duplicate; `fd` stays the caller's.  This process keeps one too, for a restart."""
        self._forget(name)
        self._held[name] = os.dup(fd)
        self._send(Hold(name))

    def descriptor(self, name: str) -> int | None:
        """This process's descriptor of what is held by this name; it stays the holder's."""
        return self._held.get(name)

    def drop(self, name: str) -> None:
        """Close this name's descriptor and all below it."""
        for each in _below(self._held, name):
            self._forget(each)
        self._send(Drop(name))

    def _forget(self, name: str) -> None:
        if (fd := self._held.pop(name, None)) is not None:
            os.close(fd)

    def renew(self) -> None:
        """Have a process of today's code take the place of this one."""
        self.is_replaced = True
        if self._channel is not None:
            self._channel.hang_up()

    async def stop(self) -> None:
        """End it."""
        self.let_end()
        for name in list(self._held):
            self._forget(name)
        self._send(Stop())
        if self._channel is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._channel.readable(), _ANSWER_TIMEOUT_S)
            self._close()
        if self.is_started:
            await self.child.kill()
        self._path.unlink(missing_ok=True)

    async def settled(self) -> None:
        """Return when the holder was sent everything, or is being replaced."""
        while self._unsent and self._channel is not None:
            await asyncio.sleep(_POLL_S)

    def _send(self, message: Hold | Drop | Stop) -> None:
        if self._channel is None:
            return
        self._unsent.append(message)
        # The socket takes about 280 messages; those that wait for room keep their order.
        if self._patience is None:
            self._send_unsent()

    def _send_unsent(self) -> None:
        if self._channel is None:
            return
        try:
            while self._unsent:
                self._send_one(self._channel, self._unsent[0])
                self._unsent.popleft()
                self._stop_waiting()
        except BlockingIOError:
            if self._patience is None:
                self._loop.add_writer(self._channel, self._send_unsent)
                self._patience = self._loop.call_later(_ANSWER_TIMEOUT_S, self._channel.hang_up)
        except OSError:
            # It has died: `keep_running` sees the end, and the next one is given everything.
            self._give_up_unsent()
            self._channel.hang_up()

    def _send_one(self, channel: _Channel, message: Hold | Drop | Stop) -> None:
        if not isinstance(message, Hold):
            channel.send(message)
        elif (fd := self._held.get(message.name)) is not None:
            channel.send(message, fd)

    def _give_up_unsent(self) -> None:
        self._unsent.clear()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._patience is not None and self._channel is not None:
            self._patience.cancel()
            self._patience = None
            self._loop.remove_writer(self._channel)


def _connect(path: Path) -> _Channel | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    # A connect waits for room among the connections that a stopped holder has not accepted.
    sock.settimeout(_ANSWER_TIMEOUT_S)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        return None
    sock.setblocking(False)
    return Channel(sock, _answer_decoder.decode)


def _take(channel: _Channel, found: dict[str, int]) -> int:
    """Add the held descriptors to `found`; the holder's pid; waits.  Raises `OSError` without an answer in full."""
    with channel.timeout(_ANSWER_TIMEOUT_S):
        channel.send(Take())
        while True:
            answer, fd = channel.receive_with_descriptor()
            if answer is None:
                raise ConnectionResetError("the holder ended")
            if not answer.name:
                return answer.pid
            if fd is None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            found[answer.name] = fd


def _end_silent(channel: _Channel) -> None:
    """Kill a holder that cannot be taken over: what it holds would stay open, and its successor's socket is another."""
    # The process that called listen(2), see `_serve`; the holder of an earlier version left that to its daemon.
    with suppress(OSError), socket.socket(fileno=os.dup(channel.fileno())) as sock:
        pid, pidfd = credentials_of(sock).pid, peer_pidfd(sock)
        try:
            if Path(f"/proc/{pid}/comm").read_text(errors="replace").strip() == _TITLE:
                _log.warning("killing the holder of an earlier daemon (process %d)", pid)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def _serve(listener: socket.socket) -> int:
    """The holder's whole life, in its own process."""
    os.setsid()
    # A connection shows the process that called listen(2) last (unix_listen): the next daemon can end this one.
    listener.listen()
    held: dict[str, int] = {}
    asking: list[_HolderChannel] = []
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            # A supervisor that asks is answered when the other connections are empty: the messages that its predecessor
            # sent before it died count.
            ready = selector.select(0 if asking else None)
            if not ready:
                for channel in asking:
                    _give(channel, held)
                asking.clear()
            for key, _ in ready:
                if key.fileobj is listener:
                    _accept(listener, selector)
                    continue
                said = _obey(key.data, held)
                if said is Stop:
                    return 0
                if said is Take:
                    asking.append(key.data)
                if said is None:
                    selector.unregister(key.fileobj)
                    key.data.close()


def _accept(listener: socket.socket, selector: selectors.BaseSelector) -> None:
    # A connection that ends at once, or finds no descriptor left, must not end the holder.
    with suppress(OSError):
        connection, _ = listener.accept()
        selector.register(connection, selectors.EVENT_READ, Channel(connection, _decoder.decode))


def _obey(channel: _HolderChannel, held: dict[str, int]) -> type | None:
    """Execute one message, except `Take`; its type, None at the end of the connection."""
    message, fd = channel.receive_with_descriptor()
    match message:
        case None:
            return None
        case Hold(name=name):
            _close(held, [name])
            # Missing if this process has as many as it may: then the next supervisor recovers instead of adopting.
            if fd is not None:
                held[name] = fd
        case Drop(name=name):
            _close(held, _below(held, name))
    return type(message)


def _below(held: Iterable[str], name: str) -> list[str]:
    return [each for each in held if each == name or each.startswith(f"{name}/")]


def _close(held: dict[str, int], names: list[str]) -> None:
    for name in names:
        if (fd := held.pop(name, None)) is not None:
            os.close(fd)


def _give(channel: _HolderChannel, held: dict[str, int]) -> None:
    # An asker that has ended is an error, too.
    with suppress(OSError), channel.timeout(_ANSWER_TIMEOUT_S):
        for name, fd in held.items():
            channel.send(Held(name), fd)
        channel.send(Held("", os.getpid()))
