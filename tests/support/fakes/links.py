"""The worker's end of a queue's link, over frames and through rings, for tests.

The rings here follow docs/PROTOCOL.md and use none of the code that both real ends share, so each checks the other.
"""

import array
import fcntl
import mmap
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from support.fakes.descriptors import is_readable
from support.fakes.shared_words import load_word, store_word
from ublkpool.bufpool import wire

ENTRIES = 64
CONTROL_BYTES = 4096
TO_BACKEND, TO_WORKER = 0, 2048
TAIL, HEAD, SLEEPING = 0, 64, 128
ROOM_DEADLINE_S = 60.0
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class FakeLink(Protocol):
    """One queue's link of a fake worker."""

    def expect(self, token: bytes) -> None: ...
    def send_frame(self, frame: bytes) -> None: ...
    def receive_frame(self, deadline_s: float) -> bytes: ...
    def is_silent(self, for_s: float) -> bool: ...
    def restart(self) -> None: ...
    def end(self) -> None: ...


class FakeFrames:
    """A ROUTER."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", path: Path) -> None:
        self.token = b""
        self._earlier: set[bytes] = set()
        self._frame: bytes | None = None
        self._context, self._path = context, path
        self._router = self._bind()

    def _bind(self) -> "zmq.Socket[bytes]":
        router = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # A socket made here, because ZeroMQ's thread would remove its file late, and then the file of the next socket.
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self._path))
        listener.listen()
        router.setsockopt(zmq.USE_FD, listener.detach())
        router.bind(f"ipc://{self._path}")
        return router

    def expect(self, token: bytes) -> None:
        """Expect the backend with this token; frames of earlier ones, which may still arrive, are dropped."""
        self._earlier.add(self.token)
        self.token, self._frame = token, None

    def send_frame(self, frame: bytes) -> None:
        self._router.send_multipart([self.token, frame])

    def _arrives(self, within_s: float) -> bool:
        deadline_s = time.monotonic() + within_s
        while self._frame is None:
            if not self._router.poll(int(1000 * max(0.0, deadline_s - time.monotonic()))):
                return False
            identity, frame = self._router.recv_multipart()
            if identity not in self._earlier:
                assert identity == self.token
                self._frame = frame
        return True

    def receive_frame(self, deadline_s: float) -> bytes:
        if not self._arrives(deadline_s):
            raise TimeoutError(f"the backend said nothing for {deadline_s} s")
        assert self._frame is not None
        frame, self._frame = self._frame, None
        return frame

    def is_silent(self, for_s: float) -> bool:
        return not self._arrives(for_s)

    def restart(self) -> None:
        self._router.close()
        self._router, self._frame = self._bind(), None

    def end(self) -> None:
        self._router.close()


def sealed_memory(size_bytes: int, seals: int = _SEALS) -> int:
    """A memfd sealed against shrinking and growing."""
    file = os.memfd_create("test-rings", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size_bytes)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def say_opened(connection: socket.socket, entries: int, files: list[int]) -> None:
    """The worker's answer with the rings."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
    connection.sendmsg([msgspec.json.encode(wire.RingOpened(entries=entries))], [rights])


