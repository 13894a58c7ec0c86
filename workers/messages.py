"""What the supervisor and a worker tell each other, over a SOCK_SEQPACKET socketpair made before the fork.

Owns the shapes and their coding, both halves.  Rare, and never about a request.
"""

import array
import socket

import msgspec

MESSAGE_BYTES_MAX = 16384


class Expect(msgspec.Struct, tag="expect", tag_field="type", frozen=True):
    """A backend will say HELLO with this token (hexadecimal); its segment's descriptor travels with the message.

    `segment` is 0 if it brings none; sizes in bytes.
    """

    token: str
    segment: int
    segment_bytes: int
    reads_own: bool
    user: int
    """The user that may connect to the queue."""
    fence: bool = False
    """It served an earlier epoch: no request before it has confirmed that nothing of that is running."""
    id: int = 0
    """Of the question; the answer has it, too."""


class Lost(msgspec.Struct, tag="lost", tag_field="type", frozen=True):
    """The backend is dead or has let go of every buffer: replay what it did not answer to the next."""

    id: int = 0


class NewPool(msgspec.Struct, tag="new_pool", tag_field="type", frozen=True):
    """There is no backend: use the memory whose descriptor travels with this as the pool, with what yours holds."""

    id: int = 0


class GiveUp(msgspec.Struct, tag="give_up", tag_field="type", frozen=True):
    """The device is going: fail what would wait for a backend."""


class Report(msgspec.Struct, tag="report", tag_field="type", frozen=True):
    """Another supervisor took over: say where you stand."""

    id: int = 0


class Ready(msgspec.Struct, tag="ready", tag_field="type", frozen=True):
    """Every tag is fetched."""


class Expecting(msgspec.Struct, tag="expecting", tag_field="type", frozen=True):
    """The answer to Expect: it may come, or why not."""

    reason: str = ""
    id: int = 0


class Linked(msgspec.Struct, tag="linked", tag_field="type", frozen=True):
    """The backend is there, and fenced if that was asked."""


class LetGo(msgspec.Struct, tag="let_go", tag_field="type", frozen=True):
    """The answer to Lost: nothing waits for the old backend any more."""

    id: int = 0


class PoolChanged(msgspec.Struct, tag="pool_changed", tag_field="type", frozen=True):
    """The answer to NewPool: it is in use, or why not."""

    reason: str = ""
    id: int = 0


class Standing(msgspec.Struct, tag="standing", tag_field="type", frozen=True):
    """The answer to Report; every message before it was meant for the earlier supervisor."""

    fetched: bool
    token: str
    """Of the backend that it serves or expects, hexadecimal; empty if none."""
    linked: bool | None = None
    """Whether that backend is there, as of `Linked`; None: a worker of an earlier version, which does not say."""
    id: int = 0
    knows_new_pool: bool = False
    """Whether it understands NewPool; not so a worker of an earlier version."""


class Cut(msgspec.Struct, tag="cut", tag_field="type", frozen=True):
    """The backend broke the protocol; what it holds stays with it until Lost."""

    reason: str


class HungUp(msgspec.Struct, tag="hung_up", tag_field="type", frozen=True):
    """The connection of the backend that served has ended.  It may be dead; if not, it must not go on."""


class Silent(msgspec.Struct, tag="silent", tag_field="type", frozen=True):
    """A request has waited longer than io_timeout_s; the device's policy is to go on waiting."""


class Absent(msgspec.Struct, tag="absent", tag_field="type", frozen=True):
    """There has been no backend for as long as the device waits: requests fail until the next one."""


class Fault(msgspec.Struct, tag="fault", tag_field="type", frozen=True):
    """The worker stops, and why."""

    reason: str


ToWorker = Expect | Lost | NewPool | GiveUp | Report
FromWorker = (
    Ready | Expecting | Linked | LetGo | PoolChanged | Standing | Cut | HungUp | Silent | Absent | Fault
)
Question = Expect | Lost | NewPool | Report
Answer = Expecting | LetGo | PoolChanged | Standing
ANSWERS: dict[type[Question], type[Answer]] = {
    Expect: Expecting,
    Lost: LetGo,
    NewPool: PoolChanged,
    Report: Standing,
}
"""What a worker answers; a worker of an earlier version repeats no `id`."""
_encoder = msgspec.json.Encoder()
_to_worker: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker)
_from_worker: msgspec.json.Decoder[FromWorker] = msgspec.json.Decoder(FromWorker)


def send(sock: socket.socket, message: ToWorker | FromWorker, fd: int | None = None) -> None:
    """Send one message, with a descriptor if there is one (it stays open here).  Raises `OSError`."""
    packet = _encoder.encode(message)
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    sock.sendmsg([packet], rights)


def _receive(sock: socket.socket) -> tuple[bytes, int | None]:
    packet, fds, _flags, _address = socket.recv_fds(sock, MESSAGE_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC)
    return packet, fds[0] if fds else None


def receive_in_worker(sock: socket.socket) -> tuple[ToWorker | None, int | None]:
    """The next message and its descriptor; (None, None) when the supervisor is gone.  Raises `BlockingIOError`."""
    packet, fd = _receive(sock)
    return (_to_worker.decode(packet) if packet else None), fd


def receive_in_supervisor(sock: socket.socket) -> FromWorker | None:
    """The next message, None when the worker is gone.  Raises `BlockingIOError`."""
    try:
        packet, _ = _receive(sock)
    except ConnectionError:
        return None
    return _from_worker.decode(packet) if packet else None


def pair() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end and the worker's, non-blocking and close-on-exec."""
    return socket.socketpair(
        socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )
