"""The smallest backend: every read is zeros, every write is forgotten.

    ublkpool backend examples/demo_null.py --device demo
    ublkpool backend examples/demo_null.py --device demo placement=backend

With placement `backend` it names the memory that each write lands in: a slot of a segment of its own.
"""

from typing import Literal

import msgspec

from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties
from ublkpool.bufpool.sdk.slots import Slots
from ublkpool.bufpool.sizes import ByteSize


class DemoNullOptions(msgspec.Struct, frozen=True, kw_only=True):
    size: ByteSize = 1 << 30
    placement: Literal["pool", "backend"] = "pool"
    segment: ByteSize = 16 << 20


class DemoNull(Backend):
    Options = DemoNullOptions
    stores_data = False

    def __init__(self, options: DemoNullOptions) -> None:
        self.options: DemoNullOptions = options

    def open(self, hint: Hint) -> Properties:
        options = self.options
        return Properties(
            size_bytes=options.size,
            placement=options.placement,
            segment_bytes=options.segment if options.placement == "backend" else 0,
        )

    def started(self, device: Device) -> None:
        self.slots = Slots(len(device.own), device.max_io_bytes)

    def pread(self, buf: memoryview, offset: int) -> None:
        buf[:] = bytes(len(buf))

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        pass

    def place(self, offset: int, length: int, flags: int) -> int | None:
        return self.slots.take()

    def released(self, region: int) -> None:
        self.slots.give(region)
