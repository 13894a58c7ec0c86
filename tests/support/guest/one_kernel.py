"""Which guest runs a vm test that does not depend on the kernel.

Such a test has the marker `one_kernel("6.12")`: it names the guest, so that the guests, which run at the same time,
take about as long as each other.  `make test-long` sets UBLKPOOL_EVERY_KERNEL, so that every guest runs every test.
"""

from collections.abc import Sequence


def guest_for(named: str, guests: Sequence[str]) -> str:
    """The kernel of the guest that runs the test: the named one, or the last of `guests` if it is not among them."""
    return named if named in guests else guests[-1]
