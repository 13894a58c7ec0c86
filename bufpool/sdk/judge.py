"""What a plugin's functions and methods must look like: judged when it is loaded, each mistake in one line.

Python notices a wrong number of parameters only when the request arrives, and a misspelt name never: a device whose
`flush` is misspelt would lose what its clients flushed.  Pure.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from types import FunctionType, ModuleType
from typing import Any

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import SERVING, Backend
from ublkpool.bufpool.sdk.failures import log

FUNCTIONS: Mapping[str, tuple[str, ...] | None] = {
    "open": None,
    "get_size": (),
    "identity": (),
    "pread": ("buf", "offset"),
    "pwrite": ("buf", "offset"),
    "flush": (),
    "trim": ("offset", "length"),
    "zero": ("offset", "length"),
    "resize": ("size_bytes",),
    "close": (),
}
"""The functions of a module and their parameters; those of `open` are the author's options."""
ASYNC = frozenset(FUNCTIONS) | {*SERVING, "started", "resize", "detached"}
"""The functions and methods that may be `async def`."""
_OTHER_NAMES = {
    "discard": "trim",
    "unmap": "trim",
    "write_zeroes": "zero",
    "write_zeros": "zero",
    "sync": "flush",
    "fsync": "flush",
    "size": "get_size",
}
"""What other programs call the same thing."""
_NEAR = 0.8


def judge_functions(module: ModuleType) -> None:
    """Raise `BackendError` for a function of this module that the SDK could not call, or that is misspelt."""
    judge_names(module)
    for name, parameters in FUNCTIONS.items():
        function = getattr(module, name, None)
        if function is None:
            continue
        if not callable(function):
            raise BackendError(f"{module.__name__}: {name} must be a function, not {function!r:.60}")
        _judge_kind(name, function)
        if parameters is None:
            _judge_options_of(name, function)
        else:
            _judge_parameters(name, function, parameters)


def judge_names(module: ModuleType) -> None:
    """Raise `BackendError` for a function of this module whose name is nearly one that the SDK calls."""
    own = {
        name: each
        for name, each in vars(module).items()
        if isinstance(each, FunctionType) and each.__module__ == module.__name__
    }
    absent = [name for name in FUNCTIONS if not hasattr(module, name)]
    _judge_names(own, absent, lambda name: [FUNCTIONS[name] or (), *_arities(name)])
    _judge_settings(module.__name__, vars(module))


def judge_class(kind: type[Backend]) -> None:
    """Raise `BackendError` for a method of this class that the SDK could not call, or that is misspelt."""
    own = {name: each for each in _own_classes(kind) for name, each in vars(each).items()}
    methods = {
        name: each
        for name, each in own.items()
        if isinstance(each, FunctionType) and each.__module__ == kind.__module__
    }
    absent = [name for name in _methods() if name not in own]
    _judge_names(methods, absent, lambda name: [("self", *each) for each in _arities(name)])
    _judge_settings(kind.__name__, own)
    for name in sorted(_methods() & own.keys()):
        function, skips_self = _unwrapped(own[name])
        if not callable(function):
            raise BackendError(f"{kind.__name__}: {name} must be a method, not {function!r:.60}")
        _judge_kind(name, function)
        _judge_parameters(name, function, (("self",) if skips_self else ()) + _parameters(name))


def _own_classes(kind: type[Backend]) -> Iterable[type]:
    """The author's classes, the base first."""
    return [
        each for each in reversed(kind.__mro__) if not each.__module__.startswith(("ublkpool.", "builtins"))
    ]


def _methods() -> set[str]:
    return {name for name, each in vars(Backend).items() if isinstance(each, FunctionType) and name[0] != "_"}


def _parameters(method: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(Backend, method)).parameters)[1:]


def _arities(name: str) -> list[tuple[str, ...]]:
    """The parameters that `name` has as a method and as a function: whichever the author meant."""
    found = [_parameters(name)] if name in _methods() else []
    function = FUNCTIONS.get(name)
    return found if function is None else [*found, function]


def _unwrapped(attribute: Any) -> tuple[Any, bool]:
    """The function of a method, and whether its first parameter is the backend or its class."""
    if isinstance(attribute, staticmethod):
        return attribute.__func__, False
    if isinstance(attribute, classmethod):
        return attribute.__func__, True
    return attribute, isinstance(attribute, FunctionType)


def _judge_kind(name: str, function: Callable[..., Any]) -> None:
    if name not in ASYNC and inspect.iscoroutinefunction(function):
        raise BackendError(f"{_place(function)}async def {name} is not supported: use def")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise BackendError(f"{_place(function)}{name} must not yield: it is called once for each request")


def _judge_parameters(name: str, function: Callable[..., Any], parameters: Collection[str]) -> None:
    signature = _signature(function)
    if signature is not None and not _takes(signature, parameters):
        raise BackendError(
            f"{_place(function)}{name}{_written(signature)} must be {name}({', '.join(parameters)})"
        )


def _judge_options_of(name: str, function: Callable[..., Any]) -> None:
    signature = _signature(function)
    for each in signature.parameters.values() if signature else ():
        if each.kind in (each.POSITIONAL_ONLY, each.VAR_POSITIONAL):
            raise BackendError(
                f"{_place(function)}{name}: the parameter {each} must have a name that KEY=VALUE can give"
            )


def _judge_names(
    own: Mapping[str, Callable[..., Any]],
    absent: Collection[str],
    meant: Callable[[str], Collection[Collection[str]]],
) -> None:
    """Refuse a function that is named nearly as one that is absent and takes its parameters; warn of another."""
    for name, function in own.items():
        near = _near(name, absent)
        if near is None:
            continue
        signature = _signature(function)
        told = f"{_place(function)}{name} is called by nothing: did you mean {near}? (a helper begins with _)"
        if near == "open" or signature is None or any(_takes(signature, each) for each in meant(near)):
            raise BackendError(told)
        log.warning(told)


def _judge_settings(owner: str, own: Mapping[str, Any]) -> None:
    """Refuse a value, such as a number, that is named nearly as a setting of `Backend`."""
    settings = [name for name, each in vars(Backend).items() if name[0] != "_" and not callable(each)]
    absent = [each for each in settings if each not in own]
    for name, value in own.items():
        near = _near(name, absent) if isinstance(value, bool | int | float | str) else None
        if near is not None:
            raise BackendError(f"{owner}: {name} = {value!r:.60} is read by nothing: did you mean {near}?")


def _near(name: str, absent: Collection[str]) -> str | None:
    if name.startswith("_") or name in FUNCTIONS or hasattr(Backend, name) or not absent:
        return None
    if _OTHER_NAMES.get(name) in absent:
        return _OTHER_NAMES[name]
    import difflib

    return next(iter(difflib.get_close_matches(name, absent, n=1, cutoff=_NEAR)), None)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """None for a function in C that tells none."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _takes(signature: inspect.Signature, parameters: Collection[str]) -> bool:
    try:
        signature.bind(*parameters)
    except TypeError:
        return False
    return True


def _written(signature: inspect.Signature) -> str:
    return f"({', '.join(map(_bare, signature.parameters.values()))})"


def _bare(parameter: inspect.Parameter) -> str:
    return str(parameter.replace(annotation=inspect.Parameter.empty))


def _place(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}: " if code is not None else ""
