"""From `KIND` or `FILE.py` and KEY=VALUE options to a running backend.

Finds backends by name at run time, so that the SDK imports none: in the modules of `ublkpool.backends`, in the entry
points of other packages, in a Python file.
"""

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import (
    Backend,
    Call,
    Done,
    Hint,
    Moved,
    NoOptions,
    Properties,
    Request,
)
from ublkpool.bufpool.sdk.blame import authors_code, line_of, words_of
from ublkpool.bufpool.sdk.client import Transport
from ublkpool.bufpool.sdk.judge import judge_class, judge_functions, judge_names
from ublkpool.bufpool.sdk.nbdkit.recognise import is_plugin
from ublkpool.bufpool.sdk.options import (
    REQUIRED,
    Given,
    Option,
    check_types,
    declared,
    parse_options,
    parse_values,
)
from ublkpool.bufpool.sdk.serving import serve
from ublkpool.bufpool.wire import Op

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

    from ublkpool.bufpool.sdk.volumes import Volumes

ENTRY_POINTS = "ublkpool.backends"
_BUILT_IN = "ublkpool.backends"
_FUNCTIONS_NEEDED = ("get_size", "pread")
_FUNCTIONS = (*_FUNCTIONS_NEEDED, "open", "identity", "pwrite", "flush", "trim", "zero", "resize", "close")


def entry_points(group: str, name: str | None = None) -> "EntryPoints":
    """The entry points of a group.

    `importlib.metadata` is imported here: loading it takes as long as the whole SDK.
    """
    from importlib.metadata import entry_points as found

    return found(group=group) if name is None else found(group=group, name=name)


def kinds() -> list[str]:
    """The names of every backend that is installed."""
    package = importlib.import_module(_BUILT_IN)
    built_in = {each.name for each in pkgutil.iter_modules(package.__path__) if not each.name.startswith("_")}
    return sorted(built_in | {each.name for each in entry_points(group=ENTRY_POINTS)})


def load(kind_or_file: str, given: Given, layers: Sequence[str] = ()) -> Backend:
    """The backend with its options, below its layers, not opened yet.

    `layers`: each `NAME:key=value,...`, the first gets each request first.  Raises `BackendError` for an unknown
    backend or layer, or a bad option.
    """
    backend = _load(kind_or_file, given)
    if not layers:
        return backend
    from ublkpool.bufpool.sdk.layers.stack import layered

    return layered(backend, layers)


def _load(kind_or_file: str, given: Given) -> Backend:
    if _is_file(kind_or_file) and is_plugin(Path(kind_or_file)):
        # nbdkit's plugins run as `__main__`, and their options are known to themselves only.
        from ublkpool.bufpool.sdk.nbdkit.plugin import load_plugin

        return load_plugin(Path(kind_or_file), given)
    found = _find(kind_or_file)
    name = backend_name(kind_or_file)
    if isinstance(found, ModuleType):
        judge_functions(found)
        return FunctionBackend(found, _function_values(name, found, given))
    if not found.__module__.startswith(_BUILT_IN + "."):
        judge_class(found)
        _judge_options(name, found)
    options = parse_options(name, found.Options, given)
    with authors_code("when the backend was made"):
        return found(options)


def preload(kind: str) -> None:
    """Import a built-in kind, so that a process that is forked later need not."""
    importlib.import_module(f"{_BUILT_IN}.{kind}")


def load_volumes(kind_or_file: str, given: Given) -> "Volumes":
    """The volumes of a kind, with the options that lead to one.  Raises `BackendError`."""
    from ublkpool.bufpool.sdk.volumes import Volumes

    found = _find(kind_or_file)
    name = backend_name(kind_or_file)
    where = "" if isinstance(found, ModuleType) else found.volumes
    if not where:
        raise BackendError(f"{name}: has no volumes; ublkpool volume is for kinds such as file and rbd")
    module, _, attribute = where.partition(":")
    volumes = getattr(importlib.import_module(module), attribute)
    assert issubclass(volumes, Volumes)
    made: Volumes = volumes(parse_options(name, volumes.Options, given))
    return made


def backend_name(kind_or_file: str) -> str:
    """A backend's name: the kind, or the file's name without its suffix."""
    return Path(kind_or_file).stem if _is_file(kind_or_file) else kind_or_file


