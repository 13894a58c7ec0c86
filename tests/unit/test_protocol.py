"""docs/PROTOCOL.md, the Python structs and the C headers say the same, in both directions."""

import os
import re
import subprocess
import types
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
import pytest

from ublkpool.bufpool import wire
from ublkpool.bufpool.wire import attach, descriptors
from ublkpool.bufpool.wire.descriptors import Flag, Kind, Op

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "bufpool" / "wire" / "csrc"
PUBLIC = ("ublkpool.h", "wire.h", "shared_ring.h")
GUIDE = (ROOT / "docs" / "PROTOCOL.md").read_text()
BROKER = 32
"""Kinds from here on are between worker and broker."""
_NO_NUMBERS = {
    "UBLKPOOL_H",
    "UBLKPOOL_WIRE_H",
    "UBLKPOOL_SHARED_RING_H",
    "UBLKPOOL_RUN_DIR",
    "UBLKPOOL_ATTACH_SOCKET",
}


class Field(NamedTuple):
    """One field of a message; `default` is empty if it may not be left out."""

    name: str
    type: str
    default: str


def _documented(guide: str) -> dict[str, list[Field]]:
    """The fields of each message, from the table below its heading."""
    found = {}
    for name, section in re.findall(r"^#{3,4} `(\w+)`\n(.*?)(?=^#|\Z)", guide, re.MULTILINE | re.DOTALL):
        rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)
        found[name] = [Field(field, *_type_and_default(cell)) for field, cell in rows]
    return found


def _type_and_default(cell: str) -> tuple[str, str]:
    """The cells `integer, 0` and "`pool`, `own`; `pool`" in two parts."""
    separator = "; " if "; " in cell else ", "
    if cell.startswith("`") and separator == ", ":
        return cell, ""
    kind, _, default = cell.partition(separator)
    return kind, default


def _structs() -> dict[str, type[msgspec.Struct]]:
    """Every struct of the attach messages, under the name that it has in the guide."""
    classes = [
        each for each in vars(attach).values() if isinstance(each, type) and issubclass(each, msgspec.Struct)
    ]
    return {_name(each): each for each in classes}


def _name(struct: type[msgspec.Struct]) -> str:
    return str(struct.__struct_config__.tag or struct.__name__.lower())


def _fields(struct: type[msgspec.Struct]) -> list[Field]:
    hints = get_type_hints(struct)
    tag = struct.__struct_config__.tag
    first = [Field("type", f"`{tag}`", "")] if tag else []
    return first + [
        Field(each.name, _type_text(hints[each.name]), _default_text(each, hints[each.name]))
        for each in msgspec.structs.fields(struct)
    ]


def _type_text(hint: Any) -> str:
    words = {int: "integer", bool: "bool", str: "string", types.NoneType: "null"}
    if hint in words:
        return words[hint]
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return f"object `{_name(hint)}`"
    if get_origin(hint) is tuple:
        return _list_text(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(hint))
    return " or ".join(_type_text(each) for each in get_args(hint))


def _list_text(element: Any) -> str:
    kind = _type_text(element)
    return f"list of {kind.removeprefix('object ')}" if kind.startswith("object") else f"list of {kind}s"


def _default_text(field: msgspec.structs.FieldInfo, hint: Any) -> str:
    if field.required:
        return ""
    if get_origin(hint) is Literal:
        return f"`{field.default}`"
    if field.default in ("", ()):
        return "empty"
    return str(msgspec.json.encode(field.default).decode())


def test_the_tables_of_messages_are_the_structs() -> None:
    documented = _documented(GUIDE)
    assert {name: _fields(struct) for name, struct in _structs().items()} == documented
    assert len(documented) == 18


@pytest.mark.parametrize(
    ("true", "false"),
    [
        ("| `epoch` | integer |", "| `epochs` | integer |"),
        ("| `epoch` | integer |", "| `epoch` | string |"),
        ("| `segment_bytes` | integer, 0 |", "| `segment_bytes` | integer |"),
        ("| `keep` | bool, false |", "| `keep` | bool, true |"),
        ("| `pool`, `own`; `pool` |", "| `pool`, `own`; `own` |"),
        ("### `live`", "### `alive`"),
    ],
)
def test_a_table_that_differs_is_found(true: str, false: str) -> None:
    assert GUIDE.count(true) >= 1
    assert _documented(GUIDE.replace(true, false)) != _documented(GUIDE)


def test_the_table_of_kinds_is_the_enum() -> None:
    rows = re.findall(r"^\| (\d+) ([A-Z]+) \| (worker|backend) \|", GUIDE, re.MULTILINE)
    assert {name: int(number) for number, name, _ in rows} == {
        each.name: each.value for each in Kind if each < BROKER
    }
    assert all((int(number) >= 16) == (sender == "backend") for number, _, sender in rows)


def _layout() -> str:
    return GUIDE.partition("    offset size field\n")[2].partition("\n\n")[0]


def _named_numbers(row: str) -> dict[str, int]:
    line = next(each for each in _layout().splitlines() if f" {row} " in each)
    pairs = re.findall(r"\b(\d+) ([A-Z_]+)", line)
    return {name: int(number) for number, name in pairs}


