"""A device's pool as a worker gets it: the descriptors of its memory, and what lies where in that."""

from typing import Protocol

import msgspec

from ublkpool.bufpool.pool.limits import Geometry


class PoolFiles(Protocol):
    """Of the supervisor's `Arena`, what a worker uses; the worker puts the descriptor of other memory in its place."""

    data_fd: int
    control_fd: int
    geometry: Geometry
    queues: int


class SentPool(msgspec.Struct):
    """The same for a worker that was not forked by the supervisor."""

    data_fd: int
    control_fd: int
    geometry: Geometry
    queues: int
