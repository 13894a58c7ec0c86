"""A backend, in a process of its own, that records through the SDK where its writes landed.

For each write it reports over a pipe the region that it named and the data there when the SDK called it for the write;
the backend has not touched these bytes since `place` found them empty.
"""

import ctypes
import zlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from support.vm.process import Forked
from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties
from ublkpool.bufpool.sdk.serving import serve


class Landed(NamedTuple):
    """One write: its region, the addresses named and shown, whether it was zero before, the data's checksum."""

    offset: int
    length: int
    fua: bool
    named_address: int
    shown_address: int
    empty_before: bool
    checksum: int


class Recorder(Backend):
    """A disk in the backend's own segment; blocks are stored in reverse order, so that offset and address differ."""

    def __init__(self, size_bytes: int, report: "Connection[Landed, None]") -> None:
        super().__init__()
        self._size_bytes = size_bytes
        self._report = report
        self._empty: dict[int, bool] = {}
        self.flushes = 0

    def open(self, hint: Hint) -> Properties:
        return Properties(
            size_bytes=self._size_bytes,
            segment_bytes=2 * self._size_bytes,
            placement="backend",
            volatile_cache=True,
        )

    def started(self, device: Device) -> None:
        self._own = device.own
        self._base = _address(device.own)

    def place(self, offset: int, length: int, flags: int) -> int:
        region = self._size_bytes + offset
        self._empty[region] = not any(self._own[region : region + length])
        return region

    def store_placed(self, region: int, buf: memoryview, offset: int, fua: bool) -> None:
        checksum = zlib.crc32(self._own[region : region + len(buf)])
        named, shown = self._base + region, _address(buf)
        empty = self._empty.pop(region)
        self._report.send(Landed(offset, len(buf), fua, named, shown, empty, checksum))

    def pread(self, buf: memoryview, offset: int) -> None:
        start = self._size_bytes + offset
        buf[:] = self._own[start : start + len(buf)]


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def start_recorder(run_dir: Path, device: str, size_bytes: int, report: "Connection[Landed, None]") -> Forked:
    """Attach a recorder to a device."""
    backend = Recorder(size_bytes, report)
    return Forked(lambda: serve(backend, device=device, run_dir=run_dir, kind="recorder"))
