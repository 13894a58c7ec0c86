"""A disk whose chunks are objects of a store behind HTTP (docs/BACKENDS.md, "Remote stores"):

    ublkpool backend examples/rest_blocks.py --device demo host=127.0.0.1:8000 path=/disk1 size=1G

Requests for the same chunk never run at once, so GET, change and PUT need no lock.  Each carries the generation; the
store answers 412 to one below the highest.  After a PUT without an answer the process ends: its successor repeats it.
"""

import http.client
import os

import msgspec

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties
from ublkpool.bufpool.sizes import ByteSize


class RestOptions(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    path: str
    size: ByteSize


class RestBlocks(Backend):
    Options, generation = RestOptions, 0
    parallel, exclusive_bytes = 16, 64 << 10

    def open(self, hint: Hint) -> Properties:
        identity = self.ask("GET", "identity")
        if not identity and not hint.may_create:
            raise BackendError(f"{self.options.path}: no disk, and this device has been served before")
        identity = identity or self.ask("PUT", "identity", os.urandom(16).hex().encode())
        seen = int(self.ask("GET", "generation") or 0)
        return Properties(size_bytes=self.options.size, identity=identity.decode(), generation_seen=seen)

    def started(self, device: Device) -> None:
        self.generation = device.generation
        self.ask("PUT", "generation", str(device.generation).encode())

    def pread(self, buf: memoryview, offset: int) -> None:
        self.each_chunk(buf, offset, is_write=False)

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        self.each_chunk(buf, offset, is_write=True)

    def each_chunk(self, buf: memoryview, offset: int, is_write: bool) -> None:
        try:
            while buf:
                number, start = divmod(offset, self.exclusive_bytes)
                chunk = bytearray(self.ask("GET", number) or self.exclusive_bytes)
                assert len(chunk) == self.exclusive_bytes, f"chunk {number} has {len(chunk)} bytes"
                part = memoryview(chunk)[start : start + len(buf)]
                target, source = (part, buf[: len(part)]) if is_write else (buf[: len(part)], part)
                target[:] = source
                if is_write:
                    self.ask("PUT", number, bytes(chunk))
                buf, offset = buf[len(part) :], offset + len(part)
        except Exception as error:
            print(f"ending, so that the successor sends the request again: {error!r}", flush=True)
            os._exit(1)

    def ask(self, method: str, name: object, body: bytes = b"") -> bytes:
        connection = http.client.HTTPConnection(self.options.host, timeout=60)
        headers = {"Generation": str(self.generation), "Connection": "close"}
        connection.request(method, f"{self.options.path}/{name}", body, headers)
        answer = connection.getresponse()
        if answer.status not in (200, 204) and (method, answer.status) != ("GET", 404):
            raise BackendError(f"{method} {self.options.path}/{name}: {answer.status} {answer.reason}")
        return body or (answer.read() if answer.status == 200 else b"")
