"""The backend that calls the functions of a plugin of nbdkit.

Owns the order of the calls, which is nbdkit's for a server with one client, and the defaults for functions that the
plugin does not have.  `pread` and `pwrite` of API version 2 get the memory of the request itself.

What differs from nbdkit: a callback that calls `set_error` and returns fails its request, and the errno of an `OSError`
answers the request where nbdkit answers EIO.
"""

import errno
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties
from ublkpool.bufpool.sdk.nbdkit import api
from ublkpool.bufpool.sdk.nbdkit.script import Script
from ublkpool.bufpool.sdk.options import Given
from ublkpool.bufpool.sdk.requests import log

CALLBACKS = (
    *("config", "config_complete", "thread_model", "get_ready", "after_fork", "preconnect"),
    *("open", "get_size", "block_size", "is_rotational"),
    *("can_write", "can_flush", "can_trim", "can_zero", "can_fua"),
    *("pread", "pwrite", "flush", "trim", "zero"),
    *("close", "cleanup"),
)
"""The callbacks that are called, in the order of a plugin's life; docs/BACKENDS.md says when."""
CALLBACKS_IGNORED = (
    "dump_plugin",
    "list_exports",
    "default_export",
    "export_description",
    "can_multi_conn",
    "can_fast_zero",
    "can_cache",
    "cache",
    "can_extents",
    "extents",
)
"""Callbacks that a plugin may define and that no disk needs: there is one client, without exports and extents."""
PARALLEL_REQUESTS = 16
"""Requests that a plugin with THREAD_MODEL_PARALLEL executes at once: nbdkit's default for `--threads`."""
_LOGICAL_MIN, _LOGICAL_MAX = 512, 4096
_PREFERRED_DEFAULT = 4096
_PREFERRED_MAX, _MINIMUM_MAX = 32 << 20, 64 << 10
_PHYSICAL_MAX = 1 << 20
_UNLIMITED = (1 << 32) - 1
_PIECE_BYTES = 1 << 30
"""`trim` and `zero` of a plugin take lengths of 32 bits."""
_ZEROES = bytes(1 << 20)


class BlockSize(NamedTuple):
    """What `block_size` returned, in bytes: smallest request, request without read-modify-write, largest request."""

    minimum: int = 1
    preferred: int = _PREFERRED_DEFAULT
    maximum: int = _UNLIMITED


class Abilities(NamedTuple):
    """What the plugin can do, as `can_*` and its functions say."""

    write: bool
    flush: bool
    trim: bool
    zero: bool
    fua: int


def load_plugin(path: Path, given: Given) -> "NbdkitBackend":
    """The plugin in this file with its parameters, not opened yet.  Raises `BackendError`."""
    backend = NbdkitBackend(path)
    try:
        backend.configure(given)
    except BaseException:
        backend.unload()
        raise
    return backend


