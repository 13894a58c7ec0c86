"""The stock of a queue that shares its buffers with no other: in the place of `PoolLink`, without a broker.

No backend's process borrows the buffers of such a device, so nothing is gained by moving them between its queues at
every burst: each queue has an equal part of each size from its start, and keeps it.
"""

from ublkpool.ublk.queue import Queue


class OwnStock:
    """A queue's part of the pool."""

    def __init__(self, queue: Queue) -> None:
        """The classes of the queue's config are its part."""
        queue.stock_own()

    def receive(self) -> None:
        """Nothing: no message comes."""

    def balance(self) -> None:
        """Nothing: the queue has all that it can have."""

    def close(self) -> None:
        """Nothing: the process's end does what is to be done."""
