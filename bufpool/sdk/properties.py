"""`Hint`, which a backend gets before the attach, and `Properties`, which it attaches with.  Pure."""

from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from ublkpool.bufpool.engine.native import Storage
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.client import OwnSegment
from ublkpool.bufpool.sdk.requests import log
from ublkpool.bufpool.wire import Identity


class Hint(NamedTuple):
    """The device as the daemon describes it before the attach.

    `size_bytes` is 0 for a device that takes the backend's size.  `max_io_bytes` is the largest read or write.
    `may_create` says that the device was never served, so a backend that finds no store may make an empty one.  If it
    is False, a backend whose store is missing, empty or too short raises `BackendError`: a new store would read as
    zeros where the device had data.  `takes_next` says that the operator accepted the next store, whatever it is
    (`ublkpool rebind`): a store that no operator can bring back, such as memory, may then be made anew.
    """

    device: str
    run_dir: Path
    size_bytes: int = 0
    max_io_bytes: int = 0
    placement: Literal["pool", "backend"] = "pool"
    read_only: bool = False
    node: Path | None = None
    """The disk, /dev/ublkbN, if it exists already; nothing of the backend's store may lie on it."""
    may_create: bool = True
    takes_next: bool = False
    resized_bytes: int = 0
    """The size that `ublkpool resize` gave the device: serve at least this much, whatever a smaller option says; 0 if
    it was never resized."""
    former_owner: str | None = None
    """`Properties.owner` of the last backend, whose process has ended: its lock, and no other, may be broken.  Empty:
    none is known.  None: the daemon is too old to keep an owner."""
    takes_over: bool = False
    """The operator wants the store's lock broken, no matter which client holds it (`ublkpool add --take-over`)."""

    def asked_bytes(self, option_bytes: int) -> int:
        """The bytes to serve, of a backend whose option `size` is `option_bytes` (0: none); 0: the whole store."""
        return max(option_bytes, self.resized_bytes) or self.size_bytes


class Properties(msgspec.Struct, frozen=True, kw_only=True):
    """A backend's description of itself for the daemon; sizes are bytes.

    `size_bytes` 0 takes the size that the device was created with.  `volatile_cache` says that an answered write may be
    lost in a power failure until `flush`; without it the device gets no FLUSH.  `optimal_io_bytes` is the length of
    requests that the store prefers, such as its object's: a power of two from the physical block to 32 MiB, 0 for the
    physical block; the disk keeps the first backend's.  DISCARD and WRITE_ZEROES are offered if
    their maximum is not 0.

    `segment_bytes` makes the SDK create an own segment of that size, `segment` brings one; placement `backend` and read
    buffers `own` need one.  With `post_max_bytes` the SDK posts slots of the segment ahead: writes up to that size land
    in one, and `place` is not called.  A backend that overrides `place` as well is asked for larger writes and for
    writes that find no posted slot; its part of the segment begins at `Device.own_from`.

    `identity` names the store: the daemon refuses a successor with another identity.  A string is a strong identity;
    without one the successor must only be of the same kind.  `generation_seen` is the highest `Device.generation` that
    the store has on record; the daemon answers with a higher one.  `owner` is the name under which this process holds
    the store's lock in its cluster; the daemon has it on record before the first request.
    """

    size_bytes: int = 0
    logical_block_bytes: int = 512
    physical_block_bytes: int = 4096
    volatile_cache: bool = False
    read_only: bool = False
    rotational: bool = False
    discard_granularity_bytes: int = 0
    discard_max_bytes: int = 0
    write_zeroes_max_bytes: int = 0
    placement: Literal["pool", "backend", "any"] = "pool"
    read_buffers: Literal["pool", "own"] = "pool"
    segment_bytes: int = 0
    segment: OwnSegment | None = None
    post_max_bytes: int = 0
    identity: Identity | str | None = None
    generation_seen: int = 0
    owner: str = ""
    optimal_io_bytes: int = 0


class Inside(NamedTuple):
    """A store that was opened for a device's workers (`inside.py`).

    `descriptors` are of its files, or of the memory disk, which the daemon keeps; empty without either.
    """

    properties: Properties
    storage: Storage
    descriptors: tuple[int, ...] = ()


@cache
def _numbers() -> tuple[str, ...]:
    """The properties that are whole numbers."""
    return tuple(each.name for each in msgspec.structs.fields(Properties) if each.type is int)


def check_properties(properties: Properties) -> Properties:
    """The properties, with the size cut to whole logical blocks: a grown store may end inside one.

    Raises `BackendError`, which names the first property that no device can have.
    """
    if not isinstance(properties, Properties):
        raise BackendError(f"open() must return Properties, not {properties!r:.60}")
    for name in _numbers():
        value = getattr(properties, name)
        if not isinstance(value, int):
            raise BackendError(f"the property {name} must be a whole number, not {value!r:.60}")
    block = properties.logical_block_bytes
    if block & (block - 1) or not 512 <= block <= 4096:
        raise BackendError(f"a logical block of {block} bytes: it must be a power of two, 512 to 4096")
    rest_bytes = properties.size_bytes % block
    if properties.size_bytes < 0 or rest_bytes == properties.size_bytes > 0:
        raise BackendError(f"a size of {properties.size_bytes} bytes is not one block of {block}")
    if rest_bytes:
        log.warning("the last %d bytes are not a block and not served", rest_bytes)
        properties = msgspec.structs.replace(properties, size_bytes=properties.size_bytes - rest_bytes)
    needs_segment = properties.placement == "backend" or properties.read_buffers == "own"
    if needs_segment and not (properties.segment_bytes or properties.segment):
        raise BackendError("placement backend and read buffers own need a segment (segment_bytes)")
    if properties.post_max_bytes and (properties.placement == "pool" or properties.read_buffers == "own"):
        raise BackendError(
            "post_max_bytes is for placement backend or any, with reads into buffers of the pool"
        )
    return properties
