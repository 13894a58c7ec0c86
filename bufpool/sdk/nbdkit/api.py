"""The module `nbdkit` that plugins import, and the error that a plugin sets before it raises.

Owns the constants of nbdkit-plugin(3) and one thread-local number.  A disk has one client, the kernel: no export, no
TLS and no peer, and the functions that ask for them answer as nbdkit does where there is none.
"""

import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from ublkpool.bufpool.sdk.nbdkit import texts
from ublkpool.bufpool.sdk.requests import log

THREAD_MODEL_PARALLEL = 3
FLAG_MAY_TRIM, FLAG_FUA = 1, 2
FUA_NONE, FUA_EMULATE, FUA_NATIVE = 0, 1, 2
_CONSTANTS = {
    "THREAD_MODEL_SERIALIZE_CONNECTIONS": 0,
    "THREAD_MODEL_SERIALIZE_ALL_REQUESTS": 1,
    "THREAD_MODEL_SERIALIZE_REQUESTS": 2,
    "THREAD_MODEL_PARALLEL": THREAD_MODEL_PARALLEL,
    "FLAG_MAY_TRIM": FLAG_MAY_TRIM,
    "FLAG_FUA": FLAG_FUA,
    "FLAG_REQ_ONE": 4,
    "FLAG_FAST_ZERO": 8,
    "FUA_NONE": FUA_NONE,
    "FUA_EMULATE": FUA_EMULATE,
    "FUA_NATIVE": FUA_NATIVE,
    "CACHE_NONE": 0,
    "CACHE_EMULATE": 1,
    "CACHE_NATIVE": 2,
    "EXTENT_HOLE": 1,
    "EXTENT_ZERO": 2,
}
_NO_PEER = {
    "peer_pid": "client pid",
    "peer_uid": "client uid",
    "peer_gid": "client gid",
    "peer_security_context": "client security context",
    "peer_tls_dn": "client TLS DN",
    "peer_tls_issuer_dn": "issuer TLS DN",
}
_INT_MAX = (1 << 31) - 1


class Api:
    """The functions of the module `nbdkit`; `end(reason)` ends the backend, from any thread."""

    def __init__(self, end: Callable[[str], None]) -> None:
        self._end = end
        self._local = threading.local()

    def module(self) -> ModuleType:
        """The module, to be put into `sys.modules` while the plugin is loaded."""
        module = ModuleType("nbdkit", "Module used to access the server's API from a plugin.")
        functions: dict[str, Any] = {
            "debug": self.debug,
            "disconnect": self.disconnect,
            "export_name": self.export_name,
            "is_tls": self.is_tls,
            "nanosleep": self.nanosleep,
            "parse_delay": texts.parse_delay,
            "parse_probability": texts.parse_probability,
            "parse_size": texts.parse_size,
            "read_password": texts.read_password,
            "set_error": self.set_error,
            "shutdown": self.shutdown,
            "stdio_safe": self.stdio_safe,
            **{name: _no_peer(text) for name, text in _NO_PEER.items()},
        }
        vars(module).update(functions, **_CONSTANTS)
        return module

    def take_error(self) -> int:
        """The errno that this thread's callback has set, 0 for none; forgets it."""
        code = getattr(self._local, "code", 0)
        self._local.code = 0
        return int(code)

    def set_error(self, code: int, /) -> None:
        """`code` is the errno of this thread's callback, which raises next."""
        if not isinstance(code, int):
            raise TypeError(f"set_error() argument must be int, not {type(code).__name__}")
        if not -_INT_MAX <= code <= _INT_MAX:
            raise OverflowError("set_error() argument does not fit into a C int")
        self._local.code = code

    def debug(self, text: str, /) -> None:
        """A line of the log at level debug."""
        if not isinstance(text, str):
            raise TypeError(f"debug() argument must be str, not {type(text).__name__}")
        log.debug("%s", text)

    def export_name(self) -> str:
        """Empty: the default export."""
        return ""

    def is_tls(self) -> bool:
        """False: requests come from the kernel."""
        return False

    def stdio_safe(self) -> bool:
        """True: no connection uses stdin and stdout."""
        return True

    def nanosleep(self, seconds: int, nanoseconds: int, /) -> None:
        """Sleep."""
        time.sleep(seconds + nanoseconds / 1e9)

    def shutdown(self) -> None:
        """End the backend after the executing requests, as SIGTERM does."""
        self._end("nbdkit.shutdown()")

    def disconnect(self, force: object, /) -> None:
        """End the backend as `shutdown`: its only client is the kernel, which a next backend serves on."""
        self._end("nbdkit.disconnect()")


def _no_peer(text: str) -> Callable[[], NoReturn]:
    def ask() -> NoReturn:
        raise ValueError(f"Unable to get {text}")

    return ask
