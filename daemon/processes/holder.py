"""What outlives the supervisor: a small process that holds duplicates of its descriptors for the next one.

A socket whose other end a worker, the broker or a backend has stays open while somebody holds it: so none of them
notices that the supervisor has died, and the next one goes on with the same sockets
(`daemon/device/succession.py`).  The holder reads none of them.

Owns the socket `RUN_DIR/held.sock` (0600), what is said over it, and the process.  A holder that dies is started again
and given everything anew; if it dies together with the supervisor, the next supervisor recovers instead of adopting.
"""

import asyncio
import logging
import os
import selectors
import signal
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from ublkpool.daemon.processes.backoff import Backoff, start_surely
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.readable import readable
from ublkpool.daemon.processes.reserve import with_room_for_one
from ublkpool.daemon.processes.unix_socket import listen
from ublkpool.workers.process import fork_child

PATH = "held.sock"
RESTART_PAUSE_S = 0.1
RESTART_MAX_S = 5.0
_ANSWER_TIMEOUT_S = 10.0
_PACKET_BYTES_MAX = 4096
_log = logging.getLogger("ublkpool.holder")


class Hold(msgspec.Struct, tag="hold", tag_field="type", frozen=True):
    """Hold the descriptor that travels with this, in the place of an older one of the same name."""

    name: str


class Drop(msgspec.Struct, tag="drop", tag_field="type", frozen=True):
    """Close the descriptor of this name, and all whose names begin with it and a slash."""

    name: str


class Take(msgspec.Struct, tag="take", tag_field="type", frozen=True):
    """Give a duplicate of everything: a Held for each, then one without a name."""


class Stop(msgspec.Struct, tag="stop", tag_field="type", frozen=True):
    """Close everything and end."""


class Held(msgspec.Struct, tag="held", tag_field="type", frozen=True):
    """The answer to Take; the descriptor travels with it.  The last has no name, and the holder's process number."""

    name: str
    pid: int = 0


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Hold | Drop | Take | Stop] = msgspec.json.Decoder(Hold | Drop | Take | Stop)
_answer_decoder: msgspec.json.Decoder[Held] = msgspec.json.Decoder(Held)


