"""Loading: kinds, files, options, and errors that say what would be right."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from ublkpool.backends.null import NullBackend
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk import loader
from ublkpool.bufpool.sdk.backend import Backend, Hint, Properties
from ublkpool.bufpool.sdk.options import declared, parse_options
from ublkpool.bufpool.sizes import ByteSize

EXAMPLES = Path(__file__).parents[2] / "examples"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    path: Path
    size: ByteSize = 4096
    count: int = 1
    mode: Literal["a", "b"] = "a"
    on: bool = False


def test_options_become_typed_values() -> None:
    given = {"path": "/x", "size": "1.5K", "count": "3", "mode": "b", "on": "yes"}
    assert parse_options("x", Options, given) == Options(
        path=Path("/x"), size=1536, count=3, mode="b", on=True
    )


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "x: option path is missing; options are: path=PATH"),
        ({"path": "/", "colour": "red"}, "x: unknown option colour=red; options are: path=PATH [size=SIZE]"),
        ({"path": "/", "size": "12Q"}, "x: option size: '12Q' is not a size"),
        ({"path": "/", "count": "many"}, "x: option count: 'many' is not a number"),
        ({"path": "/", "mode": "c"}, "x: option mode: 'c' is not one of a, b"),
        ({"path": "/", "on": "maybe"}, "x: option on: 'maybe' is not on or off"),
    ],
)
def test_a_bad_option_is_one_line_that_says_what_is_valid(given: dict[str, str], line: str) -> None:
    with pytest.raises(BackendError) as caught:
        parse_options("x", Options, given)
    assert str(caught.value).startswith(line)
    assert "options are: path=PATH" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_usage_of_each_option_can_be_shown() -> None:
    shown = [each.usage for each in declared(Options)]
    assert shown == ["path=PATH", "[size=SIZE]", "[count=NUMBER]", "[mode=a|b]", "[on=on|off]"]


def test_built_in_kinds_are_found_by_name() -> None:
    assert {"null", "memory", "file"} <= set(loader.kinds())
    assert isinstance(loader.load("null", {"size": "1G"}), NullBackend)


def test_a_backend_over_rings_loads_nothing_that_it_does_not_use() -> None:
    """Every device has such a process: each of these took megabytes, and a good part of the time to start."""
    loads = "import sys; from ublkpool.bufpool import loader, ring_links; loader.load('null', {'size': '1G'})"
    unused = {"asyncio", "email", "importlib.metadata", "ssl", "zmq"}
    found = subprocess.check_output(
        [sys.executable, "-c", f"{loads}; print(*sys.modules)"], text=True
    ).split()
    assert "ublkpool.bufpool.sdk.ring_links" in found and unused.isdisjoint(found)


def test_zeromq_alone_loads_no_event_loop() -> None:
    loads = "import sys; from ublkpool.bufpool import zeromq_links; print(*sys.modules)"
    found = subprocess.check_output([sys.executable, "-c", loads], text=True).split()
    assert "zmq" in found and {"asyncio", "ssl"}.isdisjoint(found)


def test_other_packages_bring_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("theirs", "ublkpool.backends.null:NullBackend", loader.ENTRY_POINTS)
    monkeypatch.setattr(
        loader, "entry_points", lambda group, name=None: [entry] if name in (None, "theirs") else []
    )
    assert "theirs" in loader.kinds()
    assert isinstance(loader.load("theirs", {}), NullBackend)


@pytest.mark.parametrize("kind", ["nosuch", "os.path", "__init__x"])
def test_an_unknown_kind_names_those_there_are(kind: str) -> None:
    with pytest.raises(BackendError, match=f"no backend is called '{kind}'; there are .*memory.*null"):
        loader.load(kind, {})


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("x = 1", r"needs one subclass of Backend \(it has 0"),
        ("def get_size(): return 1", "or the functions get_size and pread"),
        (
            "from ublkpool.bufpool.sdk.backend import Backend\nclass A(Backend): pass\nclass B(Backend): pass",
            "has 2",
        ),
        ("BACKEND = 3", "3 is not a subclass of Backend"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_file_that_is_no_backend_says_why(tmp_path: Path, code: str, line: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(BackendError, match=line) as caught:
        loader.load(str(path), {})
    assert str(path) in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"gone\.py: no such Python file"):
        loader.load(str(tmp_path / "gone.py"), {})


def test_backend_chooses_among_classes(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from ublkpool.bufpool.sdk.backend import Backend\n"
        "class A(Backend): pass\nclass B(Backend): pass\nBACKEND = B\n"
    )
    assert type(loader.load(str(path), {})).__name__ == "B"


def load_functions(tmp_path: Path, code: str, given: dict[str, str] | None = None) -> Backend:
    path = tmp_path / "functions.py"
    path.write_text(code)
    return loader.load(str(path), given or {})


def test_the_functions_of_a_module_determine_the_properties(tmp_path: Path) -> None:
    backend = load_functions(
        tmp_path, "def get_size(): return 8192\ndef pread(buf, offset): buf[:] = b'f' * len(buf)"
    )
    properties = backend.open(Hint("x", tmp_path))
    assert isinstance(properties, Properties)
    assert (properties.size_bytes, properties.read_only, properties.volatile_cache) == (8192, True, False)
    assert (properties.discard_max_bytes, properties.write_zeroes_max_bytes) == (0, 0)
    buffer = bytearray(4)
    backend.pread(memoryview(buffer), 0)
    assert buffer == b"ffff"


def test_an_empty_store_of_a_module_is_refused_and_not_served_with_the_device_s_size(tmp_path: Path) -> None:
    backend = load_functions(tmp_path, "def get_size(): return 0\ndef pread(buf, offset): pass")
    with pytest.raises(BackendError, match=r"functions: get_size\(\) is 0: the store is empty"):
        backend.open(Hint("x", tmp_path, size_bytes=1 << 20, may_create=False))


def test_functions_flush_after_a_write_with_fua(tmp_path: Path) -> None:
    code = (
        "said = []\n"
        "def open(size: int = 4096): said.append(size)\n"
        "def get_size(): return said[0]\n"
        "def pread(buf, offset): said.append(('read', offset))\n"
        "def pwrite(buf, offset): said.append(('write', offset))\n"
        "def flush(): said.append('flush')\n"
        "def pread_said(): return said\n"
    )
    backend = load_functions(tmp_path, code, {"size": "8192"})
    assert isinstance(backend, loader.FunctionBackend)
    properties = backend.open(Hint("x", tmp_path))
    assert isinstance(properties, Properties)
    assert (properties.size_bytes, properties.volatile_cache) == (8192, True)
    backend.pwrite(memoryview(b"x"), 512, False)
    backend.pwrite(memoryview(b"x"), 1024, True)
    assert backend.module.said == [8192, ("write", 512), ("write", 1024), "flush"]


def test_an_option_that_open_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="file_functions: unknown option size=1; options are: path=TEXT"):
        loader.load(str(EXAMPLES / "file_functions.py"), {"size": "1"})
