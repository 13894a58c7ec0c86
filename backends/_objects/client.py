"""Requests to a store over HTTP that may be away: tried again until it answers.

The library is obstore: one wheel without dependencies for S3-like stores and web servers, with asynchronous calls and
conditional PUTs; aiohttp and boto3 together are 20 packages, and boto3 has no asynchronous calls.  Its own retries are
off, because it gives up after some minutes.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar
from urllib.parse import SplitResult, urlsplit

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Device, log
from ublkpool.bufpool.sdk.wakeup import Wakeup

_T = TypeVar("_T")
_PAUSE_S_MIN, _PAUSE_S_MAX = 0.05, 5.0
_REQUEST_S_MAX = 3600
CHUNK_BYTES_MAX = 64 << 20
"""A chunk is in memory as a whole, several times while it changes."""
CONNECT_S = timedelta(seconds=5)
_START_TRIES, _START_S = 4, 20.0
"""What a store that is away for a moment gets while a backend starts; a backend that waited would hear no SIGTERM."""


def library(extra: str) -> Any:
    """The module `obstore`.  Raises `BackendError` if it is not installed."""
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise BackendError(
            f"the backend {extra} needs the Python package obstore: pip install 'ublkpool[{extra}]'"
        ) from error
    return obstore


def check_times(kind: str, timeout: float, request_timeout: float) -> None:
    """Raise `BackendError` for seconds that cannot be waited."""
    if not 0 <= timeout < float("inf"):
        raise BackendError(f"{kind}: timeout={timeout:g} is not a number of seconds; 0 waits for ever")
    if not 0 < request_timeout <= _REQUEST_S_MAX:
        raise BackendError(
            f"{kind}: request_timeout={request_timeout:g} is not above 0 and at most {_REQUEST_S_MAX} seconds"
        )


def check_url(name: str, url: str) -> SplitResult:
    """The parts of a URL of a server.  Raises `BackendError`, which begins with `name`."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise BackendError(f"{name}={url}: {error}") from error
    if not is_valid or any(each.isspace() for each in url):
        raise BackendError(f"{name}={url}: give an http or https URL")
    return parts


def answers(obstore: Any) -> tuple[type[BaseException], ...]:
    """The errors that are an answer of the store, and not its absence."""
    errors = obstore.exceptions
    return (
        FileNotFoundError,
        errors.AlreadyExistsError,
        errors.PreconditionError,
        errors.NotModifiedError,
        errors.NotSupportedError,
        errors.InvalidPathError,
    )


def first_line(error: BaseException) -> str:
    """The error's text without the library's debugging lines."""
    return str(error).split("\n", 1)[0][:300]


class Ending:
    """Ends the backend from within an `async def` method, so that its requests stay for the successor."""

    def __init__(self, device: Device) -> None:
        """Raises `OSError` without a free descriptor."""
        self._wakeup = Wakeup()
        self._reason = ""
        device.watch(self._wakeup.descriptor, self._end)

    def _end(self) -> None:
        raise BackendError(self._reason)

    async def end(self, reason: str) -> NoReturn:
        """End the process with this reason; the caller's request is never answered."""
        self._reason = self._reason or reason
        self._wakeup.signal()
        while True:
            await asyncio.sleep(3600)

    def close(self) -> None:
        """Close the descriptor, after the loop has ended; coroutines may still call `end`."""
        self._wakeup.close()


class Patience:
    """Makes requests until the store answers.

    After `timeout_s` seconds without an answer, 0 for never, `ending` ends the backend.  Without one, while the backend
    starts, a request is tried four times at most, for 20 s at most; then `BackendError` is raised.
    """

    def __init__(self, obstore: Any, name: str, timeout_s: float) -> None:
        self._obstore, self._name, self._timeout_s = obstore, name, timeout_s
        self._answers = answers(obstore)
        self._said = ""
        self.ending: Ending | None = None
        self.retries = 0

    async def ask(self, start: Callable[[], Awaitable[_T]]) -> _T:
        """The result of `start`, called again while the store is away.  Raises what `answers` lists."""
        since_s, pause_s, tries = time.monotonic(), _PAUSE_S_MIN, 0
        while True:
            tries += 1
            try:
                result = await start()
            except self._answers:
                raise
            except (self._obstore.exceptions.BaseError, OSError, TimeoutError) as error:
                await self._failed(error, since_s, tries)
            else:
                if self._said:
                    self._said = ""
                    log.info("%s: answers again", self._name)
                return result
            # Not in step with the other requests that wait.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)

    async def _failed(self, error: BaseException, since_s: float, tries: int) -> None:
        text, waited_s = first_line(error), time.monotonic() - since_s
        if self.ending is None and (tries == _START_TRIES or waited_s > _START_S):
            raise BackendError(f"{self._name}: {text}") from error
        self.retries += 1
        if not self._said:
            self._said = text
            log.warning("%s: no answer, trying again: %s", self._name, text)
        if self.ending is not None and 0 < self._timeout_s <= waited_s:
            await self.ending.end(f"{self._name}: no answer for timeout={self._timeout_s:g} s: {text}")