class NbdkitBackend(Backend):
    """A plugin of nbdkit as a backend.  Raises `BackendError` for a file that cannot be loaded."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._device: Device | None = None
        self._end_reason = ""
        self._script = Script(path, api.Api(self._end))
        self._is_v1 = self._script.api_version == 1
        self.survives_death = self._script.attribute("survives_death") is not False
        self._handle: Any = None
        self._block = BlockSize()
        self._can = Abilities(False, False, False, False, api.FUA_NONE)
        self._always_fua = False
        self._closers: list[Callable[[], None]] = []

    # Loading.

    def configure(self, given: Given) -> None:
        """Give the plugin its parameters, in their order.  Raises `BackendError` for one that it does not take."""
        script = self._script
        for key, value in _pairs(given):
            if not script.has("config"):
                raise BackendError(
                    f"{script.path}: unknown option {key}={value}: this plugin has no config(key, value)"
                )
            script.ask("config", key, value)
        self._call_if_defined("config_complete")
        self.parallel = PARALLEL_REQUESTS if self._thread_model() == api.THREAD_MODEL_PARALLEL else 1

    def _thread_model(self) -> int:
        if not self._script.has("thread_model"):
            return 0
        model = self._whole_number("thread_model", self._script.ask("thread_model"))
        if not 0 <= model <= api.THREAD_MODEL_PARALLEL:
            raise BackendError(f"{self._script.path}: thread_model() is {model}, no nbdkit.THREAD_MODEL_*")
        return model

    def open(self, hint: Hint) -> Properties:
        """Start the plugin, open it and ask for its properties.  Raises `BackendError` if a callback fails."""
        try:
            return self._open(hint)
        except BaseException:
            self.close()
            raise

    def _open(self, hint: Hint) -> Properties:
        script = self._script
        self._closers.append(lambda: self._call_if_defined("cleanup"))
        for each in ("get_ready", "after_fork"):
            self._call_if_defined(each)
        self._call_if_defined("preconnect", hint.read_only)
        self._handle = script.ask("open", hint.read_only)
        self._closers.append(lambda: self._call_if_defined("close", self._handle))
        size_bytes = self._whole_number("get_size", script.ask("get_size", self._handle))
        if size_bytes <= 0:
            # In `Properties` 0 means the device's size: an empty store would be served with that.
            raise BackendError(f"{script.path}: get_size() is {size_bytes}: there is nothing to serve")
        self._block = self._block_size()
        self._can = self._abilities(hint.read_only)
        # No FLUSH reaches the plugin: each answered write must survive a power failure.
        self._always_fua = self._can.fua == api.FUA_NATIVE and not self._can.flush
        logical = max(_LOGICAL_MIN, self._block.minimum)
        return Properties(
            size_bytes=size_bytes,
            logical_block_bytes=logical,
            physical_block_bytes=max(logical, min(self._block.preferred, _PHYSICAL_MAX)),
            volatile_cache=self._can.flush,
            read_only=not self._can.write,
            rotational=self._truth("is_rotational"),
            discard_max_bytes=_PIECE_BYTES if self._can.trim else 0,
            write_zeroes_max_bytes=_PIECE_BYTES if self._can.zero else 0,
        )

    def _abilities(self, read_only: bool) -> Abilities:
        write = self._truth("can_write", "pwrite") and not read_only
        flush = self._truth("can_flush", "flush")
        if not write:
            return Abilities(False, flush, False, False, api.FUA_NONE)
        return Abilities(
            True, flush, self._truth("can_trim", "trim"), self._truth("can_zero", "zero"), self._fua()
        )

    def _truth(self, callback: str, function: str = "") -> bool:
        """Whether the callback returns True itself, as nbdkit compares; without it whether `function` exists."""
        if self._script.has(callback):
            return self._script.ask(callback, self._handle) is True
        return bool(function) and self._script.has(function)

    def _fua(self) -> int:
        if not self._script.has("can_fua"):
            return api.FUA_EMULATE if self._script.has("flush") else api.FUA_NONE
        fua = self._whole_number("can_fua", self._script.ask("can_fua", self._handle))
        if fua not in (api.FUA_NONE, api.FUA_EMULATE, api.FUA_NATIVE):
            raise BackendError(f"{self._script.path}: can_fua() is {fua}, no nbdkit.FUA_*")
        # The functions of version 1 get no flags.
        return api.FUA_EMULATE if self._is_v1 and fua == api.FUA_NATIVE else fua

    def _block_size(self) -> BlockSize:
        if not self._script.has("block_size"):
            return BlockSize()
        answer = self._script.ask("block_size", self._handle)
        if not isinstance(answer, tuple) or len(answer) != len(BlockSize._fields):
            raise BackendError(
                f"{self._script.path}: block_size() must be (minimum, preferred, maximum), not {answer!r}"
            )
        sizes = BlockSize(*(self._whole_number("block_size", each) for each in answer))
        if not any(sizes):
            return BlockSize()
        if problem := _problem_of(sizes):
            raise BackendError(f"{self._script.path}: block_size() is {tuple(sizes)}: {problem}")
        return sizes

    def _whole_number(self, callback: str, answer: Any) -> int:
        try:
            return operator.index(answer)
        except TypeError:
            raise BackendError(
                f"{self._script.path}: {callback}() must be a whole number, not {answer!r}"
            ) from None

    def _call_if_defined(self, callback: str, *arguments: Any) -> None:
        if self._script.has(callback):
            self._script.ask(callback, *arguments)

    # Requests.

    def started(self, device: Device) -> None:
        """Keep the device, whose backend the plugin may end."""
        self._device = device
        if self._end_reason:
            device.stop(self._end_reason)

    def _end(self, reason: str) -> None:
        self._end_reason = reason
        if self._device is not None:
            self._device.stop(reason)

    def pread(self, buf: memoryview, offset: int) -> None:
        """The plugin's `pread`, in pieces of its largest request."""
        for start, end in self._pieces(offset, len(buf), self._block.maximum):
            piece = buf[start - offset : end - offset]
            if self._is_v1:
                self._copy(self._script.request("pread", self._handle, end - start, start), piece)
            else:
                self._script.request("pread", self._handle, piece, start, 0)

    def _copy(self, answer: Any, piece: memoryview) -> None:
        """Version 1 returns the data; more than was asked for is cut off, as nbdkit does."""
        try:
            data = memoryview(answer).cast("B")
        except TypeError:
            raise OSError(
                errno.EIO, f"{self._script.path}: pread returned {answer!r:.60}, not a buffer"
            ) from None
        if len(data) < len(piece):
            said = f"pread returned {len(data)} bytes, {len(piece)} were asked for"
            raise OSError(errno.EIO, f"{self._script.path}: {said}")
        piece[:] = data[: len(piece)]

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        """The plugin's `pwrite`, in pieces of its largest request, and its `flush` if it has no FUA of its own."""
        if not self._can.write:
            raise OSError(errno.EROFS, "the plugin is read-only")
        self._write(buf.toreadonly(), offset, self._flags(fua))
        self._flush_after(fua)

    def _write(self, data: memoryview, offset: int, flags: int) -> None:
        for start, end in self._pieces(offset, len(data), self._block.maximum):
            self._request("pwrite", data[start - offset : end - offset], start, flags=flags)

    def flush(self) -> None:
        """The plugin's `flush`."""
        if self._script.has("flush"):
            self._request("flush", flags=0)

    def trim(self, offset: int, length: int) -> None:
        """The plugin's `trim`."""
        flags = self._flags(False)
        for start, end in self._pieces(offset, length, _PIECE_BYTES):
            self._request("trim", end - start, start, flags=flags)

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """The plugin's `zero`, or writes where it asks for them with EOPNOTSUPP."""
        self._zero(offset, length, may_unmap, self._flags(False))

    def zero_durably(self, offset: int, length: int, may_unmap: bool) -> None:
        """As `zero`, and its `flush` if it has no FUA of its own."""
        self._zero(offset, length, may_unmap, self._flags(True))
        self._flush_after(True)

    def _zero(self, offset: int, length: int, may_unmap: bool, flags: int) -> None:
        for start, end in self._pieces(offset, length, _PIECE_BYTES):
            if not self._plugin_zeroes(start, end - start, may_unmap, flags):
                self._write_zeroes(start, end, flags)

    def _plugin_zeroes(self, offset: int, length: int, may_unmap: bool, flags: int) -> bool:
        """Returns False if the plugin wants writes instead."""
        if not self._script.has("zero"):
            return False
        how = may_unmap if self._is_v1 else flags | (api.FLAG_MAY_TRIM if may_unmap else 0)
        try:
            self._script.request("zero", self._handle, length, offset, how)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP):
                raise
            return False
        return True

    def _write_zeroes(self, offset: int, end: int, flags: int) -> None:
        for start in range(offset, end, len(_ZEROES)):
            self._write(memoryview(_ZEROES)[: end - start], start, flags)

    def _flags(self, fua: bool) -> int:
        return api.FLAG_FUA if self._always_fua or (fua and self._can.fua == api.FUA_NATIVE) else 0

    def _flush_after(self, fua: bool) -> None:
        if fua and self._can.fua != api.FUA_NATIVE:
            self.flush()

    def _request(self, callback: str, *arguments: Any, flags: int) -> None:
        """A callback whose last argument are flags, from version 2 on."""
        if self._is_v1:
            self._script.request(callback, self._handle, *arguments)
        else:
            self._script.request(callback, self._handle, *arguments, flags)

    @staticmethod
    def _pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
        """Start and end of each piece; they meet at multiples of `most`, where the plugin's own blocks end."""
        end = offset + length
        while offset < end:
            next_offset = min(end, offset - offset % most + most)
            yield offset, next_offset
            offset = next_offset

    # The end.

    def close(self) -> None:
        """The plugin's `close` and `cleanup`; a failure is logged."""
        while self._closers:
            try:
                self._closers.pop()()
            except BackendError as error:
                log.error("%s", error)
        self.unload()

    def unload(self) -> None:
        """Forget the plugin's modules."""
        self._script.close()


def _pairs(given: Given) -> Iterator[tuple[str, str]]:
    """Each key with each of its values."""
    for key, values in given.items():
        yield from ((key, each) for each in ([values] if isinstance(values, str) else values))


def _problem_of(sizes: BlockSize) -> str:
    """What nbdkit, or a disk, does not allow of these block sizes; empty if nothing."""
    smallest, preferred, largest = sizes
    if not 1 <= smallest <= _MINIMUM_MAX or smallest & (smallest - 1):
        return "the minimum must be a power of two, 1 to 64K"
    if not _LOGICAL_MIN <= preferred <= _PREFERRED_MAX or preferred & (preferred - 1):
        return "the preferred size must be a power of two, 512 to 32M"
    if largest != _UNLIMITED and largest % smallest:
        return "the maximum must be 0xffffffff or a multiple of the minimum"
    if not smallest <= preferred <= largest <= _UNLIMITED:
        return "the sizes must not fall from minimum to maximum"
    if smallest > _LOGICAL_MAX:
        return f"a disk's requests are as small as {_LOGICAL_MAX} bytes; run nbdkit with its blocksize filter instead"
    return ""
