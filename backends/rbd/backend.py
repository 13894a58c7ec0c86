"""The backend rbd: an image of a Ceph cluster as a disk, over librbd.

A write is answered when the cluster has it, on as many disks as the pool asks for: librbd's own cache is off.  The
image's lock is taken before the attach, and the daemon has its owner on record before the first request.  A cluster in
trouble is a pause: requests wait.
"""

import atexit
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import msgspec

from ublkpool.backends.rbd.cluster import LEAN, Cluster
from ublkpool.backends.rbd.image import Image
from ublkpool.backends.rbd.libraries import libraries
from ublkpool.backends.rbd.options import RbdOptions, check_options
from ublkpool.backends.rbd.owner import Claim, check_not_served_elsewhere, served_by
from ublkpool.backends.rbd.pulse import BootAlarm, Pulse
from ublkpool.bufpool.engine.native import NativeEngine, RbdStorage, slot_bytes
from ublkpool.bufpool.errors import BackendError, StoreTaken
from ublkpool.bufpool.sdk import process
from ublkpool.bufpool.sdk.backend import Backend, Device, FrameEngine, Hint, Properties, log
from ublkpool.bufpool.sizes import format_size
from ublkpool.bufpool.way_out import explain
from ublkpool.bufpool.wire import Identity

_BLOCK_BYTES = 512
_LENGTH_MAX, _OBJECTS_MAX = 1 << 30, 256
"""Bytes and objects of one DISCARD or WRITE_ZEROES: librbd sends a request for each object from the engine's thread."""
_DISCARD_BYTES = 64 << 10
"""librbd leaves smaller parts as they are (rbd_discard_granularity_bytes)."""
_SEGMENT_BYTES = 64 << 20
_GENERATION, _OWNER = "ublkpool_generation", "ublkpool_owner"
"""Keys of the image's metadata."""
_CLOSE_S = 5.0
_PATIENCE = {"client_mount_timeout": "20"}
"""In seconds, where the daemon waits for this process: it says what it waits for, and tries again."""


