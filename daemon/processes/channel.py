"""A connection to another of the daemon's processes: JSON messages, one a packet, with descriptors, and questions.

Used for workers, the pool broker and the holder.  Owns the socket, the coding of messages and the open questions; a
question has an `id`, which its answer repeats (`questions.py` says what holds for a process of an earlier version).
The caller sets the deadlines, since it decides whether a late process must end.  Runs on the supervisor's asyncio
loop.

Other connections have protocols of their own: the admin socket carries lines of JSON over a stream, the keeper of a
memory disk runs without this package, an attach connection follows the public docs/PROTOCOL.md, and a control command's
process writes its one answer to a pipe before it ends.
"""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

import msgspec

from ublkpool.bufpool.packets import receive_packet, send_packet
from ublkpool.daemon.processes.questions import Questions
from ublkpool.daemon.processes.readable import readable

S = TypeVar("S", bound=msgspec.Struct)
H = TypeVar("H")
PACKET_BYTES_MAX = 65536
_encoder = msgspec.json.Encoder()


class Channel(Generic[S, H]):
    """This end of the connection: messages of type `S` are sent, messages of type `H` are received."""

    def __init__(self, sock: socket.socket, decode: Callable[[bytes], H]) -> None:
        """Takes `sock` over, a SOCK_SEQPACKET socket; `decode` turns a packet into a message."""
        self._sock = sock
        self._decode = decode
        self._questions: Questions[H] = Questions()

    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        return self._sock.fileno()

    def send(self, message: S, fd: int | None = None) -> None:
        """Send a message, with a duplicate of `fd`.  Raises `OSError`: the process is gone, or does not read."""
        send_packet(self._sock, _encoder.encode(message), fd)

    def ask(
        self, question: S, kind: type[object] = object, fd: int | None = None, *, repeats_ids: bool = True
    ) -> "asyncio.Future[H]":
        """Send a question; its answer, of type `kind`, once `answer` has been called with it.  Raises `OSError`.

        With `repeats_ids` false no `id` is sent: a process of an earlier version refuses fields that it does not know.
        """
        number, answer = self._questions.ask(kind)
        try:
            self.send(msgspec.structs.replace(question, id=number if repeats_ids else 0), fd)
        except OSError:
            self._questions.unask(number)
            raise
        return answer

    def answer(self, number: int, message: H) -> None:
        """This message answers question `number`, 0 if it does not say which; a late one answers nothing."""
        self._questions.answer(number, message)

    def receive(self) -> H | None:
        """The next message; None at the end of the connection.

        Raises `BlockingIOError` if none has come, and what `decode` raises.
        """
        return self.receive_with_descriptor()[0]

    def receive_with_descriptor(self) -> tuple[H | None, int | None]:
        """The next message and its descriptor, as `receive`; the descriptor is the caller's."""
        try:
            packet, fd = receive_packet(self._sock, PACKET_BYTES_MAX)
        except ConnectionError:
            return None, None
        return (self._decode(packet) if packet else None), fd

    async def readable(self) -> None:
        """Return when a message or the end of the connection can be received."""
        await readable(self._sock)

    @contextmanager
    def timeout(self, timeout_s: float) -> Iterator[None]:
        """For the length of the block, `send` and `receive` wait for at most `timeout_s`; then `TimeoutError`."""
        before_s = self._sock.gettimeout()
        self._sock.settimeout(timeout_s)
        try:
            yield
        finally:
            self._sock.settimeout(before_s)

    def hang_up(self) -> None:
        """End the connection in both directions; the socket stays open, and readable."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
