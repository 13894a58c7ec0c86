"""The seals of shared memory: no process that has the descriptor can change the memory's size.

A hole can still be punched (FALLOC_FL_PUNCH_HOLE); an access there gets a new page of zeros.  An access beyond the end
of a file would be SIGBUS instead.
"""

import fcntl

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def seal(fd: int) -> None:
    """Seal the memfd's size for good.  Raises `OSError`."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def is_sealed(fd: int) -> bool:
    """Whether this is a memfd whose size is sealed."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:
        return False
