"""The layer `fault`: a store that fails, is slow, tears and loses writes, and a process that dies; seeded.

The same seed does the same to the same requests.  With `hold` the disk has a volatile cache, as real disks do: writes
are answered before they are stored, and a flush stores them.  What it holds is lost when the process dies, which is
what this layer is for: it breaks the promise of backends on purpose, as a power failure would.
"""

import errno
import os
import random
import signal
import threading
import time
from typing import Annotated, NamedTuple

import msgspec

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Device, Hint, Properties, log
from ublkpool.bufpool.sdk.layers.layer import Layer, Plain
from ublkpool.bufpool.sizes import ByteSize

Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
SECTOR_BYTES = 512
_ORDER_BYTES = 4096


class FaultOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Probabilities are for each request: 0.01 is one in a hundred.

    `eio` fails it.  `delay` is the most seconds that one waits.  `die` kills the process at that request, `die_rate` at
    any; it dies before, after or, with `torn`, in the midst of a write, of which some sectors are then stored.  `hold`
    keeps that many bytes of writes until a flush; with `reorder` they are stored in any order that the blocks allow,
    and a death stores any part of them.
    """

    seed: int = 0
    eio: Probability = 0.0
    delay: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0
    die: Annotated[int, msgspec.Meta(ge=0)] = 0
    die_rate: Probability = 0.0
    torn: bool = False
    hold: ByteSize = 0
    reorder: bool = False

    def __post_init__(self) -> None:
        if self.reorder and not self.hold:
            raise ValueError(
                "reorder=on needs hold=SIZE, for only writes that are held can change their order"
            )


class _Held(NamedTuple):
    offset: int
    data: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


def kill_this_process() -> None:
    """End as by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


class Fault(Layer):
    """Does to requests what the options say."""

    Options = FaultOptions

    def __init__(self, options: FaultOptions, *, inner: Plain) -> None:
        super().__init__(options, inner=inner)
        self._faults = options
        self._random = random.Random(options.seed)
        self._lock = threading.RLock()
        self._held: list[_Held] = []
        self._held_bytes = self._requests = 0

    def open(self, hint: Hint) -> Properties:
        """See `Layer.open`; with `hold` the disk has a volatile cache."""
        properties = super().open(hint)
        if self._faults.hold:
            properties = msgspec.structs.replace(properties, volatile_cache=True)
        return properties

    def started(self, device: Device) -> None:
        """See `Layer.started`.  Each process of a device has faults of its own."""
        self._random.seed(f"{self._faults.seed} {device.generation}")
        log.warning("%s: the layer fault breaks it on purpose", device.name)
        super().started(device)

    def pread(self, buf: memoryview, offset: int) -> int | None:
        """See `Layer.pread`; held writes are seen."""
        self._begin()
        with self._lock:
            result = self.inner.pread(buf, offset)
            for each in self._held:
                start, end = max(offset, each.offset), min(offset + len(buf), each.end)
                if start < end:
                    buf[start - offset : end - offset] = each.data[start - each.offset : end - each.offset]
            return result

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> int | None:
        """See `Layer.pwrite`."""
        self._begin(_Held(offset, bytes(buf)))
        with self._lock:
            if not self._faults.hold or fua:
                self._store_held()
                return self.inner.pwrite(buf, offset, fua)
            self._held.append(_Held(offset, bytes(buf)))
            self._held_bytes += len(buf)
            while self._held_bytes > self._faults.hold:
                self._store(self._held[0])
                self._held_bytes -= len(self._held.pop(0).data)
            return len(buf)

    def flush(self) -> None:
        """See `Layer.flush`; stores what is held."""
        self._begin()
        with self._lock:
            self._store_held()
            self.inner.flush()

    def trim(self, offset: int, length: int) -> None:
        """See `Layer.trim`."""
        self._begin()
        with self._lock:
            self._store_held()
            self.inner.trim(offset, length)

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """See `Layer.zero`."""
        self._begin()
        with self._lock:
            self._store_held()
            self.inner.zero(offset, length, may_unmap)

    def close(self) -> None:
        """See `Layer.close`; an orderly end stores what is held."""
        try:
            with self._lock:
                self._store_held()
        finally:
            super().close()

    def _begin(self, write: _Held | None = None) -> None:
        """The faults of one request, in one order, so that a seed always means the same."""
        options = self._faults
        with self._lock:
            self._requests += 1
            delay_s = self._random.random() * options.delay
            fails = self._random.random() < options.eio
            dies = self._random.random() < options.die_rate or self._requests == options.die
            if dies:
                self._die(write)
        if delay_s:
            time.sleep(delay_s)
        if fails:
            raise OSError(errno.EIO, f"the layer fault fails request {self._requests}")

    def _die(self, write: _Held | None) -> None:
        """Store a part of what is held, and of the write that is executing, then die."""
        if self._faults.reorder:
            for each in self._in_some_order():
                if self._random.random() < 0.5:
                    self._store(self._torn(each))
        if write is not None and self._random.random() < 0.5 and not self._faults.hold:
            self._store(self._torn(write))
        log.warning("the layer fault kills this process at request %d", self._requests)
        kill_this_process()
        raise BackendError("the layer fault killed this process")

    def _torn(self, write: _Held) -> _Held:
        """The write, or some sectors of it from its beginning."""
        sectors = len(write.data) // SECTOR_BYTES
        if not self._faults.torn or not sectors:
            return write
        return _Held(write.offset, write.data[: self._random.randint(0, sectors) * SECTOR_BYTES])

    def _store_held(self) -> None:
        held = self._in_some_order() if self._faults.reorder else list(self._held)
        for each in held:
            self._store(each)
        self._held.clear()
        self._held_bytes = 0

    def _in_some_order(self) -> list[_Held]:
        """What is held, shuffled; of two writes that share a block the later one stays the later one."""
        latest: dict[int, float] = {}
        keyed = []
        for number, each in enumerate(self._held):
            blocks = range(each.offset // _ORDER_BYTES, -(-each.end // _ORDER_BYTES))
            key = max([self._random.random(), *(latest.get(block, 0.0) for block in blocks)])
            latest.update(dict.fromkeys(blocks, key))
            keyed.append((key, number, each))
        return [each for _, _, each in sorted(keyed)]

    def _store(self, write: _Held) -> None:
        if write.data:
            moved = self.inner.pwrite(memoryview(write.data), write.offset, False)
            if moved is not None and moved < len(write.data):
                raise OSError(errno.EIO, f"only {moved} of {len(write.data)} bytes were stored")
