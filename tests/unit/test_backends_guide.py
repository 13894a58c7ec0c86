"""docs/BACKENDS.md has the fields of the classes that authors use, and its first disk is a disk."""

import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest

from support.fakes.worker import FakeWorker, finish, spawn
from ublkpool.bufpool.sdk.backend import Device, Hint, Properties, Request
from ublkpool.bufpool.wire import Op

GUIDE = (Path(__file__).parents[2] / "docs" / "BACKENDS.md").read_text()
Row = tuple[str, str, str]
"""A field's name, type and default, as a table has them."""


def _rows(name: str) -> list[Row]:
    """The table below the heading of this class."""
    section = GUIDE.partition(f"#### `{name}`\n")[2].partition("\n#")[0]
    cells = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]*)\|", section, re.MULTILINE)
    return [(field, kind.strip(), default.strip()) for field, kind, default in cells]


def _type_text(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in parts)
    if origin in (types.UnionType,) or str(origin) == "typing.Union":
        return " or ".join(_type_text(each) for each in parts)
    if hint is types.NoneType:
        return "None"
    if origin is Callable:
        return "function"
    if origin is tuple:
        return f"tuple of {_type_text(parts[0])}"
    if parts:
        return f"mapping of {_type_text(parts[0])} to {_type_text(parts[1])}"
    return f"`{hint.__name__}`"


def _default_text(default: object) -> str:
    return "empty" if default in ((), {}) else f"`{default}`"


def _hint_rows() -> list[Row]:
    hints, defaults = get_type_hints(Hint), Hint._field_defaults
    return [
        (name, _type_text(hints[name]), _default_text(defaults[name]) if name in defaults else "")
        for name in Hint._fields
    ]


def _properties_rows() -> list[Row]:
    return [
        (each.name, _type_text(each.type), _default_text(each.default))
        for each in msgspec.structs.fields(Properties)
    ]


def _device_rows() -> list[Row]:
    hints = get_type_hints(Device)
    return [(each.name, _type_text(hints[each.name]), "") for each in dataclasses.fields(Device)]


def _request_names() -> set[str]:
    """What a request has for authors; `key` is the engine's."""
    methods = {name for name, each in inspect.getmembers(Request) if not name.startswith("_")}
    return methods - {"key"}


def test_the_table_of_hint_is_the_class() -> None:
    assert _rows("Hint") == _hint_rows()


def test_the_table_of_properties_is_the_class() -> None:
    assert _rows("Properties") == _properties_rows()


def test_the_table_of_device_is_the_class() -> None:
    assert _rows("Device") == _device_rows()


def test_the_table_of_request_is_the_class() -> None:
    section = GUIDE.partition("#### `Request`\n")[2].partition("\n#")[0]
    first_cells = re.findall(r"^\| ([^|]*`[^|]*)\|", section, re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)", cell)}
    assert named == _request_names()


@pytest.mark.parametrize("transport", ["zeromq", "ring"])
def test_the_first_disk_is_a_disk(tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "transport", transport)
    indented = re.search(r"^(?: {4}.*\n|\n)+", GUIDE.partition("## Your first disk\n")[2], re.MULTILINE)
    assert indented is not None
    code = textwrap.dedent(indented[0])
    file, store = tmp_path / "disk.py", tmp_path / "disk.img"
    file.write_text(code)
    store.write_bytes(bytes(1 << 20))
    with FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, file, {"path": str(store)})
        assert worker.accept().size_bytes == 1 << 20
        assert worker.write(4096, b"1" * 8192) == 8192
        assert worker.read(0, 16384) == bytes(4096) + b"1" * 8192 + bytes(4096)
        assert worker.do(Op.FLUSH) == 0
        process.kill()
        process.communicate()
        successor = spawn(tmp_path, file, {"path": str(store)})
        worker.accept()
        assert worker.read(4096, 8192) == b"1" * 8192
        worker.detach()
        assert finish(successor)[0] == 0
    assert store.read_bytes()[4096:12288] == b"1" * 8192
