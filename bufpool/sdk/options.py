"""KEY=VALUE options: from strings to the typed record that a backend declares.  Pure.

Every error is one line that names the option, the value and what would be valid.
"""

import types
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sizes import ByteSize, parse_size

Given = Mapping[str, str | Sequence[str]]
"""The options as the user wrote them; a key that was given several times has a list."""
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
_UNREADABLE = (dict, set, frozenset, tuple, bytes, bytearray, memoryview, list, type(None), msgspec.Struct)
_Record = TypeVar("_Record", bound=msgspec.Struct)
REQUIRED = msgspec.NODEFAULT


class Option(NamedTuple):
    """One declared option; with `takes_rest` it gets every key that no other option is named after, as a dict."""

    name: str
    type: Any
    default: Any = REQUIRED
    takes_rest: bool = False

    @property
    def usage(self) -> str:
        """`size=SIZE` or `direct=auto|on|off`, in brackets if the option has a default, with dots for a list."""
        if self.takes_rest:
            return f"[KEY={_type_name(self.type)} ...]"
        text = f"{self.name}={_type_name(self.type)}"
        text = text if self.default is REQUIRED else f"[{text}]"
        return f"{text}..." if _item_of(self.type) else text


def _is_size(kind: Any) -> bool:
    """Whether it is `ByteSize`, also with limits."""
    return get_origin(kind) is Annotated and get_args(ByteSize)[1] in get_args(kind)[1:]


def _members(kind: Any) -> list[Any]:
    """The types of `T | U | None` but None."""
    if get_origin(kind) in (Union, types.UnionType):
        return [each for each in get_args(kind) if each is not type(None)]
    return [kind]


def _item_of(kind: Any) -> Any:
    """`T` of `list[T]`; None for any other type."""
    plain = _members(kind)[0]
    return get_args(plain)[0] if get_origin(plain) is list else None


def _type_name(kind: Any) -> str:
    kind = _item_of(kind) or _members(kind)[0]
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is Annotated:
        kind = ByteSize if _is_size(kind) else get_args(kind)[0]
    return _TYPE_NAMES.get(kind, "TEXT")


@cache
def declared(struct: type[msgspec.Struct]) -> Sequence[Option]:
    """The options that a record declares; a field of type `dict[str, T]` gets the keys that are no field's."""
    return tuple(_declared(each) for each in msgspec.structs.fields(struct))


def _declared(field: msgspec.structs.FieldInfo) -> Option:
    made = field.default_factory is not msgspec.NODEFAULT
    default = None if made else field.default
    if get_origin(field.type) is dict:
        return Option(field.name, get_args(field.type)[1], {}, takes_rest=True)
    return Option(field.name, field.type, default)


def check_types(owner: str, options: Iterable[Option]) -> None:
    """Raise `BackendError` for the first option whose type no text can be turned into."""
    for each in options:
        kinds = _members(_item_of(each.type) or each.type)
        if not kinds or not all(map(_is_readable, kinds)):
            raise BackendError(
                f"{owner}: option {each.name} has the type {_shown(each.type)}, which cannot be read from "
                f"{each.name}=VALUE; use str, int, float, bool, Path, ByteSize, Literal or a list of one of them"
            )


def _is_readable(kind: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Annotated:
        return _is_readable(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return all(isinstance(each, str | int) for each in get_args(kind))
    return isinstance(kind, type) and get_origin(kind) is None and not issubclass(kind, _UNREADABLE)


def _shown(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)


def convert(text: str, kind: Any) -> Any:
    """`text` as a value of a declared type.  Raises `ValueError`."""
    *first, last = _members(kind)
    for each in first:
        try:
            return _convert(text, each)
        except ValueError:
            continue
    return _convert(text, last)


def _convert(text: str, kind: Any) -> Any:
    if _is_size(kind):
        return msgspec.convert(parse_size(text), kind)
    if kind is bool:
        if text.lower() not in _TRUTH:
            raise ValueError(f"{text!r} is not on or off")
        return _TRUTH[text.lower()]
    if get_origin(kind) is Literal:
        return _choice(text, get_args(kind))
    if get_origin(kind) is Annotated:
        # The limits of `msgspec.Meta`, which a Struct does not check when it is made.
        return msgspec.convert(_convert(text, get_args(kind)[0]), kind)
    return _made(text, str if kind is Any else kind)


def _choice(text: str, choices: tuple[Any, ...]) -> Any:
    shown = {str(each): each for each in choices}
    if text not in shown:
        raise ValueError(f"{text!r} is not one of {', '.join(shown)}")
    return shown[text]


def _made(text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except Exception as error:
        if kind in (int, float):
            raise ValueError(f"{text!r} is not a number") from None
        raise ValueError(f"{text!r}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _value(given: str | Sequence[str], kind: Any) -> Any:
    """The option's value: a list has the texts in the order in which they were given.  Raises `ValueError`."""
    texts = [given] if isinstance(given, str) else list(given)
    item = _item_of(kind)
    if item is not None:
        return [convert(each, item) for each in texts]
    if len(texts) != 1:
        raise ValueError("is given twice" if texts else "has no value")
    return convert(texts[0], kind)


def parse_values(owner: str, options: Sequence[Option], given: Given) -> dict[str, Any]:
    """The given values with their types.  Raises `BackendError` for an unknown, invalid or missing option."""
    known = {each.name: each for each in options if not each.takes_rest}
    rest = next((each for each in options if each.takes_rest), None)

    def refused(why: str) -> BackendError:
        valid = " ".join(each.usage for each in options) or "none"
        return BackendError(f"{owner}: {why}; options are: {valid}")

    values: dict[str, Any] = {rest.name: {}} if rest else {}
    for name, text in given.items():
        option = known.get(name) or rest
        if option is None:
            raise refused(f"unknown option {_written(name, text)}")
        try:
            value = _value(text, option.type)
        except ValueError as error:
            raise refused(f"option {name}: {error}") from error
        if option is rest:
            values[rest.name][name] = value
        else:
            values[name] = value
    missing = [each.name for each in known.values() if each.default is REQUIRED and each.name not in values]
    if missing:
        raise refused(f"option {missing[0]} is missing")
    return values


def _written(name: str, given: str | Sequence[str]) -> str:
    return " ".join(f"{name}={each}" for each in ([given] if isinstance(given, str) else given))


def parse_options(owner: str, struct: type[_Record], given: Given) -> _Record:
    """The record of the given options.  Raises as `parse_values`, also where the record refuses a value."""
    options = declared(struct)
    values = parse_values(owner, options, given)
    try:
        return struct(**values)
    except (TypeError, ValueError) as error:
        valid = " ".join(each.usage for each in options) or "none"
        raise BackendError(f"{owner}: {' '.join(str(error).split())}; options are: {valid}") from error
