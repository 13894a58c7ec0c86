"""The attached device, as a backend's author and the native engine see it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The device that a backend is attached to, and the loop that serves it; sizes are bytes.

    Tags of a queue run from 0 to `depth` - 1; no read or write is longer than `max_io_bytes`.  `size_bytes` rises when
    the store has grown: no request exceeds it.
    """

    name: str
    number: int
    epoch: int
    size_bytes: int
    logical_block_bytes: int
    queues: int
    depth: int
    max_io_bytes: int
    need_get_data: bool
    placement: Literal["pool", "backend"]
    read_only: bool
    pool: memoryview
    own: memoryview
    """The own segment; empty without one."""
    own_segment: int
    clients: Mapping[int, memoryview] = field(default_factory=dict)
    """The slices of the client area by segment number.  A client may change their content at any time."""
    own_from: int = 0
    """Byte offset in the own segment where the author's part begins, after the SDK's slots."""
    post_bytes: tuple[int, ...] = ()
    """The sizes, in bytes, in which regions may be posted ahead; empty if they may not."""
    generation: int = 0
    """Number of this attach, higher than that of every earlier attach to a device of this name, over all restarts.  A
    store that several processes or machines can reach refuses writers with a lower one.  0: the daemon is too old."""
    watch: Callable[[int, Callable[[], None]], None]
    """`watch(fd, callback)`: call `callback` on the loop's thread whenever `fd` is readable.

    A `BackendError` that it raises ends the backend; unanswered requests go to the successor."""
    unwatch: Callable[[int], None]
    """`unwatch(fd)`: undo `watch`, before `fd` is closed."""
    wake: Callable[[], None]
    """Thread-safe: `place` and `read_in_place` are called again for every request that was answered "not now"."""
    stop: Callable[[str], None] = field(default=lambda reason: None)
    """`stop(reason)`: end the backend after the executing requests, as SIGTERM does.  Thread-safe."""
    fixed_buffers: bool = False
    """Whether the data of each read and write is in the engine's io_uring, as the fixed buffer of the request's tag."""
    resized: Callable[[int], None] = field(default=lambda size_bytes: None)
    """`resized(size_bytes)`: the store has grown to this size, also after a power failure; the daemon makes the device
    as large, if its driver can.  Thread-safe.  At most once a second, or the backend may be cut off."""