class Holder:
    """The supervisor's handle: what is held, by name, and the process that does it."""

    def __init__(self, run_dir: Path) -> None:
        """Nothing runs yet: `take_over`, then `start` unless there was one."""
        self._path = run_dir / PATH
        self._held: dict[str, int] = {}
        self._socket: socket.socket | None = None
        self._child: Child | None = None
        self._stopping = self._renewing = False

    @property
    def pid(self) -> int:
        """Its process; 0 if there is none."""
        return self._child.pid if self._child is not None else 0

    def take_over(self) -> dict[str, int]:
        """Connect to an earlier supervisor's holder; the descriptors that it held, which are the caller's now."""
        sock = _connect(self._path)
        if sock is None:
            return {}
        try:
            found, pid = _take(sock)
            self._child = Child(pid, "holder")
        except OSError as error:
            _log.warning("what an earlier daemon held is lost: %s", error)
            sock.close()
            return {}
        self._adopt_connection(sock)
        return found

    def start(self) -> None:
        """Fork one, unless an earlier supervisor's is there.  Raises `DaemonError`, `OSError`."""
        if self._socket is not None:
            return
        with listen(self._path, socket.SOCK_SEQPACKET) as listener:
            # The holder's own loop waits in accept and recv.
            listener.setblocking(True)
            fork = with_room_for_one(
                lambda: fork_child(lambda: _serve(listener), [listener.fileno()], "ublkpool-hold")
            )
            self._child = Child(fork(), "holder")
        sock = _connect(self._path)
        if sock is None:
            self._child.send(signal.SIGKILL)
            raise OSError(f"{self._path}: the holder does not listen")
        self._adopt_connection(sock)

    def _adopt_connection(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock

    async def keep_running(self) -> None:
        """Start it again whenever it ends, and give it everything; until it is stopped."""
        while True:
            assert self._socket is not None
            await readable(self._socket)
            # It says nothing unasked: what can be read is its end.
            if self._stopping:
                return
            level = logging.INFO if self._renewing else logging.WARNING
            _log.log(level, "the holder is gone; starting another")
            self._renewing = False
            self._socket.close()
            self._socket = None
            if self._child is not None:
                # Or it only hung.
                await self._child.kill()
            await asyncio.sleep(RESTART_PAUSE_S)
            delays = Backoff(asyncio.get_running_loop().time, RESTART_PAUSE_S, RESTART_MAX_S)
            await start_surely("the holder", self.start, delays, _log)
            for name, fd in self._held.items():
                self._say(Hold(name), fd)

    def hold(self, name: str, fd: int) -> None:
        """Have it hold a duplicate; `fd` stays the caller's.  So do we, to give it to the next holder."""
        self._forget(name)
        self._held[name] = os.dup(fd)
        self._say(Hold(name), fd)

    def drop(self, name: str) -> None:
        """Forget this name and all below it."""
        for each in _below(self._held, name):
            self._forget(each)
        self._say(Drop(name))

    def _forget(self, name: str) -> None:
        if (fd := self._held.pop(name, None)) is not None:
            os.close(fd)

    def renew(self) -> None:
        """Have another one, of today's code, hold everything."""
        self._renewing = True
        self._hang_up()

    def _hang_up(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    async def stop(self) -> None:
        """End it."""
        self._stopping = True
        for name in list(self._held):
            self._forget(name)
        self._say(Stop())
        if self._socket is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(readable(self._socket), _ANSWER_TIMEOUT_S)
            self._socket.close()
        if self._child is not None:
            await self._child.kill()
        self._path.unlink(missing_ok=True)

    def _say(self, message: Hold | Drop | Stop, fd: int | None = None) -> None:
        if self._socket is None:
            return
        try:
            socket.send_fds(self._socket, [_encoder.encode(message)], [] if fd is None else [fd])
        except OSError:
            # It has died or hangs: `keep_running` sees the end, and gives the next one everything.
            self._hang_up()


def _connect(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        return None
    return sock


def _take(sock: socket.socket) -> tuple[dict[str, int], int]:
    """What is held, and by which process.  Raises `OSError` if it does not answer in full."""
    sock.settimeout(_ANSWER_TIMEOUT_S)
    sock.send(_encoder.encode(Take()))
    found: dict[str, int] = {}
    while True:
        packet, fds, _, _ = socket.recv_fds(sock, _PACKET_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC)
        if not packet:
            raise ConnectionResetError("the holder ended")
        answer = _answer_decoder.decode(packet)
        if not answer.name:
            return found, answer.pid
        found[answer.name] = fds[0]


def _serve(listener: socket.socket) -> int:
    """The holder's whole life."""
    os.setsid()
    held: dict[str, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    # One that hangs up at once, or for which there is no descriptor, keeps nothing from being held.
                    with suppress(OSError):
                        selector.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                said = _hear(connection, held)
                if said is Stop:
                    return 0
                if said is None:
                    selector.unregister(connection)
                    connection.close()


def _hear(connection: socket.socket, held: dict[str, int]) -> type | None:
    """Obey one packet; what it was, None at the end of the connection."""
    try:
        packet, fds, _, _ = socket.recv_fds(connection, _PACKET_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    if not packet:
        return None
    message = _decoder.decode(packet)
    match message:
        case Hold(name=name):
            _close(held, [name])
            # There is none if this process has as many as it may: then the next daemon recovers instead.
            if fds:
                held[name] = fds[0]
        case Drop(name=name):
            _close(held, _below(held, name))
        case Take():
            _give(connection, held)
    return type(message)


def _below(held: Iterable[str], name: str) -> list[str]:
    return [each for each in held if each == name or each.startswith(f"{name}/")]


def _close(held: dict[str, int], names: list[str]) -> None:
    for name in names:
        if (fd := held.pop(name, None)) is not None:
            os.close(fd)


def _give(connection: socket.socket, held: dict[str, int]) -> None:
    connection.settimeout(_ANSWER_TIMEOUT_S)
    with suppress(OSError):
        for name, fd in held.items():
            socket.send_fds(connection, [_encoder.encode(Held(name))], [fd])
        connection.send(_encoder.encode(Held("", os.getpid())))
    connection.settimeout(None)
