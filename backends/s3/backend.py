"""The backend s3: a disk of chunk objects, each written as a whole, with conditional PUTs.

A write is answered when the store has answered its PUTs, so it survives this process and a power failure: there is no
volatile cache.  Parts of a chunk are read, changed and written back; `exclusive_bytes` keeps requests for one chunk
apart.
"""

import asyncio
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec

from ublkpool.backends._objects.chunk_cache import ChunkCache, entry_directory
from ublkpool.backends._objects.client import CONNECT_S, Ending, Patience, check_times, check_url, library
from ublkpool.backends._objects.memory_cache import MemoryCache
from ublkpool.backends.s3.chunks import Chunks
from ublkpool.backends.s3.disk import Disk, Header, is_chunk
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties
from ublkpool.bufpool.sizes import ByteSize, format_size
from ublkpool.bufpool.wire import Identity

_CHUNK_BYTES = 1 << 20
_CLEARED_MAX = 256
"""Chunks of one DISCARD or WRITE_ZEROES: each may need a PUT, and a request should end before `io_timeout`."""
_AT_ONCE = 16
"""Objects that one request reads or writes at the same time."""


class S3Options(msgspec.Struct, frozen=True, kw_only=True):
    """Credentials come from the environment, as obstore reads it; docs/BACKENDS.md has the table."""

    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""
    size: ByteSize = 0
    chunk_bytes: ByteSize = 0
    claim: Literal["writes", "all"] = "writes"
    memory: ByteSize = 32 << 20
    cache: Path | None = None
    cache_size: ByteSize = 1 << 30
    timeout: float = 0.0
    request_timeout: float = 30.0


