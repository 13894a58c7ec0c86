"""The chunk objects: each has a head with the writer's generation, and no two have the same content.

A PUT names the version (ETag) that it replaces, so that a request of a dead process, which reaches the store late,
fails once a newer one has landed.  In most stores an ETag is a hash of the content.  If an old content could come back,
its ETag would, too, and a late PUT would match again; so each object contains the generation of its writer and a
number that rises with each PUT.  For the same reason nothing is deleted: zeros are an object without data.

Owns what is known of each chunk, and the chunks in memory.  All methods run on the asyncio loop; the caller keeps
requests for the same chunk apart.
"""

import asyncio
import struct
import uuid
import zlib
from typing import Any, NamedTuple

from ublkpool.backends._objects.chunk_cache import ChunkCache
from ublkpool.backends._objects.client import Ending, Patience
from ublkpool.backends._objects.memory_cache import MemoryCache

_HEAD = struct.Struct("<8s16sQQII16x")
"""Magic, the disk's UUID, generation and number of the PUT, bytes of the data (0: all zeros), CRC32 of the data."""
_MAGIC = b"UBLKS3C1"


class Known(NamedTuple):
    """The version of a chunk that this process has seen last; `e_tag` is empty for a chunk without an object."""

    e_tag: str
    generation: int


class Chunks:
    """The chunks of one disk, written with one generation."""

    def __init__(
        self,
        obstore: Any,
        store: Any,
        patience: Patience,
        ending: Ending,
        disk: uuid.UUID,
        generation: int,
        chunk_bytes: int,
        memory: MemoryCache,
        cache: ChunkCache | None,
    ) -> None:
        self._obstore, self._store, self._patience, self._ending = obstore, store, patience, ending
        self._disk, self._generation = disk, generation
        self._zeros = bytes(chunk_bytes)
        self._memory, self._cache = memory, cache
        self._known: dict[int, Known] = {}
        self._number = 0
        self.gets = self.puts = self.conflicts = 0

    async def read(self, index: int, claim: bool) -> bytes:
        """A whole chunk; with `claim` it is this generation's afterwards, so that no late PUT changes it."""
        data = await self._current(index)
        if claim and self._known[index].generation != self._generation:
            return await self.change(index, 0, b"")
        return data

    async def change(self, index: int, at: int, piece: memoryview | bytes) -> bytes:
        """Replace a part of a chunk by `piece`; returns the whole chunk."""
        while True:
            if len(piece) == len(self._zeros):
                await self._look(index)
                data = bytes(piece)
            elif piece:
                data = await self._current(index)
                data = b"".join((data[:at], piece, data[at + len(piece) :]))
            else:
                data = await self._current(index)
            if await self._put(index, data):
                return data

    async def clear(self, index: int, must: bool) -> None:
        """Make a whole chunk zeros.  Without `must` a chunk without an object stays so, and a late PUT may make one."""
        while True:
            await self._look(index)
            if (not must and not self._known[index].e_tag) or await self._put(index, self._zeros):
                return

    async def _look(self, index: int) -> None:
        """Learn a chunk's version, whose content is about to be replaced."""
        if index in self._known:
            return
        try:
            meta = await self._patience.ask(lambda: self._obstore.head_async(self._store, name_of(index)))
        except FileNotFoundError:
            self._known[index] = Known("", 0)
        else:
            self._known[index] = Known(str(meta["e_tag"]), 0)

    async def _current(self, index: int) -> bytes:
        """The chunk as this process has seen it last, else from the cache or the store."""
        data = self._memory.get(index)
        if data is None:
            data = await self._load(index)
            self._memory.put(index, data)
        return data

    async def _load(self, index: int, again: bool = False) -> bytes:
        """The chunk in the version that was seen last, from the cache if it is there; `again`: in its latest one."""
        known, cached = self._known.get(index), None
        if known is not None and not known.e_tag and not again:
            return self._zeros
        if self._cache is not None:
            cached = await asyncio.to_thread(self._from_cache, self._cache, index, known)
            if cached is not None and known is not None and not again:
                return self._parsed(index, *cached)
        try:
            e_tag, body = await self._patience.ask(lambda: self._get(index, cached[0] if cached else ""))
        except FileNotFoundError:
            return await self._missing(index, known)
        except self._obstore.exceptions.NotModifiedError:
            assert cached is not None
            return self._parsed(index, *cached)
        self.gets += 1
        data = self._parsed(index, e_tag, body)
        if self._cache is not None:
            await asyncio.to_thread(self._cache.put, index, e_tag, body)
        return data

    @staticmethod
    def _from_cache(cache: ChunkCache, index: int, known: Known | None) -> tuple[str, bytes] | None:
        version = known.e_tag if known is not None else cache.version(index)
        body = cache.get(index, version) if version else None
        return (version, body) if version and body is not None else None

    async def _missing(self, index: int, known: Known | None) -> bytes:
        if known is not None and known.e_tag:
            await self._ending.end(f"s3: the object of chunk {index} is gone: nothing here deletes objects")
        self._known[index] = Known("", 0)
        return self._zeros

    async def _get(self, index: int, not_version: str) -> tuple[str, bytes]:
        options = {"if_none_match": not_version} if not_version else None
        result = await self._obstore.get_async(self._store, name_of(index), options=options)
        return str(result.meta["e_tag"]), bytes(await result.bytes_async())

    def _parsed(self, index: int, e_tag: str, body: bytes) -> bytes:
        """The data of an object; notes its version.  Raises `OSError` for an object that is damaged or foreign."""
        if len(body) < _HEAD.size:
            raise OSError(f"s3: chunk {index} has {len(body)} bytes, no head")
        magic, disk, generation, _, data_bytes, crc = _HEAD.unpack_from(body)
        data = body[_HEAD.size :]
        if magic != _MAGIC or disk != self._disk.bytes:
            raise OSError(f"s3: chunk {index} is not of the disk {self._disk}")
        if len(data) != data_bytes or data_bytes not in (0, len(self._zeros)) or zlib.crc32(data) != crc:
            raise OSError(f"s3: chunk {index} is damaged: its checksum or length is wrong")
        self._known[index] = Known(e_tag, generation)
        return data or self._zeros

    async def _put(self, index: int, data: bytes) -> bool:
        """Replace the version that was seen last; False if there is another, which the next look shows."""
        known = self._known[index]
        self._number += 1
        stored = b"" if data is self._zeros else data
        head = _HEAD.pack(
            _MAGIC, self._disk.bytes, self._generation, self._number, len(stored), zlib.crc32(stored)
        )
        body = head + stored
        try:
            result = await self._patience.ask(lambda: self._put_once(index, body, known.e_tag))
        except (
            self._obstore.exceptions.PreconditionError,
            self._obstore.exceptions.AlreadyExistsError,
            FileNotFoundError,
        ):
            await self._changed_by_another(index)
            return False
        self.puts += 1
        e_tag = str(result["e_tag"])
        self._known[index] = Known(e_tag, self._generation)
        self._memory.put(index, data)
        if self._cache is not None:
            await asyncio.to_thread(self._cache.put, index, e_tag, body)
        return True

    async def _put_once(self, index: int, body: bytes, e_tag: str) -> Any:
        mode: Any = {"e_tag": e_tag} if e_tag else "create"
        return await self._obstore.put_async(
            self._store, name_of(index), body, mode=mode, use_multipart=False
        )

    async def _changed_by_another(self, index: int) -> None:
        """A late PUT of a predecessor has landed, or our own whose answer was lost, or a successor writes.

        Looks again; ends the backend if a successor has written.
        """
        self.conflicts += 1
        self._memory.put(index, await self._load(index, again=True))
        generation = self._known[index].generation
        if generation > self._generation:
            await self._ending.end(
                f"s3: generation {generation} has written chunk {index}: this backend with generation "
                f"{self._generation} has been replaced"
            )


def name_of(index: int) -> str:
    """The name of a chunk's object."""
    return f"chunks/{index:012x}"
