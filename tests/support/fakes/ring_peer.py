"""A backend's end of a queue's rings, in plain Python; it can also break the protocol.

Owns the connection, the memory and both doorbells.
"""

import json
import mmap
import os
import random
import socket
from pathlib import Path
from types import TracebackType

from support.fakes.descriptors import is_readable
from support.fakes.shared_words import load_word, store_word

ENTRY_BYTES = 64
CONTROL_BYTES = 4096
TO_BACKEND, TO_WORKER = 0, CONTROL_BYTES // 2
TAIL, HEAD, SLEEPING = 0, 64, 128
WAIT_S = 60.0
_MASK = 0xFFFFFFFF


class RingMemory:
    """The shared memory, and this end's indexes."""

    def __init__(self, memory_fd: int, entries: int) -> None:
        self.entries = entries
        self.size_bytes = os.fstat(memory_fd).st_size
        self.memory = mmap.mmap(memory_fd, self.size_bytes)
        self._read, self._written = self.index(TO_BACKEND, HEAD), self.index(TO_WORKER, TAIL)

    def index(self, ring: int, name: int) -> int:
        return load_word(self.memory, ring + name)

    def set_index(self, ring: int, name: int, value: int) -> None:
        store_word(self.memory, ring + name, value)

    def _slot(self, ring: int, index: int) -> int:
        start = CONTROL_BYTES + (self.entries * ENTRY_BYTES if ring == TO_WORKER else 0)
        return start + index % self.entries * ENTRY_BYTES

    def put(self, frame: bytes) -> None:
        """Write and publish entries for the worker, without ringing the doorbell."""
        self._written = self.put_at(TO_WORKER, self._written, frame)

    def put_at(self, ring: int, tail: int, frame: bytes) -> int:
        """Write and publish entries at `tail`; returns the new tail."""
        for start in range(0, len(frame), ENTRY_BYTES):
            at = self._slot(ring, tail)
            self.memory[at : at + ENTRY_BYTES] = frame[start : start + ENTRY_BYTES]
            tail += 1
        self.set_index(ring, TAIL, tail)
        return tail

    def waiting(self, ring: int) -> int:
        """The number of published entries that are not yet read."""
        return (self.index(ring, TAIL) - self.index(ring, HEAD)) & _MASK

    def kinds(self, ring: int) -> list[int]:
        """The kinds of the published entries that are not yet read."""
        head = self.index(ring, HEAD)
        return [self.memory[self._slot(ring, head + n)] for n in range(self.waiting(ring))]

    def scribble(self, ring: int, rng: random.Random) -> None:
        """Write into free slots without publishing, as a writer that dies before it publishes does."""
        tail = self.index(ring, TAIL)
        for index in range(tail, tail + min(2, self.entries - self.waiting(ring))):
            at = self._slot(ring, index & _MASK)
            self.memory[at : at + ENTRY_BYTES] = rng.randbytes(ENTRY_BYTES)

    def lie_ahead(self) -> None:
        """Publish more entries for the worker than a ring holds."""
        self.set_index(TO_WORKER, TAIL, self.index(TO_WORKER, HEAD) + self.entries + 1)

    def unread(self) -> int:
        """The number of entries that the worker has not read."""
        return (self._written - self.index(TO_WORKER, HEAD)) & _MASK

    def take(self, count: int = _MASK, *, tell: bool = True) -> bytes:
        """Read at most `count` published entries; only with `tell` does the worker learn that their slots are free."""
        frame = b""
        while self._read & _MASK != self.index(TO_BACKEND, TAIL) and count:
            at = self._slot(TO_BACKEND, self._read)
            frame += self.memory[at : at + ENTRY_BYTES]
            self._read += 1
            count -= 1
        if tell:
            self.set_index(TO_BACKEND, HEAD, self._read)
        return frame


class RingPeer:
    """Connected, and with `rings` after `open`."""

    rings: RingMemory

    def __init__(self, path: Path, token: bytes) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.settimeout(WAIT_S)
        self.connection.connect(str(path))
        self._token = token
        self._fds: list[int] = []

    def __enter__(self) -> "RingPeer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, **fields: object) -> bytes:
        """The worker's answer; b"" if it disconnects."""
        question = {"type": "ring", "v": 1, "token": self._token.hex(), **fields}
        self.connection.send(json.dumps(question).encode())
        try:
            packet, self._fds, _, _ = socket.recv_fds(self.connection, 4096, 4)
        except ConnectionResetError:
            return b""
        return packet

    def open(self) -> None:
        """Ask for rings, and map them."""
        answer = json.loads(self.ask())
        assert answer["type"] == "ring_open"
        self.memory_fd, self.bell, self.worker_bell = self._fds
        self.rings = RingMemory(self.memory_fd, int(answer["entries"]))

    def send(self, frame: bytes) -> None:
        """Write entries, and ring if the worker sleeps."""
        self.rings.put(frame)
        if self.rings.index(TO_WORKER, SLEEPING):
            self.rings.set_index(TO_WORKER, SLEEPING, 0)
            self.ring()

    def ring(self) -> None:
        os.eventfd_write(self.worker_bell, 1)

    def receive(self) -> bytes:
        """Sleep until an entry comes."""
        while True:
            self.rings.set_index(TO_BACKEND, SLEEPING, 1)
            if frame := self.rings.take():
                self.rings.set_index(TO_BACKEND, SLEEPING, 0)
                return frame
            assert is_readable(self.bell, WAIT_S), "the doorbell does not ring"
            os.eventfd_read(self.bell)

    def hears_the_end(self) -> bool:
        """Wait until the worker disconnects."""
        try:
            return self.connection.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.connection.close()
        for fd in self._fds:
            os.close(fd)
        if self._fds:
            self.rings.memory.close()
        self._fds = []
