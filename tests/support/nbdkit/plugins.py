"""Small plugins of nbdkit for unit tests, and what reached them.

Each plugin records its calls in a list `calls`, the module `__main__` while it is loaded.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ublkpool.bufpool.sdk.backend import Hint, Properties
from ublkpool.bufpool.sdk.failures import errno_of
from ublkpool.bufpool.sdk.nbdkit.plugin import NbdkitBackend

SIZE = 1 << 20
NEEDED = """
import nbdkit, errno
API_VERSION = 2
disk = bytearray(1 << 20)
calls = []
def open(readonly):
    calls.append(("open", readonly))
    return {"fd": 7}
def get_size(h): return len(disk)
def pread(h, buf, offset, flags):
    assert h == {"fd": 7}
    calls.append(("pread", len(buf), offset, flags))
    buf[:] = disk[offset:offset + len(buf)]
"""
WRITES = """
def pwrite(h, buf, offset, flags):
    calls.append(("pwrite", len(buf), offset, flags))
    disk[offset:offset + len(buf)] = buf
"""
FLUSHES = """
def flush(h, flags): calls.append(("flush", flags))
"""
FIRST_VERSION = """
disk = bytearray(1 << 20)
calls = []
def open(readonly): return 1
def get_size(h): return len(disk)
def pread(h, count, offset):
    calls.append(("pread", count, offset))
    return disk[offset:offset + count]
def pwrite(h, buf, offset):
    calls.append(("pwrite", len(buf), offset))
    disk[offset:offset + len(buf)] = buf
def flush(h): calls.append(("flush",))
def trim(h, count, offset): calls.append(("trim", count, offset))
def zero(h, count, offset, may_trim): calls.append(("zero", count, offset, may_trim))
"""
ZERO = """
def zero(h, count, offset, flags): calls.append(("zero", count, offset, flags))
"""
Plugin = Callable[..., NbdkitBackend]
"""Loads the code of a plugin, given in pieces, with its options."""


def opened(backend: NbdkitBackend, read_only: bool = False) -> Properties:
    return backend.open(Hint("vol0", Path("/run"), read_only=read_only))


def calls() -> list[Any]:
    """What reached the plugin so far; forgets it."""
    made = recorded_calls()[:]
    recorded_calls().clear()
    return made


def recorded_calls() -> list[Any]:
    """The plugin's own list, which lives on after its end."""
    recorded: list[Any] = sys.modules["__main__"].__dict__["calls"]
    return recorded


def failure_of(call: Callable[[], Any]) -> int:
    """The errno that the SDK answers to a request that fails as `call` does; logs as the SDK does."""
    with pytest.raises(Exception) as caught:
        call()
    return -errno_of(caught.value, "request")
