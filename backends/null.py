"""Answers at once and stores nothing, to measure what the path to a backend costs.

Owns nothing.  Reads return whatever the buffer held, writes are dropped.  The native engine does everything: over rings
without Python, over ZeroMQ Python runs once for a batch.
"""

from typing import Literal

import msgspec

from ublkpool.bufpool.engine.native import NativeEngine, NullStorage
from ublkpool.bufpool.sdk.backend import Backend, Device, FrameEngine, Hint, Properties
from ublkpool.bufpool.sdk.inside import Growth
from ublkpool.bufpool.sdk.properties import Inside
from ublkpool.bufpool.sizes import ByteSize
from ublkpool.bufpool.wire import Identity


class NullOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`size` 0 takes the size that the device was created with; `segment` is for placement `backend`."""

    size: ByteSize = 0
    placement: Literal["auto", "pool", "backend", "any"] = "auto"
    segment: ByteSize = 64 << 20


class NullBackend(Backend):
    """Answers at once and stores nothing."""

    Options = NullOptions
    stores_data = False

    def __init__(self, options: NullOptions) -> None:
        self.options: NullOptions = options

    def open(self, hint: Hint) -> Properties:
        """Nothing to open."""
        options = self.options
        placement = hint.placement if options.placement == "auto" else options.placement
        everything = options.size or (1 << 40)
        return Properties(
            size_bytes=max(options.size, hint.resized_bytes) if options.size else 0,
            discard_granularity_bytes=4096,
            discard_max_bytes=everything,
            write_zeroes_max_bytes=everything,
            placement=placement,
            segment_bytes=options.segment if placement != "pool" else 0,
            identity=Identity(value="null", store="nothing: null stores no data", ends_with_device=True),
        )

    def resize(self, size_bytes: int) -> None:
        """Nothing to grow."""

    def engine(self, device: Device) -> FrameEngine:
        """The native engine on nothing."""
        return NativeEngine(device, NullStorage())

    def grow_inside(self, growth: Growth) -> None:
        """Nothing to grow."""

    def open_inside(self, hint: Hint, kept: int | None) -> Inside:
        """Nothing to open for a device's workers, either; see `bufpool/sdk/inside.py`."""
        return Inside(self.open(hint), NullStorage())
