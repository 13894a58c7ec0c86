"""Calls that change this process, and that Python lacks.  Each raises `OSError`."""

import os
from collections.abc import Sequence

from ublkpool.ublk.calls import check, ffi, lib


def set_io_flusher() -> None:
    """PR_SET_IO_FLUSHER: allocations of this thread never wait for its own device."""
    check(lib.uq_set_io_flusher(), "PR_SET_IO_FLUSHER")


def lock_memory() -> None:
    """Keep what is mapped, and what will be, in memory."""
    check(lib.uq_lock_memory(), "mlockall")


def private_mounts() -> None:
    """Unshare the mount namespace, with private propagation."""
    check(lib.uq_private_mounts(), "unshare the mount namespace")


def leave_mount(path: str) -> None:
    """Unmount what is mounted there in this process's mount namespace, at once or when the last file is closed."""
    check(lib.uq_leave_mount(os.fsencode(path)), f"umount {path}")


def enter_mounts(fd: int) -> None:
    """Move this process into the mount namespace behind `fd`; it stands at that namespace's root then."""
    check(lib.uq_enter_mounts(fd), "enter a mount namespace")


def close_all_but(keep: Sequence[int]) -> None:
    """Close every descriptor of this process but these."""
    numbers = sorted(set(keep))
    check(lib.uq_close_all_but(ffi.new("int[]", numbers), len(numbers)), "close_range")


def die_with_parent(parent_pid: int) -> None:
    """KILL this process when its parent ends.  Raises `OSError` if that has ended already."""
    check(lib.uq_die_with(parent_pid), "PR_SET_PDEATHSIG")


def set_process_name(name: str) -> None:
    """What ps and top show for this process (15 characters)."""
    check(lib.uq_set_name(name.encode()), "PR_SET_NAME")
