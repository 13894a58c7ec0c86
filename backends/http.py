"""A file on a web server as a read-only disk, by range requests.

The file is one version, named by its ETag or Last-Modified: if an answer shows another one, the backend ends, since a
mixture of two versions is no disk.  Read in chunks, which memory and a local cache keep.
"""

import asyncio
import errno
from collections.abc import Awaitable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec

from ublkpool.backends._objects.chunk_cache import ChunkCache, entry_directory
from ublkpool.backends._objects.client import (
    CHUNK_BYTES_MAX,
    CONNECT_S,
    Ending,
    Patience,
    check_times,
    check_url,
    first_line,
    library,
)
from ublkpool.backends._objects.memory_cache import MemoryCache
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties, log
from ublkpool.bufpool.sizes import ByteSize, format_size
from ublkpool.bufpool.wire import Identity

_BLOCK_BYTES = 512


class HttpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`timeout` is how long an absent server is awaited, 0 for ever; `request_timeout` bounds a request; seconds."""

    url: str
    chunk_bytes: ByteSize = 1 << 20
    memory: ByteSize = 32 << 20
    cache: Path | None = None
    cache_size: ByteSize = 1 << 30
    timeout: float = 0.0
    request_timeout: float = 30.0
    insecure: bool = False


class Version(msgspec.Struct, frozen=True):
    """What tells one version of the file from another."""

    e_tag: str
    modified: str
    size_bytes: int

    @property
    def name(self) -> str:
        """For identities and caches; empty if the server names no version."""
        return f"{self.e_tag or self.modified} {self.size_bytes}" if self.e_tag or self.modified else ""


class HttpBackend(Backend):
    """A read-only disk from a web server."""

    Options = HttpOptions

    def __init__(self, options: HttpOptions) -> None:
        """Raises `BackendError` for a URL or a size that cannot be used."""
        self.options: HttpOptions = options
        check_times("http", options.timeout, options.request_timeout)
        url = check_url("http: url", options.url)
        if url.path in ("", "/"):
            raise BackendError(f"http: url={options.url}: give the http or https URL of a file")
        if url.query or url.fragment:
            raise BackendError(f"http: url={options.url}: a URL with ? or # cannot be served")
        if not 4096 <= options.chunk_bytes <= CHUNK_BYTES_MAX or options.chunk_bytes % 4096:
            raise BackendError(
                f"http: chunk_bytes={options.chunk_bytes} is not a multiple of 4K from 4K to 64M"
            )
        base, _, self._path = url.path.rpartition("/")
        self._base, self._path = f"{url.scheme}://{url.netloc}{base}", unquote(self._path)
        self._memory = MemoryCache(options.memory)
        self._cache: ChunkCache | None = None
        self._ending: Ending | None = None
        self._fetching: dict[int, asyncio.Task[bytes]] = {}
        self.fetched = 0

    async def open(self, hint: Hint) -> Properties:
        """Ask for the file's first byte, which shows its size and whether the server knows ranges."""
        options = self.options
        entry_directory(options.cache, hint.node)
        self._obstore = library("http")
        self._patience = Patience(self._obstore, f"http: {options.url}", options.timeout)
        self._store = self._make_store()
        try:
            self._version, _ = await self._patience.ask(lambda: self._get(0, 1))
        except FileNotFoundError:
            raise BackendError(f"http: {options.url}: no such file (404)") from None
        except self._obstore.exceptions.NotSupportedError as error:
            raise BackendError(
                f"http: {options.url}: the server ignores Range and sends the whole file: it cannot be a disk"
            ) from error
        size_bytes = self._version.size_bytes
        if hint.size_bytes > size_bytes:
            raise BackendError(
                f"http: {options.url}: has {size_bytes} bytes, "
                f"fewer than device {hint.device} with {format_size(hint.size_bytes)}"
            )
        self._open_cache()
        return Properties(
            size_bytes=hint.size_bytes or size_bytes,
            logical_block_bytes=_BLOCK_BYTES,
            read_only=True,
            identity=self._identity(),
        )

    def _make_store(self) -> Any:
        options = self.options
        return self._obstore.store.HTTPStore(
            self._base,
            client_options={
                "allow_http": options.url.startswith("http:"),
                "allow_invalid_certificates": options.insecure,
                "timeout": timedelta(seconds=options.request_timeout),
                "connect_timeout": CONNECT_S,
            },
            retry_config={"max_retries": 0},
        )

    def _open_cache(self) -> None:
        options, name = self.options, self._version.name
        if options.cache is None:
            return
        if not name:
            raise BackendError(
                f"http: {options.url}: the server sends no ETag and no Last-Modified: leave cache= out"
            )
        store = f"http {options.url} {name} {options.chunk_bytes}"
        self._cache = ChunkCache(options.cache, store, options.cache_size)

    def _identity(self) -> Identity:
        if not self._version.name:
            log.warning("%s: no ETag and no Last-Modified: a change goes unnoticed", self.options.url)
        return Identity(
            value=f"http:{self.options.url}:{self._version.name}", strength="weak", store=self.options.url
        )

    def started(self, device: Device) -> None:
        """From now on an absent server is awaited."""
        self._patience.ending = self._ending = Ending(device)

    async def _get(self, start: int, end: int) -> tuple[Version, bytes]:
        result: Any = await self._obstore.get_async(self._store, self._path, options={"range": (start, end)})
        meta: Mapping[str, Any] = result.meta
        version = Version(meta.get("e_tag") or "", str(meta.get("last_modified") or ""), int(meta["size"]))
        if not version.e_tag and version.modified.startswith("1970-01-01 00:00:00"):
            version = Version("", "", version.size_bytes)
        return version, bytes(await result.bytes_async())

    async def _get_or_look(self, start: int, end: int) -> tuple[Version, bytes]:
        """A range; of a file that has become shorter its size: a server refuses a range behind the end."""
        try:
            return await self._get(start, end)
        except self._obstore.exceptions.GenericError:
            meta = await self._obstore.head_async(self._store, self._path)
            if int(meta["size"]) >= end:
                raise
            return Version(
                meta.get("e_tag") or "", str(meta.get("last_modified") or ""), int(meta["size"])
            ), b""

    async def pread(self, buf: memoryview, offset: int) -> None:
        """Fill the buffer from chunks, which are fetched at the same time."""
        chunk_bytes = self.options.chunk_bytes
        first, last = offset // chunk_bytes, (offset + len(buf) - 1) // chunk_bytes
        chunks = await asyncio.gather(*(self._chunk(index) for index in range(first, last + 1)))
        at = 0
        for index, chunk in zip(range(first, last + 1), chunks, strict=True):
            start = max(offset - index * chunk_bytes, 0)
            piece = chunk[start : start + len(buf) - at]
            buf[at : at + len(piece)] = piece
            at += len(piece)
        if at < len(buf):
            raise OSError(errno.EIO, "the file ends within the disk")

    def _chunk(self, index: int) -> Awaitable[bytes]:
        """A chunk; requests for the same one share a task."""
        task = self._fetching.get(index)
        if task is None:
            task = self._fetching[index] = asyncio.get_running_loop().create_task(self._fetch(index))
            task.add_done_callback(lambda _: self._fetching.pop(index, None))
        # A request that is cancelled must not cancel the others'.
        return asyncio.shield(task)

    async def _fetch(self, index: int) -> bytes:
        data = self._memory.get(index)
        if data is None and self._cache is not None:
            data = await asyncio.to_thread(self._cache.get, index, self._version.name)
        if data is None:
            data = await self._download(index)
            if self._cache is not None:
                await asyncio.to_thread(self._cache.put, index, self._version.name, data)
        self._memory.put(index, data)
        return data

    async def _download(self, index: int) -> bytes:
        assert self._ending is not None
        start = index * self.options.chunk_bytes
        end = min(start + self.options.chunk_bytes, self._version.size_bytes)
        try:
            version, data = await self._patience.ask(lambda: self._get_or_look(start, end))
        except (FileNotFoundError, self._obstore.exceptions.BaseError) as error:
            await self._ending.end(
                f"http: {self.options.url}: the file can no longer be read: {first_line(error)}"
            )
        if version != self._version or len(data) != end - start:
            await self._ending.end(
                f"http: {self.options.url}: the file has changed while it was served ({version.name or 'no version'}, "
                f"it was {self._version.name or 'without one'}): bring it back, or ublkpool rebind accepts the new one"
            )
        self.fetched += 1
        return data

    def statistics(self) -> Mapping[str, int]:
        """Chunks fetched, requests tried again, hits of the local cache."""
        cache = self._cache
        return {
            "fetched": self.fetched,
            "retries": self._patience.retries,
            "cache_hits": cache.hits if cache else 0,
        }

    def close(self) -> None:
        """Nothing is left at the server."""
        if self._ending is not None:
            self._ending.close()
