"""The layer `log`: every request in a file, from which `replay.py` brings a store to the same content."""

import os
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Device, Hint, Properties, log
from ublkpool.bufpool.sdk.layers.layer import Layer, Plain
from ublkpool.bufpool.sdk.layers.trace import Operation, Start, Traced, encode, with_data
from ublkpool.bufpool.sizes import ByteSize


class LogOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`data=off` leaves out what was written: such a trace shows requests and cannot be replayed.

    A file that would become larger than `limit` ends the trace, not the device.
    """

    file: Path
    data: bool = True
    limit: ByteSize = 1 << 30


class Log(Layer):
    """Appends each request to the file when it is done, before it is answered."""

    Options = LogOptions

    def __init__(self, options: LogOptions, *, inner: Plain) -> None:
        super().__init__(options, inner=inner)
        self._file, self._records_data, self._limit = options.file, options.data, options.limit
        self._fd = -1
        self._began_s = 0.0
        self._lock = threading.Lock()

    def open(self, hint: Hint) -> Properties:
        """See `Layer.open`.  Raises `BackendError` if the file cannot be written."""
        try:
            self._fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BackendError(f"layer log: {self._file}: {error.strerror}") from error
        return super().open(hint)

    def started(self, device: Device) -> None:
        """See `Layer.started`."""
        self._began_s = time.monotonic()
        self._append(encode(Start(device.name, device.size_bytes)))
        super().started(device)

    def pread(self, buf: memoryview, offset: int) -> int | None:
        """See `Layer.pread`."""
        return self._traced(
            Traced(at=self._now(), op="read", offset=offset, length=len(buf)),
            lambda: self.inner.pread(buf, offset),
            buf,
        )

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> int | None:
        """See `Layer.pwrite`."""
        data = with_data(buf) if self._records_data else ""
        record = Traced(at=self._now(), op="write", offset=offset, length=len(buf), fua=fua, data=data)
        return self._traced(record, lambda: self.inner.pwrite(buf, offset, fua))

    def flush(self) -> None:
        """See `Layer.flush`."""
        self._traced(Traced(at=self._now(), op="flush"), self.inner.flush)

    def trim(self, offset: int, length: int) -> None:
        """See `Layer.trim`."""
        self._done("trim", offset, length, lambda: self.inner.trim(offset, length))

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """See `Layer.zero`."""
        self._done("zero", offset, length, lambda: self.inner.zero(offset, length, may_unmap))

    def _done(self, op: Operation, offset: int, length: int, call: Callable[[], None]) -> None:
        self._traced(Traced(at=self._now(), op=op, offset=offset, length=length), call)

    def _now(self) -> float:
        return round(time.monotonic() - self._began_s, 6)

    def _traced(
        self, record: Traced, call: Callable[[], int | None], read: memoryview | None = None
    ) -> int | None:
        try:
            result = call()
        except OSError as error:
            self._append(encode(msgspec.structs.replace(record, result=-(error.errno or 5))))
            raise
        moved = record.length if result is None and record.op in ("read", "write") else result or 0
        checksum = 0 if read is None else zlib.crc32(read[:moved])
        self._append(encode(msgspec.structs.replace(record, result=moved, checksum=checksum)))
        return result

    def _append(self, line: bytes) -> None:
        with self._lock:
            if self._fd < 0:
                return
            try:
                if os.fstat(self._fd).st_size + len(line) > self._limit:
                    self._end(f"it reached its limit of {self._limit} bytes")
                elif os.write(self._fd, line) < len(line):
                    self._end("no room")
            except OSError as error:
                self._end(str(error.strerror))

    def _end(self, reason: str) -> None:
        log.error("layer log: %s: the trace ends here: %s", self._file, reason)
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        """See `Layer.close`."""
        super().close()
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
