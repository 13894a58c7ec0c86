"""A plugin's file, run as nbdkit runs it, and calls of its functions.

The file runs as the module `__main__`, with the module `nbdkit` beside it, from its first line to `close`; pickled
objects and data classes find their classes there.  Calls are thread-safe.
"""

import errno
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.blame import blamed, line_of, words_of
from ublkpool.bufpool.sdk.nbdkit.api import Api

_NEEDED = ("open", "get_size", "pread")
_API_VERSIONS = (1, 2)
_FAILURES = (Exception, SystemExit)
"""nbdkit fails the callback that raises SystemExit; the process goes on."""


class Script:
    """A plugin that was loaded.  Raises `BackendError` if the file fails or is no plugin."""

    def __init__(self, path: Path, api: Api) -> None:
        self.path = path
        self._api = api
        self._kept = {name: sys.modules.get(name) for name in ("__main__", "nbdkit")}
        self._module = ModuleType("__main__")
        self._module.__file__ = str(path)
        self._names: Mapping[str, Any] = vars(self._module)
        # nbdkit's interpreter has no arguments: those of this process are not the plugin's.
        self._arguments, sys.argv = sys.argv, [""]
        sys.modules.update(__main__=self._module, nbdkit=api.module())
        try:
            self._run()
            missing = [each for each in _NEEDED if not self.has(each)]
            if missing:
                raise BackendError(
                    f"{path}: the callback {missing[0]} is missing; nbdkit plugins need {', '.join(_NEEDED)}"
                )
            self.api_version = self._version()
        except BaseException:
            self.close()
            raise

    def _run(self) -> None:
        try:
            exec(
                compile(self.path.read_bytes(), str(self.path), "exec", dont_inherit=True),
                self._module.__dict__,
            )
        except _FAILURES as error:
            place = line_of(error) or str(self.path)
            name = "" if place.startswith(str(self.path)) else f"{self.path}: "
            raise BackendError(f"{name}{place}: {words_of(error)}") from error

    def _version(self) -> int:
        version = self._names.get("API_VERSION", 1)
        if not isinstance(version, int) or version not in _API_VERSIONS:
            raise BackendError(f"{self.path}: API_VERSION is {version!r}; there are versions 1 and 2")
        return int(version)

    def close(self) -> None:
        """Take the plugin's modules out of `sys.modules` again; may be called twice."""
        sys.argv = self._arguments
        for name, earlier in self._kept.items():
            if earlier is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = earlier

    def attribute(self, name: str) -> Any:
        """A global of the plugin, None if it has none of this name."""
        return self._names.get(name)

    def has(self, callback: str) -> bool:
        """Whether the plugin defines this callback, at this moment."""
        return callable(self._names.get(callback))

    def ask(self, callback: str, *arguments: Any) -> Any:
        """Call a callback that serves no request.  Raises `BackendError` if it fails."""
        try:
            return self._names[callback](*arguments)
        except _FAILURES as error:
            raise BackendError(f"{blamed(error)} ({callback})") from error
        finally:
            self._api.take_error()

    def request(self, callback: str, *arguments: Any) -> Any:
        """Call a callback for a request.

        Raises `OSError` with the errno that the plugin set or raised, and a text that names its line; the plugin's own
        exception if that has no errno.
        """
        try:
            result = self._names[callback](*arguments)
        except _FAILURES as error:
            code = self._api.take_error() or (error.errno if isinstance(error, OSError) else 0)
            if code or not isinstance(error, Exception):
                raise OSError(code or errno.EIO, f"{blamed(error)} ({callback})") from error
            raise
        if code := self._api.take_error():
            raise OSError(code, f"{self.path}: {callback} called nbdkit.set_error({code}) and raised nothing")
        return result