class FakeRings:
    """A listener, and the rings of the last backend that asked."""

    def __init__(self, path: Path, entries: int = ENTRIES) -> None:
        self.token = b""
        self.entries = entries
        self.memory: mmap.mmap | None = None
        self.connection: socket.socket | None = None
        self._path = path
        self._listener = self._listen()
        self._bell_in = self._bell_out = -1
        self._written = self._read = self.begun = 0

    def _listen(self) -> socket.socket:
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(self._path))
        listener.listen()
        return listener

    def expect(self, token: bytes) -> None:
        """Expect the backend with this token; forget the rings of the last one."""
        self.hang_up()
        self.token = token

    def hear_question(self, deadline_s: float) -> socket.socket:
        """Wait for the backend to ask for its rings."""
        self._listener.settimeout(deadline_s)
        connection, _ = self._listener.accept()
        connection.settimeout(deadline_s)
        asked = msgspec.json.decode(connection.recv(4096), type=wire.OpenRing)
        assert (asked.v, asked.token) == (wire.PROTOCOL_VERSION, self.token.hex())
        return connection

    def accept(self, deadline_s: float) -> None:
        """Wait for the backend and hand it its rings."""
        self.connection = self.hear_question(deadline_s)
        size_bytes = CONTROL_BYTES + 2 * self.entries * wire.DESCRIPTOR_BYTES
        file = sealed_memory(size_bytes)
        self.memory = mmap.mmap(file, size_bytes)
        self._begin()
        self._bell_in, self._bell_out = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        say_opened(self.connection, self.entries, [file, self._bell_out, self._bell_in])
        os.close(file)

    def _begin(self) -> None:
        # Just below the wrap-around, so that indexes wrap in every test.
        self._written = self._read = self.begun = -self.entries & 0xFFFFFFFF
        for at in (TAIL, HEAD):
            self.put(TO_BACKEND + at, self.begun)
            self.put(TO_WORKER + at, self.begun)

    @property
    def bell_rang(self) -> bool:
        """Whether the backend has rung the doorbell and this end has not read it yet."""
        return is_readable(self._bell_in)

    def hear_bell(self) -> None:
        """Read the doorbell, if the backend has rung it."""
        if self.bell_rang:
            os.eventfd_read(self._bell_in)

    def get(self, at: int) -> int:
        """A number in the control page."""
        assert self.memory is not None
        return load_word(self.memory, at)

    def put(self, at: int, value: int) -> None:
        assert self.memory is not None
        store_word(self.memory, at, value)

    def _entry(self, direction: int, index: int) -> slice:
        first = CONTROL_BYTES + (self.entries * wire.DESCRIPTOR_BYTES if direction == TO_WORKER else 0)
        start = first + index % self.entries * wire.DESCRIPTOR_BYTES
        return slice(start, start + wire.DESCRIPTOR_BYTES)

    def send_frame(self, frame: bytes) -> None:
        assert self.memory is not None and len(frame) % wire.DESCRIPTOR_BYTES == 0
        self._wait_for_room(len(frame) // wire.DESCRIPTOR_BYTES)
        for start in range(0, len(frame), wire.DESCRIPTOR_BYTES):
            entry = frame[start : start + wire.DESCRIPTOR_BYTES]
            self.memory[self._entry(TO_BACKEND, self._written)] = entry
            self._written = (self._written + 1) & 0xFFFFFFFF
        self.publish(self._written)

    def _wait_for_room(self, count: int) -> None:
        deadline_s = time.monotonic() + ROOM_DEADLINE_S
        while self.unread() + count > self.entries:
            assert time.monotonic() < deadline_s, f"the backend makes no room for {count} entries"
            time.sleep(0.001)

    def wait_until_read(self) -> None:
        """Wait until the backend has read all that was sent."""
        self._wait_for_room(self.entries)

    def unread(self) -> int:
        """The number of entries that the backend has not read."""
        return (self._written - self.get(TO_BACKEND + HEAD)) & 0xFFFFFFFF

    def publish(self, tail: int) -> None:
        """Let the backend see entries up to `tail`."""
        self.put(TO_BACKEND + TAIL, tail)
        # A system call with a lock in the kernel is a full barrier; Python has no other.
        os.sched_yield()
        if self.get(TO_BACKEND + SLEEPING):
            self.put(TO_BACKEND + SLEEPING, 0)
            os.eventfd_write(self._bell_out, 1)

    def take(self) -> bytes:
        assert self.memory is not None
        waiting = (self.get(TO_WORKER + TAIL) - self._read) & 0xFFFFFFFF
        assert waiting <= self.entries
        frame = b"".join(
            self.memory[self._entry(TO_WORKER, self._read + number)] for number in range(waiting)
        )
        self._read = (self._read + waiting) & 0xFFFFFFFF
        self.put(TO_WORKER + HEAD, self._read)
        return frame

    def _sleeps_until_something_waits(self, for_s: float) -> bool:
        deadline_s = time.monotonic() + for_s
        while not self._waits():
            self.put(TO_WORKER + SLEEPING, 1)
            os.sched_yield()
            left_s = 0 if self._waits() else max(0.0, deadline_s - time.monotonic())
            heard = is_readable(self._bell_in, left_s)
            self.put(TO_WORKER + SLEEPING, 0)
            # A doorbell may come late, for entries that were read already.
            if heard:
                os.eventfd_read(self._bell_in)
            elif not self._waits():
                return False
        return True

    def _waits(self) -> bool:
        return self.get(TO_WORKER + TAIL) != self._read

    def receive_frame(self, deadline_s: float) -> bytes:
        if self.connection is None:
            self.accept(deadline_s)
        if not self._sleeps_until_something_waits(deadline_s):
            raise TimeoutError(f"the backend said nothing for {deadline_s} s")
        return self.take()

    def is_silent(self, for_s: float) -> bool:
        return not self._sleeps_until_something_waits(for_s)

    def restart(self) -> None:
        self.end()
        self._listener = self._listen()

    def hang_up(self) -> None:
        """End the link and go on listening."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
            for bell in (self._bell_in, self._bell_out):
                os.close(bell)
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def end(self) -> None:
        self.hang_up()
        self._listener.close()
        with suppress(FileNotFoundError):
            self._path.unlink()
