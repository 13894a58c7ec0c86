"""A disk of a read-only base and an overlay, which holds what was written; docs/COW.md has the file's format.

Any number of devices share a base, read through the page cache.  The overlay is locked as the backend `file` locks its
file (`bufpool/sdk/claim.py`), the base against writers.  For a device that was never served a missing overlay is made.
A write is answered when its data and the map are in the page cache, outside this process.
"""

import os
from pathlib import Path
from typing import Literal

import msgspec

from ublkpool.backends._cow_format import Head, read_head
from ublkpool.backends._cow_overlay import NewOverlay, Overlay, grown, make_overlay, open_overlay
from ublkpool.bufpool.engine.cow import BLOCK_BYTES, CowFiles, CowStorage
from ublkpool.bufpool.engine.native import NativeEngine, slot_bytes
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, FrameEngine, Hint, Properties, log
from ublkpool.bufpool.sdk.claim import refuse_own_disk
from ublkpool.bufpool.sdk.inside import Growth, refuse_another
from ublkpool.bufpool.sdk.properties import Inside
from ublkpool.bufpool.sdk.store_identity import identify
from ublkpool.bufpool.sizes import ByteSize, format_size

_CHANGE_BYTES_MAX = 1 << 30
"""Of one DISCARD or WRITE_ZEROES, which the map's states are set for at once."""


class CowOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`overlay` is made if it is missing, for which `base` is needed; later `base` may be left out.

    `size` (default: the base's) makes the disk larger than its base: the rest reads as zeros.
    """

    overlay: Path
    base: Path | None = None
    size: ByteSize = 0
    placement: Literal["auto", "pool", "backend", "any"] = "auto"
    segment: ByteSize = 64 << 20


class CowBackend(Backend):
    """A copy-on-write disk."""

    Options = CowOptions
    volumes = "ublkpool.backends._cow_volumes:CowVolumes"

    def __init__(self, options: CowOptions) -> None:
        self.options: CowOptions = options
        self._file = -1
        self._overlay: Overlay | None = None

    def open(self, hint: Hint) -> Properties:
        """Open and lock base and overlay, and read the map."""
        options = self.options
        for each in (options.overlay, options.base):
            if each is not None:
                refuse_own_disk(each, hint.node)
        size_bytes = hint.asked_bytes(options.size)
        if not options.overlay.exists():
            self._make(size_bytes, hint)
        try:
            head = self._open(0 if hint.takes_next else size_bytes, hint)
        except BaseException:
            self.close()
            raise
        overlay = self._overlay
        assert overlay is not None
        placement = hint.placement if options.placement == "auto" else options.placement
        return Properties(
            size_bytes=head.layout.size_bytes,
            volatile_cache=True,
            discard_granularity_bytes=BLOCK_BYTES,
            discard_max_bytes=_CHANGE_BYTES_MAX,
            write_zeroes_max_bytes=_CHANGE_BYTES_MAX,
            placement=placement,
            segment_bytes=options.segment if placement != "pool" else 0,
            identity=identify(overlay.file, options.overlay),
        )

    def _open(self, asked_bytes: int, hint: Hint) -> Head:
        options = self.options
        self._file = open_overlay(options.overlay)
        self._overlay = overlay = Overlay(self._file, options.overlay, options.base, serves=True)
        refuse_own_disk(overlay.base_path, hint.node)
        self._check_size(overlay.head, asked_bytes)
        return overlay.head

    def _make(self, size_bytes: int, hint: Hint) -> None:
        options = self.options
        if not hint.may_create:
            raise BackendError(
                f"overlay={options.overlay}: no such file, and this device has been served before: no empty one is "
                "made; bring the file back (ublkpool rebind accepts another in its place)"
            )
        if options.base is None:
            raise BackendError(f"overlay={options.overlay}: no such file; with base=FILE it is made")
        make_overlay(NewOverlay(options.overlay, options.base, size_bytes))

    def _check_size(self, head: Head, asked_bytes: int) -> None:
        if asked_bytes > head.layout.size_bytes:
            raise BackendError(
                f"overlay={self.options.overlay}: its disk has {head.layout.size_bytes} bytes, fewer than "
                f"size={format_size(asked_bytes)} ({asked_bytes}): ublkpool volume resize cow makes it larger"
            )

    def engine(self, device: Device) -> FrameEngine:
        """The native engine on base, overlay and map."""
        overlay = self._overlay
        assert overlay is not None
        needed_bytes = slot_bytes(device.max_io_bytes)
        if device.placement == "backend" and len(device.own) < needed_bytes:
            raise BackendError(
                f"segment={format_size(len(device.own))} is less than one write of {format_size(needed_bytes)}"
            )
        return NativeEngine(device, CowStorage(overlay.base, overlay.file, overlay.map))

    def open_inside(self, hint: Hint, kept: int | None) -> Inside:
        """Open and lock base and overlay for a device's only worker; see `bufpool/sdk/inside.py`."""
        properties, overlay = self.open(hint), self._overlay
        assert overlay is not None
        files = CowFiles(overlay.file, overlay.base, overlay.head.layout)
        return Inside(properties, files, (files.overlay, files.base))

    def grow_inside(self, growth: Growth) -> None:
        """Make the disk larger whose overlay a device's worker has open; see `bufpool/sdk/inside.py`.

        The worker never writes the head.
        """
        path = self.options.overlay
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            refuse_another(growth, identify(file, path), f"overlay={path}")
            grown(file, path, read_head(file, path), growth.wanted_bytes)
        finally:
            os.close(file)

    def settle(self) -> None:
        """Make durable what a device's worker wrote, which has ended; see `bufpool/sdk/inside.py`."""
        self._file = open_overlay(self.options.overlay)
        try:
            self._overlay = Overlay(self._file, self.options.overlay, self.options.base, serves=True)
        finally:
            self.close()

    def resize(self, size_bytes: int) -> None:
        """Make the disk larger; the new bytes read as zeros."""
        assert self._overlay is not None
        self._overlay.grow(size_bytes)

    def close(self) -> None:
        """Make what was written durable, and close base and overlay."""
        overlay, self._overlay = self._overlay, None
        if overlay is not None:
            try:
                overlay.map.sync()
            except OSError as error:
                log.warning("%s: %s", self.options.overlay, error)
            overlay.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
