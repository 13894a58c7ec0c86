"""A fork whose child is a child of this process's parent: the parent of both reaps it and learns how it ended.

Owns the order of Python's own steps around a fork, which are those of `os.fork`.
"""

import ctypes

from ublkpool.ublk.calls import check, ffi, lib

_python = ctypes.pythonapi
# Without the interpreter's lock being let go, as in os.fork.
_fork = ctypes.PYFUNCTYPE(ctypes.c_int)(int(ffi.cast("uintptr_t", ffi.addressof(lib, "uq_fork_beside"))))
for _step in (_python.PyOS_BeforeFork, _python.PyOS_AfterFork_Parent, _python.PyOS_AfterFork_Child):
    _step.restype = None


def fork_beside() -> int:
    """The number of the child, 0 in the child.  Only for a process with one thread.  Raises `OSError`."""
    _python.PyOS_BeforeFork()
    pid: int = _fork()
    if pid:
        _python.PyOS_AfterFork_Parent()
    else:
        _python.PyOS_AfterFork_Child()
    return check(pid, "clone")
