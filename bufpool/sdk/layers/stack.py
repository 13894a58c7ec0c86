"""From `NAME:key=value,...` to layers over a backend: the first that is named gets each request first.

Finds layers by name at run time: in this package, in the entry points of other packages, in a Python file.
"""

import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import SERVING, Backend
from ublkpool.bufpool.sdk.blame import authors_code
from ublkpool.bufpool.sdk.layers.bottom import Bottom
from ublkpool.bufpool.sdk.layers.layer import Layer, Plain
from ublkpool.bufpool.sdk.options import check_types, declared, parse_options

ENTRY_POINTS = "ublkpool.layers"
BUILT_IN = ("cache", "fault", "log", "readonly")
_COMMA = re.compile(r"(?<!\\),")


def layered(backend: Backend, layers: Sequence[str]) -> Backend:
    """The backend below these layers.  Raises `BackendError` for an unknown layer or a bad option."""
    stack: Plain = Bottom(backend)
    for text in reversed(layers):
        stack = _made(text, stack)
    return stack if layers else backend


def _made(text: str, inner: Plain) -> Layer:
    name, given = parse_layer(text)
    kind = _find(name)
    owner = f"layer {Path(name).stem if _is_file(name) else name}"
    if kind.__module__.partition(".")[0] != "ublkpool":
        _judge(owner, kind)
    options = parse_options(owner, kind.Options, given)
    with authors_code("when the layer was made"):
        return kind(options, inner=inner)


def parse_layer(text: str) -> tuple[str, dict[str, str | list[str]]]:
    """The name and the options of `NAME:key=value,...`; a comma in a value is written `\\,`.  Raises `BackendError`."""
    name, _, rest = text.partition(":")
    given: dict[str, str | list[str]] = {}
    for pair in _COMMA.split(rest) if rest else []:
        key, equals, value = pair.replace("\\,", ",").partition("=")
        if not name or not key or not equals:
            raise BackendError(f"layer {text!r}: expected NAME:key=value,... as in fault:seed=1,eio=0.01")
        earlier = given.get(key)
        if earlier is None:
            given[key] = value
        else:
            given[key] = [*([earlier] if isinstance(earlier, str) else earlier), value]
    return name, given


def _is_file(name: str) -> bool:
    return name.endswith(".py") or "/" in name


def _find(name: str) -> type[Layer]:
    if _is_file(name):
        from ublkpool.bufpool.sdk.loader import import_file

        return _in_module(import_file(Path(name)), name)
    if name in BUILT_IN:
        return _in_module(importlib.import_module(f"ublkpool.bufpool.sdk.layers.{name}"), name)
    from importlib.metadata import entry_points

    others = entry_points(group=ENTRY_POINTS)
    for entry in others:
        if entry.name == name:
            loaded = entry.load()
            return _in_module(loaded, name) if isinstance(loaded, ModuleType) else _checked(loaded, name)
    known = ", ".join(sorted({*BUILT_IN, *(each.name for each in others)}))
    raise BackendError(f"no layer is called {name!r}; there are {known}, or give a FILE.py")


def _in_module(module: ModuleType, where: str) -> type[Layer]:
    if hasattr(module, "LAYER"):
        return _checked(module.LAYER, where)
    classes = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Layer) and each.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise BackendError(
            f"{where}: needs one subclass of Layer (it has {len(classes)}; LAYER = Class chooses)"
        )
    return classes[0]


def _checked(found: object, where: str) -> type[Layer]:
    if isinstance(found, type) and issubclass(found, Layer):
        return found
    raise BackendError(f"{where}: {found!r} is not a subclass of Layer")


def _judge(owner: str, kind: type[Layer]) -> None:
    from ublkpool.bufpool.sdk.judge import judge_class

    judge_class(kind)
    check_types(owner, declared(kind.Options))
    for name in SERVING:
        if inspect.iscoroutinefunction(getattr(kind, name)):
            raise BackendError(f"{owner}: async def {name} is not supported in a layer: use def")
    for name in ("engine", "submit", "serve_batch"):
        if getattr(kind, name) is not getattr(Layer, name):
            raise BackendError(f"{owner}: a layer has methods for single requests, not {name}")
