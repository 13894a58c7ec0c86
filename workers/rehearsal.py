"""A worker's life in short, on memory of its own and without a device.

What Python and cffi make when a line of code runs first (types, caches, specialized code) stays.  So the process that
forks workers does once what each of them does, and they share what came of it.
"""

import mmap
import os
import pickle
from contextlib import ExitStack
from pathlib import Path

from ublkpool.bufpool.engine.native import NullStorage
from ublkpool.bufpool.pool.control import control_bytes
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.ublk.calls import ffi
from ublkpool.ublk.mappings import sealable_memory
from ublkpool.ublk.queue import BufferClass, QueueConfig
from ublkpool.workers import messages
from ublkpool.workers.engine_inside import EngineSpec
from ublkpool.workers.pool_files import SentPool
from ublkpool.workers.queue_loop import QueueLoop, WorkerSpec

_GEOMETRY = Geometry.build([(mmap.PAGESIZE, 1)])
_DEPTH = 1
_TURNS_MAX = 4


def rehearse() -> None:
    """Serve a queue that fetches from a file that is no device, so that it ends at once.  Raises `OSError`."""
    spec = pickle.loads(pickle.dumps(_spec())).renumbered({})
    with ExitStack() as stack:

        def file(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        pool = SentPool(
            file(sealable_memory("ublkpool-rehearsal")),
            file(sealable_memory("ublkpool-rehearsal")),
            _GEOMETRY,
            1,
        )
        os.ftruncate(pool.data_fd, _GEOMETRY.total_bytes)
        os.ftruncate(pool.control_fd, control_bytes(1, _GEOMETRY.slot_count))
        descriptors = ffi.new("struct uq_iod[]", _DEPTH)
        ours, theirs = messages.pair()
        with ours, theirs:
            loop = QueueLoop(spec, pool.control_fd, descriptors, pool, theirs)
            try:
                for _ in range(_TURNS_MAX):
                    if loop.turn() is not None:
                        break
            finally:
                loop.close()


def _spec() -> WorkerSpec:
    size = _GEOMETRY.classes[0]
    own = BufferClass(
        size.base_offset, size.buffer_bytes, size.count, size.first_slot, size.count, 1, size.count
    )
    return WorkerSpec(
        name="rehearsal",
        queue=QueueConfig(
            device_number=0,
            queue=0,
            depth=_DEPTH,
            epoch=1,
            max_io_bytes=size.buffer_bytes,
            block_bytes=512,
            need_get_data=True,
            place_in_backend=False,
            timeout_ms=1,
            fail_on_timeout=False,
            classes=(own,),
        ),
        queue_socket=Path("/"),
        ring_socket=None,
        pool_endpoint=None,
        socket_mode=0,
        socket_group=None,
        cpu=None,
        spin_us=0,
        engine=EngineSpec(NullStorage(), size.buffer_bytes, read_only=False),
    )
