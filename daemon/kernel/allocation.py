"""Allocating shared memory in a process of its own: a gigabyte takes seconds, in which the supervisor serves no device.

Owns the limits.  The supervisor makes the memfds, so that they are its own whatever becomes of that process.
"""

from collections.abc import Callable, Sequence

from ublkpool.daemon.kernel.control_process import ControlRunner

AT_ONCE_BYTES_MAX = 16 << 20
"""What the supervisor allocates itself, in some milliseconds."""
ALLOCATE_DEADLINE_S = 600.0


async def allocate_beside(
    runner: ControlRunner, device: str, what: str, fill: Callable[[], str], fds: Sequence[int]
) -> str:
    """Have another process allocate the memory behind `fds` by `fill`; why that failed, or nothing.

    `what` begins errors.  Raises `ControlFailed`, also for an `OSError` of `fill`.
    """
    return await runner.look(device, what, fill, str, ALLOCATE_DEADLINE_S, fds)
