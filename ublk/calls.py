"""The native library, and what becomes of a call of it that fails."""

import os
from typing import Any

from ublkpool.ublk import _native

ffi, lib = _native.ffi, _native.lib


def check(result: int, what: str) -> int:
    """The result of a call that returns a negative errno when it fails: `OSError` then, which names `what`."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def checked_address(address: Any, what: str) -> Any:
    """The address that a call returns, with errno set where that is NULL: `OSError` then, which names `what`."""
    if address == ffi.NULL:
        raise OSError(ffi.errno, f"{what}: {os.strerror(ffi.errno)}")
    return address
