"""A fork whose child is a child of this process's parent: the parent of both reaps it and learns how it ended.

Owns the order of Python's own steps around a fork, which are those of `os.fork`.
"""

import ctypes
from typing import Any

from ublkpool.ublk.calls import check, ffi, lib

_python = ctypes.pythonapi


def _address(name: str) -> int:
    return int(ffi.cast("uintptr_t", ffi.addressof(lib, name)))


# Without the interpreter's lock being let go, as in os.fork.
_fork = ctypes.PYFUNCTYPE(ctypes.c_int)(_address("uq_fork_beside"))
_fork_when_asked = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)(
    _address("uq_fork_when_asked")
)
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


def fork_when_asked(sock: int, asked: Any) -> bool:
    """Fork at each request that comes over `sock`: True in a child, which has its request in the `struct uq_asked`.

    False at the end of the socket, until which this process runs no Python.  Only for a process with one thread.
    Raises `OSError`.
    """
    _python.PyOS_BeforeFork()
    result: int = _fork_when_asked(sock, int(ffi.cast("uintptr_t", asked)))
    if result:
        _python.PyOS_AfterFork_Parent()
    else:
        _python.PyOS_AfterFork_Child()
    return check(result, "requests to fork") == 0
