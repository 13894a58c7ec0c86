"""The attached device, as a backend's author and the native engine know it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What an attached backend knows of its device, and its way to the loop that serves it."""

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
    """The own segment; empty if there is none."""
    own_segment: int
    clients: Mapping[int, memoryview] = field(default_factory=dict)
    """The slices of the client area by their segment numbers.  What lies there may change at any time."""
    own_from: int = 0
    """Where the part of the own segment begins that is the author's, after the SDK's slots."""
    post_bytes: tuple[int, ...] = ()
    """In which sizes regions may be posted ahead; empty if not at all."""
    generation: int = 0
    """Of this attach, higher than that of every earlier one to a device of this name, for ever: a store that takes
    orders from several machines or processes refuses what comes with a lower one.  0: the daemon is too old to say."""
    watch: Callable[[int, Callable[[], None]], None]
    """`watch(fd, callback)`: call `callback` on the loop's thread whenever `fd` is readable."""
    unwatch: Callable[[int], None]
    wake: Callable[[], None]
    """Thread-safe: turn the loop once, asking again for every place and every read that had to wait."""
