"""KEY=VALUE options: from strings to the typed record that a backend declares.  Pure.

Every error is one line that names the option, the value and what would be valid.
"""

import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sizes import ByteSize, parse_size

_TRUTH = {
    **dict.fromkeys(("on", "yes", "true", "1"), True),
    **dict.fromkeys(("off", "no", "false", "0"), False),
}
_TYPE_NAMES: dict[Any, str] = {
    ByteSize: "SIZE",
    int: "NUMBER",
    float: "NUMBER",
    Path: "PATH",
    bool: "on|off",
}
_Record = TypeVar("_Record", bound=msgspec.Struct)
REQUIRED = msgspec.NODEFAULT


class Option(NamedTuple):
    """One declared option."""

    name: str
    type: Any
    default: Any = REQUIRED

    @property
    def usage(self) -> str:
        """`size=SIZE` or `direct=auto|on|off`, in brackets if the option has a default."""
        text = f"{self.name}={_type_name(self.type)}"
        return text if self.default is REQUIRED else f"[{text}]"


def _plain(kind: Any) -> Any:
    """`T` of `T | None`."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(each for each in get_args(kind) if each is not type(None))
    return kind


def _type_name(kind: Any) -> str:
    kind = _plain(kind)
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return _TYPE_NAMES.get(kind, "TEXT")


def declared(struct: type[msgspec.Struct]) -> list[Option]:
    """The options that a record declares."""
    return [Option(each.name, each.type, each.default) for each in msgspec.structs.fields(struct)]


def convert(text: str, kind: Any) -> Any:
    """`text` as a value of a declared type.  Raises `ValueError`."""
    kind = _plain(kind)
    if kind == ByteSize:
        return parse_size(text)
    if kind is bool:
        if text.lower() not in _TRUTH:
            raise ValueError(f"{text!r} is not on or off")
        return _TRUTH[text.lower()]
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"{text!r} is not one of {', '.join(get_args(kind))}")
        return text
    return _number(text, kind) if kind in (int, float) else kind(text)


def _number(text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def parse_values(owner: str, options: Iterable[Option], given: Mapping[str, str]) -> dict[str, Any]:
    """The given values with their types.  Raises `BackendError` for an unknown, invalid or missing option."""
    known = {each.name: each for each in options}
    valid = " ".join(each.usage for each in known.values()) or "none"
    values = {}
    for name, text in given.items():
        if name not in known:
            raise BackendError(f"{owner}: unknown option {name}={text}; options are: {valid}")
        try:
            values[name] = convert(text, known[name].type)
        except ValueError as error:
            raise BackendError(f"{owner}: option {name}: {error}; options are: {valid}") from error
    missing = [each.name for each in known.values() if each.default is REQUIRED and each.name not in values]
    if missing:
        raise BackendError(f"{owner}: option {missing[0]} is missing; options are: {valid}")
    return values


def parse_options(owner: str, struct: type[_Record], given: Mapping[str, str]) -> _Record:
    """The record of the given options.  Raises as `parse_values`."""
    return struct(**parse_values(owner, declared(struct), given))