def run_backend(
    kind_or_file: str,
    options: Given,
    device: str,
    run_dir: Path,
    *,
    wait_s: float = 0.0,
    transport: Transport = "auto",
    layers: Sequence[str] = (),
) -> int:
    """Load and serve until told to end; returns the exit status.  Raises `PoolError` if it cannot start."""
    backend = load(kind_or_file, options, layers)
    built_in = type(backend).__module__.startswith(_BUILT_IN + ".")
    name = backend_name(kind_or_file)
    return serve(
        backend,
        device=device,
        run_dir=run_dir,
        kind=name,
        wait_s=wait_s,
        transport=transport,
        lock_memory=built_in,
    )


def _is_file(kind_or_file: str) -> bool:
    return kind_or_file.endswith(".py") or "/" in kind_or_file


def _find(kind_or_file: str) -> type[Backend] | ModuleType:
    if _is_file(kind_or_file):
        return _in_module(import_file(Path(kind_or_file)), kind_or_file)
    built_in = f"{_BUILT_IN}.{kind_or_file}"
    if kind_or_file.isidentifier() and importlib.util.find_spec(built_in) is not None:
        return _in_module(importlib.import_module(built_in), kind_or_file)
    for entry in entry_points(group=ENTRY_POINTS, name=kind_or_file):
        loaded = entry.load()
        return (
            _in_module(loaded, kind_or_file)
            if isinstance(loaded, ModuleType)
            else _checked(loaded, kind_or_file)
        )
    raise BackendError(
        f"no backend is called {kind_or_file!r}; there are {', '.join(kinds())}, or give a FILE.py"
    )


def import_file(path: Path) -> ModuleType:
    """The module in this file, executed.  Raises `BackendError`, which names the line that failed."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise BackendError(f"{path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        place = line_of(error) or str(path)
        # A library or a helper module of the author's may be where it broke: the file that was asked for is named too.
        name = "" if place.startswith(str(path)) else f"{path}: "
        raise BackendError(f"{name}{place}: {words_of(error)}") from error
    return module


def _in_module(module: ModuleType, where: str) -> type[Backend] | ModuleType:
    if hasattr(module, "BACKEND"):
        return _checked(module.BACKEND, where)
    classes = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Backend) and each.__module__ == module.__name__
    ]
    if len(classes) == 1:
        return classes[0]
    if not classes and all(callable(getattr(module, each, None)) for each in _FUNCTIONS_NEEDED):
        return module
    if not classes:
        judge_names(module)
    raise BackendError(
        f"{where}: needs one subclass of Backend (it has {len(classes)}; BACKEND = Class chooses), "
        f"or the functions {' and '.join(_FUNCTIONS_NEEDED)}"
    )


def _checked(found: Any, where: str) -> type[Backend]:
    if isinstance(found, type) and issubclass(found, Backend):
        return found
    raise BackendError(f"{where}: {found!r} is not a subclass of Backend")


def _judge_options(name: str, found: type[Backend]) -> None:
    """Raise `BackendError` for a class whose options cannot be read from KEY=VALUE."""
    if not (isinstance(found.Options, type) and issubclass(found.Options, msgspec.Struct)):
        raise BackendError(f"{name}: Options must be a subclass of msgspec.Struct, not {found.Options!r:.60}")
    try:
        options = declared(found.Options)
    except Exception as error:
        raise BackendError(f"{name}: the types of its options cannot be read: {words_of(error)}") from error
    check_types(name, options)


def _function_values(name: str, module: ModuleType, given: Given) -> dict[str, Any]:
    """The arguments of the module's `open`."""
    options = _function_options(module)
    check_types(name, options)
    values = parse_values(name, options, given)
    rest: dict[str, Any] = next((values.pop(each.name) for each in options if each.takes_rest), {})
    return values | rest


def _function_options(module: ModuleType) -> list[Option]:
    opener = getattr(module, "open", None)
    if opener is None:
        return []
    try:
        parameters = inspect.signature(opener, eval_str=True).parameters.values()
    except Exception as error:
        raise BackendError(
            f"{module.__name__}: the types of the parameters of open cannot be read: {words_of(error)}"
        ) from error
    return [
        Option(
            each.name,
            str if each.annotation is each.empty else each.annotation,
            REQUIRED if each.default is each.empty else each.default,
            each.kind is each.VAR_KEYWORD,
        )
        for each in parameters
    ]


