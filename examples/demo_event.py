"""Answers many requests at once from another thread, an asyncio event loop that waits before each answer.

    ublkpool backend examples/demo_event.py --device demo delay_ms=5
    ublkpool backend examples/demo_event.py --device demo placement=backend

`submit` only starts requests; `complete` may be called from any thread, in any order.  The data lives in this process
and dies with it, which `survives_death` declares: the daemon then fails the device.  A backend for real data answers a
write only when the data is outside the process.
"""

import asyncio
import threading
from collections.abc import Sequence
from typing import Literal

import msgspec

from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties, Request, perform
from ublkpool.bufpool.sdk.slots import Slots
from ublkpool.bufpool.sizes import ByteSize


class DemoEventOptions(msgspec.Struct, frozen=True, kw_only=True):
    size: ByteSize = 64 << 20
    delay_ms: float = 1.0
    placement: Literal["pool", "backend"] = "pool"
    segment: ByteSize = 16 << 20


class DemoEvent(Backend):
    Options = DemoEventOptions
    survives_death = False

    def __init__(self, options: DemoEventOptions) -> None:
        self.options: DemoEventOptions = options
        self.disk = bytearray(options.size)

    def open(self, hint: Hint) -> Properties:
        options = self.options
        return Properties(
            size_bytes=options.size,
            placement=options.placement,
            segment_bytes=options.segment if options.placement == "backend" else 0,
        )

    def started(self, device: Device) -> None:
        self.slots = Slots(len(device.own), device.max_io_bytes)
        self.events = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.events.run_forever)
        self.thread.start()

    def submit(self, batch: Sequence[Request]) -> None:
        for request in batch:
            asyncio.run_coroutine_threadsafe(self.answer(request), self.events)

    async def answer(self, request: Request) -> None:
        await asyncio.sleep(self.options.delay_ms / 1000)
        try:
            request.complete(perform(self, request))
        except Exception as error:
            request.fail(error)

    def pread(self, buf: memoryview, offset: int) -> None:
        buf[:] = self.disk[offset : offset + len(buf)]

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        self.disk[offset : offset + len(buf)] = buf

    def place(self, offset: int, length: int, flags: int) -> int | None:
        return self.slots.take()

    def released(self, region: int) -> None:
        self.slots.give(region)

    def close(self) -> None:
        if hasattr(self, "thread"):
            self.events.call_soon_threadsafe(self.events.stop)
            self.thread.join()
            self.events.close()
