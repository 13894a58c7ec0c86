"""Which guest runs a vm test that does not depend on the kernel.

Such a test has the marker `one_kernel("6.12")`: it names the guest, so that the guests, which run at the same time,
take about as long as each other.  `make test-long` sets UBLKPOOL_EVERY_KERNEL, so that every guest runs every test.
"""

import os
from collections.abc import Sequence


def guest_for(named: str, guests: Sequence[str]) -> str:
    """The kernel of the guest that runs the test: the named one, or the last of `guests` if it is not among them."""
    return named if named in guests else guests[-1]


def runs_here(named: str) -> bool:
    """Whether this guest runs what is named for a kernel; a machine that is no test guest runs all of it."""
    here = os.environ.get("UBLKPOOL_GUEST")
    if not here or "UBLKPOOL_EVERY_KERNEL" in os.environ:
        return True
    return guest_for(named, os.environ.get("UBLKPOOL_KERNELS", here).split()) == here
