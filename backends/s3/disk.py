"""The header object of a disk: what it is, and the highest generation that has been attached.

The header is created only for a device that was never served.  A successor raises the generation in it by a conditional
PUT before it serves; a header with a higher one means that this process has been replaced.
"""

import uuid
from contextlib import suppress
from typing import Any

import msgspec

from ublkpool.backends._objects.client import CHUNK_BYTES_MAX, Patience
from ublkpool.bufpool.errors import BackendError

_NAME = "header"
_FORMAT = "ublkpool-s3"
_OTHER_VERSION = '"00000000000000000000000000000000"'


def is_chunk(chunk_bytes: int) -> bool:
    """Whether chunks may have this size: a power of two, 4K to 64M."""
    return 4096 <= chunk_bytes <= CHUNK_BYTES_MAX and not chunk_bytes & (chunk_bytes - 1)


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of the header object; sizes are bytes."""

    format: str
    version: int
    uuid: str
    size_bytes: int
    chunk_bytes: int
    generation: int


class Disk:
    """The header of one disk, as it was seen last."""

    def __init__(self, obstore: Any, store: Any, patience: Patience, where: str) -> None:
        self._obstore, self._store, self._patience, self._where = obstore, store, patience, where
        self._e_tag = ""
        self.header: Header | None = None

    async def load(self) -> Header | None:
        """The header, None if there is none.  Raises `BackendError` for one that cannot be read."""
        try:
            self._e_tag, body = await self._patience.ask(self._get)
        except FileNotFoundError:
            self.header = None
            return None
        try:
            self.header = header = msgspec.json.decode(body, type=Header)
            uuid.UUID(header.uuid)
        except (msgspec.DecodeError, ValueError) as error:
            raise BackendError(f"s3: {self._where}: the header object is damaged: {error}") from error
        if header.format != _FORMAT or header.version != 1:
            raise BackendError(
                f"s3: {self._where}: format {header.format} {header.version} is not {_FORMAT} 1"
            )
        if not is_chunk(header.chunk_bytes) or header.size_bytes < 512 or header.size_bytes % 512:
            raise BackendError(
                f"s3: {self._where}: the header object is damaged: "
                f"size_bytes {header.size_bytes}, chunk_bytes {header.chunk_bytes}"
            )
        return header

    async def _get(self) -> tuple[str, bytes]:
        result = await self._obstore.get_async(self._store, _NAME)
        return str(result.meta["e_tag"]), bytes(await result.bytes_async())

    async def create(self, size_bytes: int, chunk_bytes: int) -> Header:
        """A new disk of zeros.  If another process has created one meanwhile, that is the disk."""
        header = Header(
            format=_FORMAT,
            version=1,
            uuid=str(uuid.uuid4()),
            size_bytes=size_bytes,
            chunk_bytes=chunk_bytes,
            generation=0,
        )
        with suppress(self._obstore.exceptions.AlreadyExistsError):
            await self._patience.ask(lambda: self._put(header, "create"))
        found = await self.load()
        if found is None:
            raise BackendError(f"s3: {self._where}: the header object that was just made is gone")
        return found

    async def attach(self, generation: int) -> int:
        """Raise the generation in the header; returns it.  Raises `BackendError` if a successor has attached.

        Also raises it if the store ignores the conditions of a PUT: nothing would keep late requests out.
        """
        await self._check_conditions()
        while True:
            header = self.header
            assert header is not None
            wanted = generation or header.generation + 1
            if header.generation >= wanted:
                raise BackendError(
                    f"s3: {self._where}: generation {header.generation} has been attached, this one is {wanted}: "
                    "another backend serves this disk"
                )
            raised = msgspec.structs.replace(header, generation=wanted)
            if await self._replace(raised):
                return wanted

    async def resize(self, size_bytes: int) -> None:
        """Raise the size in the header.  Raises `BackendError` if a successor has attached."""
        assert self.header is not None
        generation = self.header.generation
        while self.header.size_bytes < size_bytes:
            if self.header.generation != generation:
                raise BackendError(
                    f"s3: {self._where}: generation {self.header.generation} has been attached: "
                    "another backend serves this disk"
                )
            await self._replace(msgspec.structs.replace(self.header, size_bytes=size_bytes))

    async def _replace(self, header: Header) -> bool:
        """Replace the header; False if it was changed meanwhile, also by a PUT of ours whose answer was lost."""
        try:
            result = await self._patience.ask(lambda: self._put(header, {"e_tag": self._e_tag}))
        except (self._obstore.exceptions.PreconditionError, FileNotFoundError):
            if await self.load() == header:
                return True
            if self.header is None:
                raise BackendError(f"s3: {self._where}: the header object is gone") from None
            return False
        self._e_tag, self.header = str(result["e_tag"]), header
        return True

    async def _check_conditions(self) -> None:
        """Make PUTs that must fail; they would change nothing."""
        header = self.header
        assert header is not None
        for mode in ("create", {"e_tag": _OTHER_VERSION}):
            try:
                await self._patience.ask(lambda mode=mode: self._put(header, mode))  # type: ignore[misc]
            except (self._obstore.exceptions.AlreadyExistsError, self._obstore.exceptions.PreconditionError):
                continue
            raise BackendError(
                f"s3: {self._where}: the store ignores If-Match or If-None-Match of a PUT: "
                "a late request of a dead backend could overwrite newer data; use a store that honours them"
            )

    async def _put(self, header: Header, mode: Any) -> Any:
        body = msgspec.json.encode(header)
        return await self._obstore.put_async(self._store, _NAME, body, mode=mode, use_multipart=False)