class FunctionBackend(Backend):
    """A module of functions as a backend.

    `get_size() -> int` and `pread(buf, offset)` are required; without `pwrite(buf, offset)` the device is read-only.
    Optional: `open(option, ...)`, called first, `identity()`, which names the store (`Properties.identity`), `flush()`,
    `trim(offset, length)`, `zero(offset, length)`, `resize(size_bytes)`, `close()`.  With `flush` the device has a
    volatile cache, and each write with FUA is followed by a flush.  All may be `async def`; `parallel` and
    `exclusive_bytes` are those of `Backend`, as names of the module.
    """

    def __init__(self, module: ModuleType, values: Mapping[str, Any]) -> None:
        super().__init__(NoOptions())
        self.module = module
        self._values = values
        self._opener = self._function(module, "open")
        self._get_size: Callable[[], int] = module.get_size
        self._pread: Callable[[memoryview, int], int | None] = module.pread
        self._pwrite = self._function(module, "pwrite")
        self._identity = self._function(module, "identity")
        self._flush = self._function(module, "flush")
        self._trim = self._function(module, "trim")
        self._zero = self._function(module, "zero")
        self._closer: Callable[[], Done] | None = self._function(module, "close")
        self.plain_pread, self.plain_pwrite = self._pread, self._pwrite
        self.parallel = getattr(module, "parallel", 1)
        self.exclusive_bytes = getattr(module, "exclusive_bytes", 0)
        self.survives_death = bool(getattr(module, "survives_death", True))
        self.stores_data = bool(getattr(module, "stores_data", True))

    @staticmethod
    def _function(module: ModuleType, name: str) -> Callable[..., Any] | None:
        found: Callable[..., Any] | None = getattr(module, name, None)
        return found

    def callables(self) -> Mapping[str, Callable[..., Any]]:
        """See `Backend`: the module's functions."""
        found = {name: self._function(self.module, name) for name in _FUNCTIONS}
        return {name: function for name, function in found.items() if function is not None}

    def calls_of(self, request: Request) -> Iterator[Call]:
        """See `Backend`: the module's functions, and its `flush` after each write with FUA."""
        flush = [(self._flush, ())] if self._flush is not None and request.fua else []
        if request.op == Op.WRITE and self._pwrite is not None:
            yield self._pwrite, (request.buffer, request.offset)
            yield from flush
        elif request.op == Op.WRITE_ZEROES and self._zero is not None:
            yield self._zero, (request.offset, request.length)
            yield from flush
        elif request.op == Op.DISCARD and self._trim is not None:
            yield self._trim, (request.offset, request.length)
        elif request.op == Op.FLUSH and self._flush is not None:
            yield self._flush, ()
        else:
            yield from super().calls_of(request)

    def open(self, hint: Hint) -> Properties | Awaitable[Properties]:
        """Call the module's `open`, then ask for the size.  Raises `BackendError` for an empty store."""
        asked = (self._opener, self._get_size, self._identity)
        if any(map(inspect.iscoroutinefunction, asked)):
            return self._open_async()
        with _opening():
            self._open_now()
        return self._properties(self._get_size(), self._identity() if self._identity else None)

    def _open_now(self) -> Any:
        return self._opener(**self._values) if self._opener is not None else None

    async def _open_async(self) -> Properties:
        with _opening():
            await _settled(self._open_now())
        size_bytes = await _settled(self._get_size())
        return self._properties(size_bytes, await _settled(self._identity()) if self._identity else None)

    def _properties(self, size_bytes: Any, identity: Any) -> Properties:
        if not isinstance(size_bytes, int):
            raise BackendError(
                f"{self.module.__name__}: get_size() must return bytes, not {size_bytes!r:.60}"
            )
        if size_bytes == 0:
            # In `Properties` 0 means the device's size: a store that was emptied would be served with that.
            raise BackendError(f"{self.module.__name__}: get_size() is 0: the store is empty")
        return Properties(
            size_bytes=size_bytes,
            read_only=self._pwrite is None,
            volatile_cache=self._flush is not None,
            discard_max_bytes=size_bytes if self._trim else 0,
            write_zeroes_max_bytes=size_bytes if self._zero else 0,
            identity=identity,
        )

    def pread(self, buf: memoryview, offset: int) -> Moved:
        """The module's `pread`."""
        return self._pread(buf, offset)

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> Moved:
        """The module's `pwrite`, and its `flush` if the write must be on stable storage."""
        if self._pwrite is None:
            return super().pwrite(buf, offset, fua)
        written: int | None = self._pwrite(buf, offset)
        if fua:
            self.flush()
        return written

    def flush(self) -> None:
        """The module's `flush`."""
        if self._flush is not None:
            self._flush()

    def trim(self, offset: int, length: int) -> None:
        """The module's `trim`."""
        if self._trim is not None:
            self._trim(offset, length)

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """The module's `zero`."""
        if self._zero is not None:
            self._zero(offset, length)

    def close(self) -> Done:
        """The module's `close`."""
        return self._closer() if self._closer is not None else None


@contextmanager
def _opening() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackendError(f"cannot open: {error} ({line_of(error)})") from error


async def _settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