def test_operations_and_flags_are_the_enums() -> None:
    assert _named_numbers("op") == {each.name: each.value for each in Op}
    assert _named_numbers("flags") == {str(each.name): each.value for each in Flag}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C compiler makes of the public headers: each number, and each field's offset and size."""
    directory = tmp_path_factory.mktemp("native")
    texts = [re.sub(r"/\*.*?\*/", "", (HEADERS / name).read_text(), flags=re.DOTALL) for name in PUBLIC]
    names = sorted(set(re.findall(r"\b(?:WIRE|SR|UBLKPOOL)_[A-Z_]+\b", "\n".join(texts))) - _NO_NUMBERS)
    lines = [f'printf("{name} %lld\\n", (long long){name});' for name in names]
    for struct, fields in {
        "wire_descriptor": wire.Descriptor._fields,
        "sr_shared": ("tail", "head", "sleeping"),
    }.items():
        for field in fields:
            member = f"((struct {struct} *)0)->{field}"
            lines.append(f'printf("{struct}.{field} %zu\\n", offsetof(struct {struct}, {field}));')
            lines.append(f'printf("{struct}.{field}.size %zu\\n", sizeof {member});')
    source = directory / "numbers.c"
    body = "\n".join(lines)
    source.write_text(
        f'#include <stdio.h>\n#include "ublkpool.h"\nint main(void)\n{{\n{body}\nreturn 0;\n}}\n'
    )
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [
        "gcc",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Wno-unused-function",
        "-Werror",
        f"-I{HEADERS}",
        str(source),
    ]
    subprocess.run([*command, "-o", str(directory / "numbers")], check=True, env=clean)
    said = subprocess.run(
        [directory / "numbers"], check=True, capture_output=True, text=True, env=clean
    ).stdout
    return {name: int(number) for name, number in (line.split() for line in said.splitlines())}


def test_the_layout_of_a_descriptor_is_that_of_the_headers(native: dict[str, int]) -> None:
    rows = re.findall(r"^ +(\d+) +(\d+) (\w+)", _layout(), re.MULTILINE)
    documented = {name: (int(offset), int(size)) for offset, size, name in rows}
    assert documented == {
        name: (native[f"wire_descriptor.{name}"], native[f"wire_descriptor.{name}.size"])
        for name in wire.Descriptor._fields
    }
    python = descriptors._DESCRIPTOR
    assert python.size == sum(size for _, size in documented.values()) == wire.DESCRIPTOR_BYTES
    probe = python.unpack(bytes(range(wire.DESCRIPTOR_BYTES)))
    for name, value in zip(wire.Descriptor._fields, probe, strict=True):
        offset, size = documented[name]
        assert value == int.from_bytes(bytes(range(offset, offset + size)), "little"), name


def test_the_layout_of_a_ring_is_that_of_the_headers(native: dict[str, int]) -> None:
    rows = re.findall(
        r"^ +(\d+)  (tail|head|sleeping|N entries)[^\d]* +(?:of 64 bytes +)?(\d+)", GUIDE, re.MULTILINE
    )
    documented = {name: (int(first), int(second)) for first, name, second in rows}
    half = native["SR_CONTROL_BYTES"] // 2
    expected = {name: (native[f"sr_shared.{name}"],) * 2 for name in ("tail", "head", "sleeping")}
    assert {name: (a, b - half) for name, (a, b) in documented.items() if name != "N entries"} == expected
    assert documented["N entries"][0] == native["SR_CONTROL_BYTES"]
    assert f"4096+N*{native['SR_ENTRY_BYTES']}" in GUIDE
    assert f"at most {native['SR_ENTRIES_MAX']}" in GUIDE


def test_the_numbers_of_the_headers_are_those_of_python(native: dict[str, int]) -> None:
    expected = {f"WIRE_{each.name}": int(each) for each in (*Op, *Flag)}
    expected |= {f"WIRE_{each.name}": int(each) for each in Kind if each < BROKER}
    expected |= {
        "WIRE_FRAME_DESCRIPTORS_MAX": wire.DESCRIPTORS_PER_FRAME_MAX,
        "WIRE_CLIENT_SLICES_MAX": wire.CLIENT_SLICES_MAX,
        "WIRE_SEGMENT_NONE": wire.SEGMENT_NONE,
        "WIRE_SEGMENT_POOL": wire.SEGMENT_POOL,
        "WIRE_SEGMENT_CLIENTS": wire.SEGMENT_CLIENTS,
        "UBLKPOOL_PROTOCOL_VERSION": wire.PROTOCOL_VERSION,
        "UBLKPOOL_PACKET_BYTES_MAX": wire.ATTACH_MESSAGE_BYTES_MAX,
        "UBLKPOOL_TOKEN_BYTES": wire.TOKEN_BYTES,
        "UBLKPOOL_SEGMENTS_MAX": 1 + wire.CLIENT_SLICES_MAX,
        "UBLKPOOL_RING_FILES": 3,
    }
    found = {name: value for name, value in native.items() if name.startswith(("WIRE_", "UBLKPOOL_"))}
    assert found == expected


def test_each_public_header_is_installed_and_names_no_other() -> None:
    installed = (ROOT / "pyproject.toml").read_text()
    for name in PUBLIC:
        assert f'"src/ublkpool/bufpool/wire/csrc/{name}"' in installed
        assert set(re.findall(r'#include "([^"]+)"', (HEADERS / name).read_text())) <= set(PUBLIC)
