"""A cache of chunks on a local disk, which several devices and processes share and which survives restarts.

An entry is a file, named after the store and the chunk, that contains the version (etag) of the chunk, the data, and a
checksum of both and of the file's name.  It is written under another name and then renamed, so that a reader finds a
whole entry or none; what a power failure or a fault of the disk made of it fails the checksum and is a miss.  An entry
of another version is a miss.  Every failure of the disk is a miss, too: the store has the data.

The entries used least recently, by modification time, are deleted when all together exceed the bound.  Each process
counts what it adds and looks at the directory from time to time, so the bound may be exceeded by a quarter, or by two
chunks, for each process.

Several threads may call, each for other chunks; the calls wait for the disk.
"""

import hashlib
import itertools
import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import log
from ublkpool.bufpool.way_out import explain

_MAGIC = b"UBLKCC02"
_HEAD = struct.Struct("<8sII32s")
"""Magic, bytes of the version, bytes of the data, BLAKE2 of store, chunk, version and data."""
_VERSION_BYTES_MAX = 4096
_PARTIAL = ".partial-"
_PARTIAL_S = 60.0
"""After how many seconds a file without its name is that of a dead process."""


class Entry(NamedTuple):
    """A file of the cache, for the choice of what to delete."""

    used_at_s: float
    size_bytes: int
    path: Path


class ChunkCache:
    """The entries of one store in a shared directory."""

    def __init__(self, directory: Path, store: str, bytes_max: int) -> None:
        """`store` identifies the store.  Raises `BackendError` for a directory that cannot be used."""
        key = hashlib.blake2b(store.encode(), digest_size=16).hexdigest()
        self._root, self._place, self._bytes_max = directory, directory / key, bytes_max
        self._numbers = itertools.count()
        self._failed = False
        self.hits = self.misses = 0
        try:
            self._place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BackendError(f"cache={directory}: {explain(error)}") from error
        self._added_bytes = bytes_max

    def version(self, index: int) -> str | None:
        """The version of the entry of a chunk, None without an entry that begins well."""
        with suppress(OSError, ValueError), self._path(index).open("rb") as file:
            magic, version_bytes, _, _ = _HEAD.unpack(_whole(file.read(_HEAD.size), _HEAD.size))
            # A damaged length must not become an allocation.
            if magic == _MAGIC and version_bytes <= _VERSION_BYTES_MAX:
                return _whole(file.read(version_bytes), version_bytes).decode()
        return None

    def get(self, index: int, version: str) -> bytes | None:
        """The data of a chunk in this version, None if there is none or it is damaged."""
        path = self._path(index)
        data = None
        with suppress(OSError):
            data = _checked(path, path.read_bytes(), version)
        if data is None:
            self.misses += 1
            return None
        self.hits += 1
        with suppress(OSError):
            os.utime(path)
        return data

    def put(self, index: int, version: str, data: bytes) -> None:
        """Store the data of a chunk; a failure is logged once and otherwise ignored."""
        path = self._path(index)
        partial = self._place / f"{_PARTIAL}{os.getpid()}-{id(self)}-{next(self._numbers)}"
        name = version.encode()
        try:
            head = _HEAD.pack(_MAGIC, len(name), len(data), _digest(path, name, data))
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(head + name)
                file.write(data)
            partial.replace(path)
            self._added_bytes += _HEAD.size + len(name) + len(data)
            if self._added_bytes > self._bytes_max // 4:
                self._shrink()
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            if not self._failed:
                self._failed = True
                log.warning("cache=%s: going on without what does not fit: %s", self._root, explain(error))

    def _path(self, index: int) -> Path:
        return self._place / f"{index:016x}"

    def _shrink(self) -> None:
        """Delete the entries used least recently, of all stores, until the rest is below the bound."""
        self._added_bytes = 0
        entries = sorted(_entries(self._root))
        excess_bytes = sum(each.size_bytes for each in entries) - self._bytes_max
        for entry in entries:
            is_partial = entry.path.name.startswith(_PARTIAL)
            if is_partial and time.time() - entry.used_at_s > _PARTIAL_S:
                entry.path.unlink(missing_ok=True)
            elif excess_bytes > 0 and not is_partial:
                entry.path.unlink(missing_ok=True)
                excess_bytes -= entry.size_bytes


def _entries(root: Path) -> list[Entry]:
    found = []
    for path in root.glob("*/*"):
        # Another process may delete it meanwhile.
        with suppress(OSError):
            status = path.stat()
            found.append(Entry(status.st_mtime, status.st_size, path))
    return found


def _digest(path: Path, version: bytes, data: bytes) -> bytes:
    # The chunks of a file on a web server have the same version: one in another's place must be a miss.
    digest = hashlib.blake2b(f"{path.parent.name}/{path.name}/".encode(), digest_size=32)
    digest.update(len(version).to_bytes(4, "little") + version)
    digest.update(data)
    return digest.digest()


def _checked(path: Path, content: bytes, version: str) -> bytes | None:
    """The data of an entry, None if it is of another version or damaged."""
    if len(content) < _HEAD.size:
        return None
    magic, version_bytes, data_bytes, digest = _HEAD.unpack_from(content)
    at = _HEAD.size + version_bytes
    if magic != _MAGIC or len(content) != at + data_bytes or content[_HEAD.size : at] != version.encode():
        return None
    data = content[at:]
    return data if _digest(path, version.encode(), data) == digest else None


def _whole(content: bytes, length: int) -> bytes:
    if len(content) != length:
        raise ValueError("cut short")
    return content


def entry_directory(cache: Path | None, node: Path | None) -> None:
    """Raise `BackendError` for a cache on the disk that is to be served through it."""
    if cache is None or node is None:
        return
    from ublkpool.bufpool.sdk.claim import refuse_own_disk

    place = cache
    while not place.exists() and place != place.parent:
        place = place.parent
    refuse_own_disk(place, node)