class S3Backend(Backend):
    """A disk in an S3-like store."""

    Options = S3Options

    def __init__(self, options: S3Options) -> None:
        """Raises `BackendError` for options that cannot be used."""
        self.options: S3Options = options
        chunk_bytes = options.chunk_bytes
        check_times("s3", options.timeout, options.request_timeout)
        if options.endpoint:
            check_url("s3: endpoint", options.endpoint)
        if not options.bucket:
            raise BackendError("s3: bucket= is empty: it names the bucket")
        if chunk_bytes and not is_chunk(chunk_bytes):
            raise BackendError(f"s3: chunk_bytes={chunk_bytes} is not a power of two from 4K to 64M")
        self._where = f"s3://{options.bucket}/{options.prefix}"
        self._ending: Ending | None = None
        self._chunks: Chunks | None = None
        self._header: Header | None = None

    async def open(self, hint: Hint) -> Properties:
        """Read the header object, or create it for a device that was never served."""
        options = self.options
        entry_directory(options.cache, hint.node)
        self._obstore = library("s3")
        self._patience = Patience(self._obstore, self._where, options.timeout)
        self._store = self._make_store()
        self._disk = Disk(self._obstore, self._store, self._patience, self._where)
        self._header = header = await self._disk.load() or await self._create(hint)
        self._check(header, hint)
        size_bytes = hint.size_bytes or options.size or header.size_bytes
        self.exclusive_bytes = header.chunk_bytes
        length_max = min(size_bytes, _CLEARED_MAX * header.chunk_bytes)
        return Properties(
            size_bytes=size_bytes,
            logical_block_bytes=512,
            read_only=False,
            discard_granularity_bytes=header.chunk_bytes,
            discard_max_bytes=length_max,
            write_zeroes_max_bytes=length_max,
            identity=Identity(value=f"s3:{header.uuid}", store=self._where),
            generation_seen=header.generation,
        )

    def _make_store(self) -> Any:
        options = self.options
        config: dict[str, Any] = {"conditional_put": "etag"}
        if options.endpoint:
            config |= {"endpoint": options.endpoint, "virtual_hosted_style_request": False}
        if options.region:
            config["region"] = options.region
        try:
            return self._obstore.store.S3Store(
                options.bucket,
                prefix=options.prefix or None,
                config=config,
                client_options={
                    "allow_http": options.endpoint.startswith("http:"),
                    "timeout": timedelta(seconds=options.request_timeout),
                    "connect_timeout": CONNECT_S,
                },
                retry_config={"max_retries": 0},
            )
        except (self._obstore.exceptions.BaseError, ValueError) as error:
            raise BackendError(f"{self._where}: {error}") from error

    async def _create(self, hint: Hint) -> Header:
        size_bytes = hint.size_bytes or self.options.size
        if not hint.may_create:
            raise BackendError(
                f"{self._where}: no header object, and this device has been served before: no empty disk is made; "
                "bring the objects back (ublkpool rebind accepts another disk in their place)"
            )
        if not size_bytes:
            raise BackendError(f"{self._where}: no header object; with size=SIZE a disk is created")
        if size_bytes % 512:
            raise BackendError(f"{self._where}: size={size_bytes} is not a multiple of 512")
        return await self._disk.create(size_bytes, self.options.chunk_bytes or _CHUNK_BYTES)

    def _check(self, header: Header, hint: Hint) -> None:
        options = self.options
        if options.chunk_bytes and options.chunk_bytes != header.chunk_bytes:
            raise BackendError(
                f"{self._where}: its chunks have {format_size(header.chunk_bytes)}, "
                f"not chunk_bytes={format_size(options.chunk_bytes)}: leave the option out"
            )
        asked_bytes = max(hint.size_bytes, options.size)
        if asked_bytes > header.size_bytes:
            raise BackendError(
                f"{self._where}: has {format_size(header.size_bytes)}, fewer than {format_size(asked_bytes)}"
            )

    async def started(self, device: Device) -> None:
        """Fence off all predecessors: raise the generation in the header."""
        header = self._header
        assert header is not None
        generation = await self._disk.attach(device.generation)
        self._patience.ending = self._ending = Ending(device)
        options, cache = self.options, None
        if options.cache is not None:
            cache = ChunkCache(options.cache, f"s3 {header.uuid}", options.cache_size)
        self._chunks = Chunks(
            self._obstore,
            self._store,
            self._patience,
            self._ending,
            uuid.UUID(header.uuid),
            generation,
            header.chunk_bytes,
            MemoryCache(options.memory),
            cache,
        )

    async def resize(self, size_bytes: int) -> None:
        """Write the new size into the header object; the new chunks are absent and read as zeros."""
        await self._disk.resize(size_bytes)

    async def pread(self, buf: memoryview, offset: int) -> None:
        """Fill the buffer from the chunks."""

        async def read(index: int, at: int, length: int, done: int) -> None:
            chunk = await self._open.read(index, self.options.claim == "all")
            buf[done : done + length] = chunk[at : at + length]

        await _at_once(read(*each) for each in self._pieces(offset, len(buf)))

    async def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        """Change the chunks; stable when this returns, with FUA or without."""

        async def write(index: int, at: int, length: int, done: int) -> None:
            # A copy: the chunk stays in memory after the answer, and a client may change its buffer meanwhile.
            await self._open.change(index, at, bytes(buf[done : done + length]))

        await _at_once(write(*each) for each in self._pieces(offset, len(buf)))

    async def flush(self) -> None:
        """Every answered write is stable."""

    async def trim(self, offset: int, length: int) -> None:
        """Whole chunks become zeros; the rest stays."""
        chunk_bytes = self.exclusive_bytes
        whole = [each for each in self._pieces(offset, length) if each[2] == chunk_bytes]
        await _at_once(self._open.clear(index, must=False) for index, _, _, _ in whole)

    async def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """Whole chunks become objects without data, parts are written."""

        async def clear(index: int, at: int, length: int, done: int) -> None:
            if length == self.exclusive_bytes:
                await self._open.clear(index, must=True)
            else:
                await self._open.change(index, at, bytes(length))

        await _at_once(clear(*each) for each in self._pieces(offset, length))

    @property
    def _open(self) -> Chunks:
        assert self._chunks is not None
        return self._chunks

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """Chunk, offset in it, length, and how much of the request comes before it."""
        chunk_bytes, done = self.exclusive_bytes, 0
        while done < length:
            index, at = divmod(offset + done, chunk_bytes)
            piece_bytes = min(chunk_bytes - at, length - done)
            yield index, at, piece_bytes, done
            done += piece_bytes

    def statistics(self) -> Mapping[str, int]:
        """Objects read and written, PUTs that met another version, requests tried again."""
        chunks = self._chunks
        if chunks is None:
            return {}
        return {
            "gets": chunks.gets,
            "puts": chunks.puts,
            "conflicts": chunks.conflicts,
            "retries": self._patience.retries,
        }

    def close(self) -> None:
        """Nothing is left at the store."""
        if self._ending is not None:
            self._ending.close()


async def _at_once(calls: Iterator[Any]) -> None:
    """Await all, a bounded number at a time.  Raises the first error when all have ended."""
    limit = asyncio.Semaphore(_AT_ONCE)

    async def bounded(call: Any) -> None:
        async with limit:
            await call

    results = await asyncio.gather(*map(bounded, calls), return_exceptions=True)
    for each in results:
        if isinstance(each, BaseException):
            raise each
