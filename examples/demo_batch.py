"""A file mapped into memory, served with one call for each batch of requests.

    ublkpool backend examples/demo_batch.py --device demo path=/dev/shm/disk size=64M
    ublkpool backend examples/demo_batch.py --device demo path=/dev/shm/disk size=64M placement=backend

`serve_batch` gets reads and writes as columns of numbers; `copy` moves the data of all of them in one call.  The file's
pages belong to the kernel, so an answered write survives this process.  With placement `backend` writes land in
slots of a segment of the backend's own, which the SDK has posted ahead.
"""

import mmap
import os
from pathlib import Path
from typing import Literal

import msgspec

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Hint, Properties
from ublkpool.bufpool.sdk.batch import Batch
from ublkpool.bufpool.sdk.claim import open_alone
from ublkpool.bufpool.sdk.store_identity import identify
from ublkpool.bufpool.sizes import ByteSize


class DemoBatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    path: Path
    size: ByteSize = 64 << 20
    placement: Literal["pool", "backend"] = "pool"
    segment: ByteSize = 16 << 20


class DemoBatch(Backend):
    Options = DemoBatchOptions

    def __init__(self, options: DemoBatchOptions) -> None:
        self.options: DemoBatchOptions = options

    def open(self, hint: Hint) -> Properties:
        options = self.options
        # Create the file only for a device that was never served: later, a missing or short file is lost data.
        create = os.O_CREAT if hint.may_create else 0
        # The lock lasts as long as the mapping.
        file = open_alone(options.path, os.O_RDWR | create | os.O_CLOEXEC)
        if not hint.may_create and os.fstat(file).st_size < options.size:
            raise BackendError(f"{options.path} is shorter than it was")
        # Allocate all blocks: writing to a mapped page without one could kill this process (SIGBUS).
        os.posix_fallocate(file, 0, options.size)
        self.map = mmap.mmap(file, options.size)
        identity = identify(file, options.path)
        os.close(file)
        self.disk = memoryview(self.map)
        places = options.placement == "backend"
        return Properties(
            size_bytes=options.size,
            volatile_cache=True,
            placement=options.placement,
            segment_bytes=options.segment if places else 0,
            post_max_bytes=hint.max_io_bytes if places else 0,
            identity=identity,
        )

    def serve_batch(self, batch: Batch) -> None:
        batch.copy(self.disk)
        if any(flag & 1 for flag in batch.flags):  # wire.Flag.FUA
            self.map.flush()

    def flush(self) -> None:
        self.map.flush()

    def close(self) -> None:
        self.disk.release()
        self.map.close()