class RbdBackend(Backend):
    """An image of a Ceph cluster."""

    Options = RbdOptions
    volumes = "ublkpool.backends.rbd.volumes:RbdVolumes"

    def __init__(self, options: RbdOptions) -> None:
        """Raises `BackendError` for options that no image can have."""
        check_options(options)
        self.options: RbdOptions = options
        self._cluster: Cluster | None = None
        self._image: Image | None = None
        self._pulse: Pulse | None = None
        self._alarm = -1
        """An eventfd: `_end` is set."""
        self._end: BackendError | None = None
        self._announced_bytes = self._asked_bytes = 0

    def look(self, hint: Hint) -> Properties:
        """See `ConnectsInside`: what a worker would attach with."""
        has_disk = hint.node is not None and not self.options.is_read_only
        with self._closed_on_failure():
            # Only a client that may write learns who has the lock.
            cluster, image = self._connect(_PATIENCE, readonly=not has_disk)
            self._check_image(image)
            if has_disk:
                Claim(image, self.options.name, hint).check()
                check_not_served_elsewhere(hint, image.metadata(_OWNER), self.options.name)
            properties = self._properties(cluster, image, hint, hint.former_owner or "")
        self.close()
        return properties

    def connect(self, hint: Hint) -> Properties:
        """See `ConnectsInside`."""
        with self._closed_on_failure():
            return self._open(hint, _PATIENCE)

    def open(self, hint: Hint) -> Properties:
        """Connect, open the image and take its lock."""
        # Before librbd has threads, which inherit it; the SDK, which sets it after this, says why it cannot be set.
        process.set_io_flusher()
        with self._closed_on_failure():
            return self._open(hint, {})

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            raise BackendError(f"rbd: {self.options.name}: {explain(error)}") from error
        except BaseException:
            self.close()
            raise

    def _connect(self, settings: Mapping[str, str], readonly: bool = False) -> tuple[Cluster, Image]:
        options = self.options
        self._cluster = cluster = Cluster(options, settings, {} if options.ceph_defaults else LEAN)
        as_reader = msgspec.structs.replace(options, readonly=True) if readonly else options
        self._image = image = Image(cluster, as_reader)
        return cluster, image

    def _check_image(self, image: Image) -> None:
        """Raise `BackendError` for an image on which this backend cannot keep its promises."""
        options = self.options
        if wrong := image.wrong_setting():
            key = wrong.partition(" ")[0]
            raise BackendError(
                f"rbd: {options.name}: the image or its pool has {wrong}, with which an answered write could be lost: "
                f"rbd config image rm {options.name} {key} (pool: rbd config pool rm {options.pool} {key})"
            )
        if not options.is_read_only and not image.has_lock_feature:
            raise BackendError(
                f"rbd: {options.name}: without the feature exclusive-lock two clients could write: "
                f"rbd feature enable {options.name} exclusive-lock, or serve it with readonly=on"
            )

    def _open(self, hint: Hint, settings: Mapping[str, str]) -> Properties:
        options = self.options
        cluster, image = self._connect(settings)
        self._check_image(image)
        owner = ""
        if not options.is_read_only:
            header = f"rbd_header.{image.id}"
            self._pulse = Pulse(partial(cluster.ask, header), cluster.expire_s, options.name, BootAlarm())
            owner = Claim(image, options.name, hint).take()
            check_not_served_elsewhere(hint, image.metadata(_OWNER), options.name)
            image.set_metadata(_OWNER, served_by(hint, owner))
        return self._properties(cluster, image, hint, owner)

    def _properties(self, cluster: Cluster, image: Image, hint: Hint, owner: str) -> Properties:
        options, found_bytes, object_bytes = self.options, image.size_bytes, image.object_bytes
        if hint.size_bytes > found_bytes:
            raise BackendError(
                f"rbd: {options.name}: has {found_bytes} bytes, fewer than device {hint.device} with "
                f"{format_size(hint.size_bytes)} ({hint.size_bytes}): rbd resize makes it larger"
            )
        size_bytes = hint.size_bytes or found_bytes
        if size_bytes < found_bytes:
            log.warning("%s: has %d bytes; the first %d are served", options.name, found_bytes, size_bytes)
        self._announced_bytes = size_bytes
        length_max = (
            min(_LENGTH_MAX, _OBJECTS_MAX * object_bytes, size_bytes) if not options.is_read_only else 0
        )
        segment_bytes = max(_SEGMENT_BYTES, slot_bytes(hint.max_io_bytes))
        return Properties(
            size_bytes=size_bytes,
            logical_block_bytes=_BLOCK_BYTES,
            volatile_cache=not options.is_read_only,
            read_only=options.is_read_only,
            discard_granularity_bytes=min(_DISCARD_BYTES, object_bytes),
            discard_max_bytes=length_max,
            write_zeroes_max_bytes=length_max,
            placement=hint.placement,
            segment_bytes=segment_bytes if hint.placement == "backend" else 0,
            identity=self._identity(cluster, image),
            generation_seen=int(image.metadata(_GENERATION) or 0),
            owner=owner,
            optimal_io_bytes=object_bytes,
        )

    def _identity(self, cluster: Cluster, image: Image) -> Identity:
        snapshot = f"@{self.options.snapshot}" if self.options.snapshot else ""
        place = f"{cluster.fsid}:{cluster.pool_id}:{self.options.namespace}:{image.id}{snapshot}"
        return Identity(value=f"rbd:{place}", store=f"the image {self.options.name}")

    def started(self, device: Device) -> None:
        """Put the generation on record in the image, and feel the cluster's pulse from now on."""
        image, pulse = self._image, self._pulse
        assert image is not None
        if pulse is None:
            return
        if device.generation:
            try:
                image.set_metadata(_GENERATION, str(device.generation))
            except OSError as error:
                raise BackendError(f"rbd: {self.options.name}: {explain(error)}") from error
        self._alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        device.watch(self._alarm, self._raise)
        image.watch(pulse.wake)
        pulse.start(self._excluded, partial(self._look_at_size, device))

    # On the pulse's thread.

    def _excluded(self) -> None:
        self._end_with(
            StoreTaken(
                f"rbd: {self.options.name}: another client has taken the image over: the cluster accepts nothing more "
                "from this one (blocklisted)"
            )
        )

    def _end_with(self, reason: BackendError) -> None:
        self._end = self._end or reason
        os.eventfd_write(self._alarm, 1)

    def _look_at_size(self, device: Device) -> None:
        assert self._image is not None
        size_bytes = self._image.size_bytes // _BLOCK_BYTES * _BLOCK_BYTES
        if size_bytes < device.size_bytes:
            # librbd 16 never answers a write beyond the end.
            self._end_with(
                BackendError(
                    f"rbd: {self.options.name}: has {size_bytes} bytes by now and became shorter than its device: "
                    "nothing more is read or written; bring it back at its full size"
                )
            )
            return
        if size_bytes > max(self._announced_bytes, self._asked_bytes, device.size_bytes):
            self._announced_bytes = size_bytes
            log.info("%s: has grown to %d bytes", self.options.name, size_bytes)
            device.resized(size_bytes)

    # On the loop's thread, and on that of a resize.

    def _raise(self) -> None:
        if self._end is not None:
            raise self._end

    def resize(self, size_bytes: int) -> None:
        """Grow the image; one that has grown already needs nothing."""
        assert self._image is not None
        if self.options.is_read_only and self._image.size_bytes < size_bytes:
            raise BackendError(f"rbd: {self.options.name}: it is served read only: it keeps its size")
        # Before it grows, since the pulse may see that first: the answer of this call tells it.
        self._asked_bytes = size_bytes
        try:
            if self._image.size_bytes < size_bytes:
                self._image.resize(size_bytes)
        except OSError:
            # The answer tells a failure: if the image grows to this size nevertheless, the pulse tells that.
            self._asked_bytes = 0
            raise

    def engine(self, device: Device) -> FrameEngine:
        """The native engine on the open image."""
        assert self._image is not None
        storage = RbdStorage(self._image.address, libraries().engine_calls())
        return NativeEngine(device, storage, read_only=self.options.is_read_only)

    def statistics(self) -> Mapping[str, int]:
        """For how many seconds the cluster has not been heard."""
        return {"cluster_silent_s": int(self._pulse.silent_s)} if self._pulse is not None else {}

    def close(self) -> None:
        """Give the lock back and leave the cluster; without an answer within 5 s the process's end does that."""
        if self._pulse is not None:
            self._pulse.close()
        leaving = threading.Thread(target=self._leave, name="ublkpool-leave", daemon=True)
        leaving.start()
        leaving.join(_CLOSE_S)
        if leaving.is_alive():
            log.error(
                "%s: the cluster does not answer: ending without giving the lock back", self.options.name
            )
            # The ordinary end of the process waits for threads of librbd's.
            atexit.register(_end_at_once)

    def _leave(self) -> None:
        if self._pulse is not None:
            # It uses the image.
            self._pulse.join()
        if self._image is not None:
            self._image.close()
        if self._cluster is not None:
            self._cluster.close()
        self._image = self._cluster = None
        if self._pulse is not None:
            self._pulse.forget_alarm()


def _end_at_once() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)
