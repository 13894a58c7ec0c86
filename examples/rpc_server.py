"""The server of `rpc_store.py`: a disk in a file, behind a ZeroMQ socket.

python examples/rpc_server.py ENDPOINT FILE SIZE
"""

import errno
import os
import sys
from pathlib import Path

import zmq
from rpc_store import ABOUT, ASK_ABOUT, HEAD, REPLY, SENDER

from ublkpool.bufpool.sdk.claim import open_alone
from ublkpool.bufpool.sizes import parse_size
from ublkpool.bufpool.wire import Op

HEADER_BYTES = 4096
"""The file's first part: identity and highest generation; then the disk's bytes."""


class Store:
    """The file, and the newest connection that may change it."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        if not path.exists():
            create(path, size_bytes)
        # O_DSYNC: what is answered survives a power failure here, so the device needs no FLUSH.
        self.file = open_alone(path, os.O_RDWR | os.O_DSYNC | os.O_CLOEXEC)
        self.size_bytes = path.stat().st_size - HEADER_BYTES
        head = os.pread(self.file, 24, 0)
        self.identity, self.newest = head[:16], (int.from_bytes(head[16:], "little"), 0)

    def admits(self, sender: tuple[int, int]) -> bool:
        """Whether no newer connection is known; a higher generation is on disk before anything else happens."""
        if sender < self.newest:
            return False
        if sender[0] > self.newest[0]:
            os.pwrite(self.file, sender[0].to_bytes(8, "little"), 16)
        self.newest = sender
        return True

    def execute(self, op: int, offset: int, length: int, data: memoryview) -> tuple[int, bytes]:
        """The result and a read's data.  Raises `OSError`."""
        if offset + length > self.size_bytes:
            return -errno.EINVAL, b""
        at = HEADER_BYTES + offset
        if op == Op.READ:
            return length, os.pread(self.file, length, at)
        if op == Op.WRITE:
            os.pwrite(self.file, data, at)
        elif op in (Op.DISCARD, Op.WRITE_ZEROES):
            for start in range(0, length, 1 << 20):
                os.pwrite(self.file, bytes(min(1 << 20, length - start)), at + start)
        return (length if op == Op.WRITE else 0), b""

    def answer(self, sender: bytes, message: memoryview) -> bytes | None:
        """The answer to one message; None for a connection that is not to be heard any more."""
        op, _, number, offset, length = HEAD.unpack_from(message)
        if op == ASK_ABOUT:
            return REPLY.pack(number, 0) + ABOUT.pack(self.size_bytes, self.newest[0], self.identity)
        _, generation, connection = SENDER.unpack(sender)
        if not self.admits((generation, connection)):
            return None
        try:
            result, data = self.execute(op, offset, length, message[HEAD.size :])
        except OSError as error:
            result, data = -(error.errno or errno.EIO), b""
        return REPLY.pack(number, result) + data


def create(path: Path, size_bytes: int) -> None:
    """A new store, which appears under its name when it is whole."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.truncate(HEADER_BYTES + size_bytes)
        file.write(os.urandom(16))
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


def serve(endpoint: str, store: Store) -> None:
    """Answer requests, in the order in which they come, for ever."""
    router = zmq.Context().socket(zmq.ROUTER)
    router.sndhwm = router.rcvhwm = 0
    router.bind(endpoint)
    print(f"serving {store.size_bytes} bytes at {endpoint}", flush=True)
    while True:
        sender, message = router.recv_multipart(copy=False)
        answer = store.answer(sender.bytes, message.buffer)
        if answer is not None:
            router.send_multipart([sender.bytes, answer])


if __name__ == "__main__":
    serve(sys.argv[1], Store(Path(sys.argv[2]), parse_size(sys.argv[3])))
